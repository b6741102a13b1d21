"""SIGTERM and SIGINT: finish the step, save, and say how to go on.

Schedulers and spot instances send SIGTERM some time before they kill; Ctrl-C sends SIGINT.
"""

import signal
import threading
import time

PATIENCE_S = 1.0


class Interrupted(SystemExit):
    """Ends a run that was asked to stop, after its checkpoint; the exit code is the shell's own for that signal."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)
        self.signal_name = signal.Signals(signal_number).name


class StopSignals:
    """Takes note of SIGTERM and SIGINT while it is entered; the same one again ends the process, as it would have.

    Launchers send more than one: to the workers what the terminal has sent them already, or one after the other. So
    a repetition within a second, or another signal, is not taken for impatience.

    Attributes:
        caught: the number of the signal that came, or 0.
    """

    def __init__(self):
        self.caught, self._at = 0, 0.0
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _catch(self, number: int, frame) -> None:
        if not self.caught:
            self.caught, self._at = number, time.monotonic()
        elif number == self.caught and time.monotonic() - self._at > PATIENCE_S:
            self.__exit__()
            signal.raise_signal(number)
