"""Python functions as tools: from a signature and a docstring to OpenAI's JSON schema.

    def add(a: int, b: int = 1) -> int:
        \"\"\"Add two numbers.

        Args:
            a: the first number.
        \"\"\"

    {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "the first number."}, "b": {"type": "integer"}},
        "required": ["a"]}}}

A description tells the model when to call a function; the texts of the parameters tell it how.
"""

import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

from minillm.errors import UserError
from minillm.serving.tools.json_schema import check_schema

SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object"}
ARRAYS = (list, tuple, set)
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(?P<indent>\s+)\*?(?P<name>\w+)(?:\s*\([^)]*\))?:\s*(?P<text>.*)$")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def tool_schema(function: Callable) -> dict:
    """Return a function in OpenAI's form. The docstring up to its first section is the description.

    Types may be str, int, float, bool, dict, list[…], Literal[…], unions of them and None. Parameters without a default
    are required.

    Raises:
        UserError: a parameter without a type, with a type that JSON lacks, or that cannot be given by name; a name that
            OpenAI does not allow.
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not _NAME.fullmatch(name):
        allowed = "1 to 64 of a-z, A-Z, 0-9, _ and -"
        raise UserError(f"tool {name or function!r} must be a function whose name has {allowed}")
    description, notes = _read_docstring(inspect.getdoc(function) or "")
    hints, properties, required = _hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"parameter {parameter.name!r} of the tool {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where} cannot be given by name: write plain parameters, without * and /")
        if parameter.name not in hints:
            raise UserError(f"{where} has no type: write {parameter.name}: str, for example")
        note = {"description": notes[parameter.name]} if parameter.name in notes else {}
        properties[parameter.name] = _type_schema(hints[parameter.name], where) | note
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def load_functions(path: str | Path) -> list[Callable]:
    """Run a Python file and return its tools: the list ``TOOLS``, else every public function that it defines.

    Raises:
        UserError: the file is missing, fails, or has no tools.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--tools {path}: no such file; give a Python file with functions")
    spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file may raise anything
        raise UserError(f"--tools {path}: {type(error).__name__}: {error}; correct the file") from error
    functions = getattr(module, "TOOLS", None)
    if functions is None:
        own = (value for value in vars(module).values() if inspect.isfunction(value))
        functions = [value for value in own if value.__module__ == module.__name__ and value.__name__[0] != "_"]
    if not isinstance(functions, list) or not functions or not all(map(callable, functions)):
        raise UserError(f"--tools {path}: no tools; define functions, or list them as TOOLS = [function, …]")
    return functions


def _hints(function: Callable) -> dict:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError) as error:
        raise UserError(f"the types of the tool {function.__name__} cannot be read: {error}") from None


def _type_schema(hint, where: str) -> dict:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if hint in SIMPLE or origin is dict:
        return {"type": SIMPLE[hint if hint in SIMPLE else dict]}
    if hint in ARRAYS or origin in ARRAYS:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        if len(inner) > 1:
            raise UserError(f"{where} has the type {hint}: its items must be of one type, such as list[int]")
        return {"type": "array"} | ({"items": _type_schema(inner[0], where)} if inner else {})
    if origin is typing.Literal:
        kinds = {type(value) for value in arguments}
        schema = {"enum": list(arguments)}
        if not kinds <= SIMPLE.keys():
            raise UserError(f"{where} has the type {hint}: the values must be texts, numbers or None")
        return {"type": SIMPLE[kinds.pop()], **schema} if len(kinds) == 1 else schema
    if origin in (typing.Union, types.UnionType):
        options = [_type_schema(argument, where) for argument in arguments]
        if all(set(option) == {"type"} for option in options):
            return {"type": [option["type"] for option in options]}
        return {"anyOf": options}
    raise UserError(
        f"{where} has the type {hint}, which JSON lacks: use str, int, float, bool, dict, list[…], Literal[…] or unions"
    )


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description, and the text of each argument in the section ``Args:``."""
    description, *sections = _SECTION.split(text)
    notes: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title not in ("Args", "Arguments", "Parameters"):
            continue
        name, indent = "", None
        for line in body.splitlines():
            match = _ARGUMENT.match(line)
            if match and indent in (None, match["indent"]):
                name, indent = match["name"], match["indent"]
                notes[name] = match["text"].strip()
            elif name and line.strip():
                notes[name] = f"{notes[name]} {line.strip()}".strip()
    return " ".join(description.split()), notes


def check_tool_schema(schema: dict) -> None:
    """Raise UserError unless the arguments of a tool in OpenAI's form can be checked."""
    function = schema.get("function") or schema
    check_schema(function.get("parameters", {}), f"the parameters of the tool {function['name']}")
