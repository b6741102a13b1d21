"""Checks the arguments of a call against their JSON schema: the part of the standard that describes functions.

Written out because it is short, and because the message goes to the model, which has to correct its call. The result is
that of the package ``jsonschema`` (draft 2020-12). A schema with another keyword is refused, so that nothing is
unchecked without notice.
"""

import math
from collections.abc import Callable

from minillm.errors import UserError

TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
# Keyword: the type it is about, whether a value has it, and what the message says.
LIMITS: dict[str, tuple[str, Callable, str]] = {
    "minimum": ("number", lambda value, limit: value >= limit, "must be at least {}"),
    "maximum": ("number", lambda value, limit: value <= limit, "must be at most {}"),
    "exclusiveMinimum": ("number", lambda value, limit: value > limit, "must be more than {}"),
    "exclusiveMaximum": ("number", lambda value, limit: value < limit, "must be less than {}"),
    "minLength": ("string", lambda value, limit: len(value) >= limit, "must have at least {} characters"),
    "maxLength": ("string", lambda value, limit: len(value) <= limit, "must have at most {} characters"),
    "minItems": ("array", lambda value, limit: len(value) >= limit, "must have at least {} items"),
    "maxItems": ("array", lambda value, limit: len(value) <= limit, "must have at most {} items"),
}
STRUCTURE = ("type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items")
NOTES = ("title", "description", "default", "examples", "format", "deprecated", "$schema", "strict")  # check nothing


def check_schema(schema, where: str = "parameters") -> None:
    """Raise UserError unless ``check_value`` can check values against ``schema``; ``where`` begins the message."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{where} must be a JSON schema, an object, not {type(schema).__name__}")
    for keyword, value in schema.items():
        if keyword not in (*STRUCTURE, *LIMITS, *NOTES):
            known = ", ".join([*STRUCTURE, *LIMITS])
            raise UserError(f"{where}: the keyword {keyword!r} cannot be checked: leave it out; known are {known}")
        if keyword in LIMITS and not _is_number(value):
            raise UserError(f"{where}: {keyword} is {value!r}; it must be a number")
        if keyword in ("enum", "anyOf", "required") and not isinstance(value, list):
            raise UserError(f"{where}: {keyword} must be a list, not {type(value).__name__}")
    types = schema.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in TYPES:
            raise UserError(f"{where}: type is {name!r}; there are {', '.join(TYPES)}")
    for number, option in enumerate(schema.get("anyOf", [])):
        check_schema(option, f"{where}.anyOf[{number}]")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise UserError(f"{where}: properties must be an object, not {type(properties).__name__}")
    for name, inner in properties.items():
        check_schema(inner, f"{where}.{name}")
    for keyword in ("items", "additionalProperties"):
        check_schema(schema.get(keyword, True), f"{where}.{keyword}")


def check_value(value, schema, where: str = "arguments") -> None:
    """Raise UserError unless ``value`` is valid; the message names the part, its value, and what it must be.

    Args:
        value: of JSON.
        schema: one that ``check_schema`` accepts.
        where: the name of ``value`` in the message.
    """
    if isinstance(schema, bool):
        if not schema:
            raise UserError(f"{where} is not allowed")
        return

    def require(is_valid: bool, message: str) -> None:
        if not is_valid:
            raise UserError(f"{where} is {_short(value)}; it {message}")

    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        require(any(TYPES[name](value) for name in names), f"must be of type {' or '.join(names)}")
    if "enum" in schema:
        options = ", ".join(map(_short, schema["enum"]))
        require(any(_equal(value, option) for option in schema["enum"]), f"must be one of {options}")
    if "const" in schema:
        require(_equal(value, schema["const"]), f"must be {_short(schema['const'])}")
    for keyword, (type_name, holds, message) in LIMITS.items():
        if keyword in schema and TYPES[type_name](value):
            require(holds(value, schema[keyword]), message.format(schema[keyword]))
    if "anyOf" in schema:
        require(any(_is_valid(value, option) for option in schema["anyOf"]), "has none of the allowed forms")
    if isinstance(value, list):
        for number, item in enumerate(value):
            check_value(item, schema.get("items", True), f"{where}[{number}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", []):
            if name not in value:
                raise UserError(f"{where} lacks {name!r}")
        for name, item in value.items():
            if name not in properties and schema.get("additionalProperties") is False:
                raise UserError(f"{where} has no {name!r}; there are {', '.join(properties) or 'none'}")
            check_value(item, properties.get(name, schema.get("additionalProperties", True)), f"{where}.{name}")


def _is_valid(value, schema) -> bool:
    try:
        check_value(value, schema)
    except UserError:
        return False
    return True


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _equal(a, b) -> bool:
    """Return whether two values of JSON are equal: 1 equals 1.0, but not true."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
