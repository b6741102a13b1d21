"""SIGTERM and SIGINT: finish the step, save, and say how to go on.

Schedulers and spot instances send SIGTERM some time before they kill; Ctrl-C sends SIGINT.
"""

import signal
import threading


class Interrupted(SystemExit):
    """Ends a run that was asked to stop, after its checkpoint; the exit code is the shell's own for that signal."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)
        self.signal_name = signal.Signals(signal_number).name


class StopSignals:
    """Takes note of SIGTERM and SIGINT while it is entered; a second one ends the process at once, as it would have.

    Attributes:
        caught: the number of the signal that came, or 0.
    """

    def __init__(self):
        self.caught = 0
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
        self.caught = number
        self.__exit__()  # a second one is not caught
