"""How exercises are checked: the library is the solution, and known mistakes must fail with a message that teaches.

    @exercise("ch05_loss", solution=..., wrong={"what is wrong": (function, "part of the message")})
    def test_mean_loss(candidate):
        assert candidate(...) == ..., "positions without a target must not count: divide by the targets"

Normally the test runs once with the solution, which must pass, and once with each wrong answer, which must fail with
its message. With ``MINILLM_EXERCISES=1`` it runs with ``mean_loss`` of ``docs/exercises/ch05_loss.py``: the reader's.
A failure then prints its message only: pytest's traceback would show the test's source, with the solution in it.
"""

import functools
import importlib.util
import os
import traceback
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


def check_yours(test: Callable, file: str, name: str) -> None:
    """Run ``test`` with the reader's function; fail with what is wrong and nothing of the test's source."""
    try:
        test(yours(file, name))
        return
    except NotImplementedError:
        message = f"write {name} in docs/exercises/{file}.py"
    except AssertionError as error:  # below the message pytest explains the values: nested parts are left out
        message = "\n".join(line for line in str(error).splitlines() if not line.startswith(" +    "))
    except Exception as error:  # the reader's code, or the test that cannot use what it returned
        frames = traceback.extract_tb(error.__traceback__)
        shown = [f for f in frames if Path(f.filename).parent.name == "exercises" and f.filename != __file__]
        lines = traceback.format_list(shown)
        message = "".join([*lines, f"{type(error).__name__}: {error}"])
    pytest.fail(message, pytrace=False)


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
                check_yours(test, file, name)
            elif message is None:
                test(candidate)
            else:
                with pytest.raises(AssertionError, match=message):
                    test(candidate)

        del run.__wrapped__  # pytest reads the signature of what it wraps
        return pytest.mark.parametrize("case", cases)(run)

    return decorate


def find_the_bug(
    file: str,
    *,
    right: Callable,
    finder: Callable,
    wrong: dict[str, Callable],
    hint: str = "try other lengths, masks, dtypes or values",
):
    """Make a test of a test. ``docs/exercises/<file>.py`` has ``buggy``, and the reader's ``find_the_bug(function)``.

    A finder must pass with the right function and raise AssertionError with the buggy one. ``finder`` does so; each of
    ``wrong`` does not. ``hint`` says in which cases the bug stays hidden.
    """
    assert len(wrong) >= 3, "give at least three plausible finders that do not find it"

    def judge(candidate: Callable) -> None:
        try:
            candidate(right)
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[1]  # of the candidate
            details = str(error) or "to see the value here, write it behind a comma: assert value == expected, value"
            raise AssertionError(
                f"it accuses the right function in line {line.lineno}: {line.line}\n{details}"
            ) from None
        try:
            candidate(yours(file, "buggy"))
        except AssertionError:
            return
        raise AssertionError(f"it does not notice the bug: {hint}")

    judge.__name__ = "test_find_the_bug"
    messages = "it accuses the right function|it does not notice the bug"
    return exercise(file, solution=finder, wrong={name: (answer, messages) for name, answer in wrong.items()})(judge)
