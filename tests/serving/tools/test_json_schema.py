"""Arguments against their schema; the reference is the package jsonschema."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.serving.tools.json_schema import LIMITS, TYPES, check_schema, check_value

jsonschema = pytest.importorskip("jsonschema")

SCALARS = st.sampled_from([None, True, False, 0, 1, 2, -1, 1.0, 2.5, 10**30, "", "a", "abc", "鸟"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


def keywords(inner):
    sizes, numbers = st.integers(0, 3), st.sampled_from([0, 1, 2.5])
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(list(TYPES)) | st.lists(st.sampled_from(list(TYPES)), min_size=1, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
            "items": st.booleans() | inner,
            "description": st.just("x"),
            **{name: numbers if LIMITS[name][0] == "number" else sizes for name in LIMITS},
        },
    )


SCHEMAS = st.recursive(st.booleans(), keywords, max_leaves=4)


@given(SCHEMAS, VALUES)
@settings(max_examples=500, deadline=None)
def test_the_verdict_is_that_of_jsonschema(schema, value):
    check_schema(schema)
    expected = jsonschema.Draft202012Validator(schema).is_valid(value)
    if expected:
        check_value(value, schema)
    else:
        with pytest.raises(UserError, match=r"^arguments"):
            check_value(value, schema)


POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0}, "unit": {"enum": ["m", "km"]}, "tags": {"items": {"type": "string"}},
    },
    "required": ["x"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "value, message",
    [
        ({}, "arguments lacks 'x'"),
        ({"x": "3"}, "arguments.x is '3'; it must be of type integer"),
        ({"x": True}, "arguments.x is True; it must be of type integer"),
        ({"x": -1}, "arguments.x is -1; it must be at least 0"),
        ({"x": 1, "unit": "mm"}, "arguments.unit is 'mm'; it must be one of 'm', 'km'"),
        ({"x": 1, "y": 2}, "arguments has no 'y'; there are x, unit, tags"),
        ({"x": 1, "tags": ["a", 2]}, r"arguments.tags\[1\] is 2; it must be of type string"),
        ([1], r"arguments is \[1\]; it must be of type object"),
        ({"x": "9" * 9999}, "arguments.x is '9{99}…; it must"),
    ],
)
def test_the_message_names_the_part_and_what_it_must_be(value, message):
    with pytest.raises(UserError, match=message):
        check_value(value, POINT)


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"properties": {"a": {"$ref": "#/x"}}}, r"parameters.a: the keyword '\$ref' cannot be checked"),
        ({"pattern": "(a+)+$"}, "'pattern' cannot be checked"),
        ({"type": "int"}, "type is 'int'; there are null, boolean, integer"),
        ({"type": ["string", 1]}, "type is 1"),
        ({"items": {"anyOf": [{"type": "x"}]}}, r"parameters.items.anyOf\[0\]: type is 'x'"),
        ({"properties": []}, "properties must be an object, not list"),
        ({"required": "a"}, "required must be a list, not str"),
        ({"minimum": "0"}, "minimum is '0'; it must be a number"),
        ("string", "must be a JSON schema, an object, not str"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema, message):
    with pytest.raises(UserError, match=message):
        check_schema(schema)
