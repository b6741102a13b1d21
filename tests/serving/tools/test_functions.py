"""From a Python function to OpenAI's schema; the reference is transformers' ``get_json_schema``."""

from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from transformers.utils import get_json_schema

from minillm.errors import UserError
from minillm.serving.tools.functions import check_tool_schema, load_functions, tool_schema


def plain(a: int, b: float, c: str, d: bool):
    """
    Do something with
    four values.

    Args:
        a: The first.
        b: The second, whose text
            goes on here: with a colon.
        c: The third.
        d: The fourth.

    Returns:
        nothing
    """


def nested(items: list[int], rows: list[list[str]], any_list: list, table: dict, last: str = "x"):
    """Take lists.

    Args:
        items: Numbers.
        rows: Texts.
        any_list: Anything.
        table: Names.
        last: A text.
    """


def nothing():
    """Return nothing."""


@pytest.mark.parametrize("function", [plain, nested, nothing])
def test_schema_equals_that_of_transformers(function):
    ours, reference = tool_schema(function), get_json_schema(function)
    reference["function"].pop("return", None)
    reference["function"]["description"] = " ".join(reference["function"]["description"].split())
    reference["function"]["parameters"].setdefault("required", [])
    assert ours == reference
    check_tool_schema(ours)


def test_every_kind_of_type():
    def tool(
        a: "int",
        b: Any,
        c: Literal["x", "y"],
        d: Literal["x", 1],
        e: int | None = None,
        f: Optional[str] = None,  # noqa: UP045 - an old spelling that users write
        g: list[int] | str = "",
        *,
        h: tuple[float, ...] = (),
    ):
        pass

    schema = tool_schema(tool)
    assert schema["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {},
            "c": {"type": "string", "enum": ["x", "y"]},
            "d": {"enum": ["x", 1]},
            "e": {"type": ["integer", "null"]},
            "f": {"type": ["string", "null"]},
            "g": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
            "h": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["a", "b", "c", "d"],
    }
    assert "description" not in schema["function"]
    check_tool_schema(schema)


def untyped(a):
    pass


def starred(*a: int):
    pass


def positional(a: int, /):
    pass


def foreign(path: Path):
    pass


def mixed(a: tuple[int, str]):
    pass


def unknown(a: "Nowhere"):  # noqa: F821
    pass


@pytest.mark.parametrize(
    "function, message",
    [
        (untyped, "parameter 'a' of the tool untyped has no type: write a: str"),
        (starred, "parameter 'a' of the tool starred cannot be given by name"),
        (positional, "parameter 'a' of the tool positional cannot be given by name"),
        (foreign, "parameter 'path' of the tool foreign has the type <class 'pathlib.*which JSON lacks"),
        (mixed, "its items must be of one type"),
        (unknown, "the types of the tool unknown cannot be read: name 'Nowhere'"),
        (lambda a: a, "must be a function whose name"),
        (3, "tool 3 must be a function"),
    ],
)
def test_what_cannot_be_described_is_refused(function, message):
    with pytest.raises(UserError, match=message):
        tool_schema(function)


def test_a_file_gives_its_public_functions_or_its_list(tmp_path):
    path = tmp_path / "my tools.py"
    path.write_text("import os\nfrom json import dumps\ndef b(): 'B.'\ndef a(): 'A.'\ndef _hidden(): pass\nx = 3\n")
    assert [function.__name__ for function in load_functions(path)] == ["b", "a"]
    path.write_text("from json import dumps\ndef b(): 'B.'\nTOOLS = [dumps]\n")
    assert [function.__name__ for function in load_functions(path)] == ["dumps"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("def f(: pass", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero; correct the file"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("x = 1", "no tools; define functions"),
        ("TOOLS = []", "no tools"),
        ("TOOLS = [1]", "no tools"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=f"--tools .*bad.py: .*{message}"):
        load_functions(tmp_path / "bad.py")


def test_a_missing_file_is_refused(tmp_path):
    for name in ("none.py", "none.txt", ""):
        with pytest.raises(UserError, match="no such file; give a Python file"):
            load_functions(tmp_path / name)
