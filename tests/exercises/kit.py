"""How exercises are checked: the library is the solution, and known mistakes must fail with a message that teaches.

    @exercise("ch05_loss", solution=..., wrong={"what is wrong": (function, "part of the message")})
    def test_mean_loss(candidate):
        assert candidate(...) == ..., "positions without a target must not count: divide by the targets"

Normally the test runs once with the solution, which must pass, and once with each wrong answer, which must fail with
its message. With ``MINILLM_EXERCISES=1`` it runs with ``mean_loss`` of ``docs/exercises/ch05_loss.py``: the reader's.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "exercises"
READS_YOURS = os.environ.get("MINILLM_EXERCISES") == "1"


def yours(file: str, name: str):
    """Return what the reader has written: the function ``name`` of ``docs/exercises/<file>.py``."""
    spec = importlib.util.spec_from_file_location(f"exercises_{file}", FOLDER / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def exercise(file: str, *, solution: Callable, wrong: dict[str, tuple[Callable, str]]):
    """Make a test of a function: its name behind ``test_`` is the function's name in ``docs/exercises/<file>.py``."""
    assert len(wrong) >= 3, "give at least three plausible wrong answers"

    def decorate(test: Callable):
        name = test.__name__.removeprefix("test_")
        cases = {"solution": (solution, None), **wrong}
        if READS_YOURS:
            cases = {"yours": (None, None)}

        @functools.wraps(test)
        def run(case: str):
            candidate, message = cases[case]
            if case == "yours":
                is_written = True
                try:
                    test(yours(file, name))
                except NotImplementedError:
                    is_written = False
                assert is_written, f"write {name} in docs/exercises/{file}.py"
            elif message is None:
                test(candidate)
            else:
                with pytest.raises(AssertionError, match=message):
                    test(candidate)

        del run.__wrapped__  # pytest reads the signature of what it wraps
        return pytest.mark.parametrize("case", cases)(run)

    return decorate


def find_the_bug(file: str, *, right: Callable, finder: Callable, wrong: dict[str, Callable]):
    """Make a test of a test. ``docs/exercises/<file>.py`` has ``buggy``, and the reader's ``find_the_bug(function)``.

    A finder must pass with the right function and raise AssertionError with the buggy one. ``finder`` does so; each of
    ``wrong`` does not.
    """
    assert len(wrong) >= 3, "give at least three plausible finders that do not find it"

    def judge(candidate: Callable) -> None:
        try:
            candidate(right)
        except AssertionError as error:
            raise AssertionError(f"it accuses the right function: {error}") from None
        try:
            candidate(yours(file, "buggy"))
        except AssertionError:
            return
        raise AssertionError("it does not notice the bug: try other lengths, masks, dtypes or values")

    judge.__name__ = "test_find_the_bug"
    messages = "it accuses the right function|it does not notice the bug"
    return exercise(file, solution=finder, wrong={name: (answer, messages) for name, answer in wrong.items()})(judge)
