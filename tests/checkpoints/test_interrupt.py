"""Signals that ask a run to stop: noted once, obeyed the second time, and none of our business afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minillm.checkpoints import interrupt
from minillm.checkpoints.interrupt import Interrupted, StopSignals

STOPS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test leaves, the next one finds the handlers as they were."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_noted_and_nothing_ends(number, handlers):
    signals = StopSignals()
    assert signals.caught == 0
    with signals as entered:
        assert entered is signals
        assert all(signal.getsignal(each) != handlers[each] for each in STOPS)
        signal.raise_signal(number)
        assert signals.caught == number
    assert {each: signal.getsignal(each) for each in STOPS} == handlers


def test_the_same_again_acts_as_it_would_have_without_us(handlers, monkeypatch):
    """Here Python's own SIGINT. At once, or as another signal, it is a launcher's: of these the first one counts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    now = 10.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        now += 1.1
        signal.raise_signal(signal.SIGTERM)
        assert signals.caught == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


# Says how it took the first signal, then waits for the second for ever.
TWICE = """
import signal, sys, time
from minillm.checkpoints.interrupt import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
with StopSignals() as signals:
    print("ready", flush=True)
    while not signals.caught:
        time.sleep(0.01)
    print("noted", signals.caught, flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_ends_the_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, number)
            assert process.stdout.readline() == f"noted {int(number)}\n"
            time.sleep(interrupt.PATIENCE_S + 0.1)
            os.kill(process.pid, number)
            assert process.wait(timeout=20) == -number
        finally:
            process.kill()


def test_a_thread_leaves_signals_alone(handlers):
    """Python lets the main thread alone set handlers: a run in another one is not to fail for that."""
    seen = []

    def enter():
        try:
            with StopSignals():
                seen.append({number: signal.getsignal(number) for number in STOPS})
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handlers]


def test_leaving_without_or_twice_is_nothing(handlers):
    signals = StopSignals()
    signals.__exit__()
    signals.__enter__()
    signals.__exit__()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # set by another after we have left
    signals.__exit__()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_is_the_shells(number, code):
    ended = Interrupted(int(number))
    assert isinstance(ended, SystemExit)
    assert (ended.code, ended.signal_name) == (code, number.name)
