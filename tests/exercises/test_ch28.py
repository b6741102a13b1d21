"""Exercises of chapter 28: what is certain, a call that never raises, and a stop string between two pieces."""

import json

from minillm.inference.text import StopMatcher, n_matched
from minillm.serving.tools import Toolbox
from tests.exercises.kit import exercise, find_the_bug


def shortest_end(text, stop):
    return next((n for n in range(1, len(stop)) if text.endswith(stop[:n])), 0)


def whole_stop_only(text, stop):
    return len(stop) if text.endswith(stop) else 0


def always_all_but_one(text, stop):
    return min(len(text), len(stop) - 1)


def anywhere(text, stop):
    return next((n for n in range(len(stop) - 1, 0, -1) if stop[:n] in text), 0)


@exercise(
    "ch28_held",
    solution=n_matched,
    wrong={
        "the shortest end": (shortest_end, "longest"),
        "nothing before the whole": (whole_stop_only, "too late"),
        "always as much as possible": (always_all_but_one, "longer than needed"),
        "anywhere in the text": (anywhere, "at the end"),
    },
)
def test_n_held_back(candidate):
    assert candidate("Hello", "<end>") == 0, "nothing here can begin <end>: do not hold text back longer than needed"
    assert candidate("Hi<en", "<end>") == 3, "<en may become <end>: if it is shown now, it is too late"
    assert candidate("a<b c", "<end>") == 0, "only what stands at the end of the text can still become <end>"
    assert candidate("xaba", "abab") == 3, "a and aba both begin abab: the longest one counts"
    assert candidate("", "<end>") == 0, "nothing can be held back of an empty text"


def add(a: int, b: int = 1) -> int:
    return a + b


def fail(why: str) -> str:
    raise OSError(why)


def library_run_call(functions, name, arguments):
    return Toolbox([add, fail]).run({"function": {"name": name, "arguments": arguments}})


def trusting(functions, name, arguments):
    return str(functions[name](**json.loads(arguments)))


def only_the_functions_errors(functions, name, arguments):
    values = json.loads(arguments)
    try:
        return str(functions[name](**values))
    except Exception as error:
        return f"error: {error}"


def silent(functions, name, arguments):
    try:
        return str(functions[name](**json.loads(arguments)))
    except Exception:
        return ""


def not_text(functions, name, arguments):
    try:
        return functions[name](**json.loads(arguments))
    except Exception as error:
        return f"error: {error}"


@exercise(
    "ch28_call",
    solution=library_run_call,
    wrong={
        "trusts the model": (trusting, "raised"),
        "trusts the arguments": (only_the_functions_errors, "raised"),
        "hides the reason": (silent, "error: "),
        "gives a number": (not_text, "a text"),
    },
)
def test_run_call(candidate):
    functions = {"add": add, "fail": fail}

    def result(name: str, arguments: str):
        try:
            return candidate(functions, name, arguments)
        except NotImplementedError:  # not written yet
            raise
        except Exception as error:
            raise AssertionError(f"{name}({arguments}) raised {error!r}: the model must read a result") from None

    assert isinstance(result("add", '{"a": 2}'), str), "the result of a call becomes a message: a text"
    assert result("add", '{"a": 2}') == "3", "add(2) is 3: b has a default"
    for name, arguments in (
        ("fail", '{"why": "no disk"}'),
        ("multiply", '{"a": 2}'),
        ("add", '{"c": 2}'),
        ("add", "[1, 2]"),
        ("add", '{"a": 2'),
    ):
        text = result(name, arguments)
        assert text.startswith("error: "), f"{name}({arguments}) fails: the model needs a text with error: and a reason"
    assert "no disk" in result("fail", '{"why": "no disk"}'), "tell the model the reason"


def right_shown(pieces, stop):
    matcher, text = StopMatcher((stop,)), ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.stopped:
            return text
    return text + matcher.finish()


def finder(shown):
    assert shown(["Hi<", "end", "> more"], "<end>") == "Hi", "the stop string may come in several pieces"


def in_one_piece(shown):
    assert shown(["Hi<end> more"], "<end>") == "Hi"


def without_a_stop(shown):
    assert shown(["Hi", " all"], "<end>") == "Hi all"


def between_pieces(shown):
    assert shown(["Hi", "<end>", " more"], "<end>") == "Hi", "the cuts fall beside the stop string"


def only_a_beginning(shown):
    assert shown(["Hi<", "en"], "<end>") == "Hi<en"


test_find_the_bug = find_the_bug(
    "ch28_bug",
    right=right_shown,
    finder=finder,
    wrong={
        "in one piece": in_one_piece,
        "no stop string": without_a_stop,
        "cuts beside it": between_pieces,
        "only its beginning": only_a_beginning,
    },
    hint="it hides while the stop string comes in one piece",
)
