"""The example tools: right, and safe with any text."""

import ast
import random
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.serving.tools import Toolbox
from minillm.serving.tools.calculator import calculate
from minillm.serving.tools.examples import TOOLS, current_time
from minillm.serving.tools.functions import load_functions
from minillm.serving.tools.text_search import search_in
from minillm.serving.tools.units import FACTORS, convert_units


def test_the_file_is_a_tools_file():
    path = Path(__file__).parents[3] / "minillm/serving/tools/examples.py"
    assert [function.__name__ for function in load_functions(path)] == [function.__name__ for function in TOOLS]
    assert all(tool["function"]["description"] for tool in Toolbox(TOOLS).schemas)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("23*45", "1035"), (" 2*(3+4)/7 ", "2"), ("1/3", "0.333333333333"), ("2**10", "1024"), ("2^10", "1024"),
        ("-3 - -4", "1"), ("7//2 + 7%4", "6"), ("3×4÷2", "6"), ("（1+2）*3", "9"), ("0.1+0.2", "0.3"), ("1e3", "1000"),
        ("2**0.5", "1.41421356237"), ("10**30", "1" + "0" * 30), ("2**-2", "0.25"), ("+5", "5"), ("1_000", "1000"),
    ],
)  # fmt: skip
def test_calculator(expression, value):
    assert calculate(expression) == value


def test_calculator_against_python():
    rng = random.Random(0)
    for _ in range(300):
        expression = str(rng.randint(0, 99))
        for _ in range(rng.randint(1, 5)):
            expression = f"({expression}){rng.choice(['+', '-', '*', '//', '%'])}{rng.randint(1, 99)}"
        assert calculate(expression) == str(eval(expression))


@pytest.mark.parametrize(
    "expression, message",
    [
        ("9**9**9", "the exponent 387420489 is too large; at most 100"), ("1**101", "too large"),
        ("10**31", "a number is too large; at most"),
        ("(10**30)**100", "too large"), ("1e308*10", "too large"), ("1e999", "too large"), ("9e29**100.0", "too large"),
        ("1/0", "division by zero"), ("0**-1", "division by zero"), ("5%0", "division by zero"), ("(-1)**0.5", "real"),
        ("__import__('os')", "only numbers"), ("(1).__class__", "only numbers"), ("a+1", "only numbers"),
        ("True+1", "only numbers"), ("'a'*9", "only numbers"), ("1j", "only numbers"), ("[1]", "only numbers"),
        ("1<2", "only numbers"), ("~1", "only numbers"), ("1<<999", "only numbers"), ("lambda: 1", "only numbers"),
        ("", "not an arithmetic"), ("1+", "not an arithmetic"), ("1;2", "not an arithmetic"), ("x:=1", "not an arith"),
        ("\x00", "not an arithmetic"), ("(" * 200, "not an arithmetic"), ("1" * 201, "has 201 characters"),
        ("9" * 200, "too large"),
    ],
)  # fmt: skip
def test_calculator_refuses(expression, message):
    with pytest.raises(ValueError, match=message):
        calculate(expression)


@given(st.text(st.sampled_from("0123456789+-*/%().e ^jx_=,[]'\"<&"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_calculator_ends_at_once_with_a_number_or_a_message(expression):
    start = time.perf_counter()
    try:
        value = calculate(expression)
    except ValueError as error:
        value = str(error) and "0"
    assert abs(float(value)) <= 1e30
    assert time.perf_counter() - start < 1


def test_no_tool_evaluates_text():
    for path in (Path(__file__).parents[3] / "minillm/serving/tools").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path


@pytest.mark.parametrize(
    "value, from_unit, to_unit, result",
    [
        (5, "km", "m", "5000 m"), (1, "mile", "km", "1.609344 km"), (100, "C", "F", "212 F"), (3, "ha", "mu", "45 mu"),
        (0, "K", "C", "-273.15 C"), (2, "h", "min", "120 min"), (1, "lb", "g", "453.59237 g"),
        (36, "km/h", "m/s", "10 m/s"), (-40, "F", "C", "-40 C"),
    ],
)  # fmt: skip
def test_units(value, from_unit, to_unit, result):
    assert convert_units(value, from_unit, to_unit) == result


def test_units_of_different_kinds_are_refused_and_none_is_of_two_kinds():
    for pair in (("km", "kg"), ("C", "m"), ("nowhere", "m")):
        with pytest.raises(ValueError, match=f"cannot convert {pair[0]} into {pair[1]}; units of one kind are m, km"):
            convert_units(1, *pair)
    units = [unit for factors in FACTORS.values() for unit in factors]
    assert len(units) == len(set(units))


def test_clock():
    shown = datetime.strptime(current_time("UTC"), "%Y-%m-%d, %A, %H:%M:%S").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - shown).total_seconds()) < 60
    for name in ("Nowhere/Town", "../../etc/passwd", "", "a" * 9999, "Europe"):
        with pytest.raises(ValueError, match="there is no time zone"):
            current_time(name)


def test_search(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("Ming's number is 4711.\nMing is here\n小明的号码是4711。\nnumber of Ming: ".encode() + b"\xff\n")
    search = search_in(path, name="find")
    assert search.__name__ == "find"
    assert search("ming NUMBER") == "Ming's number is 4711.\nnumber of Ming: \ufffd"
    assert search("小明") == "小明的号码是4711。"
    assert search("(M+)+$") == "nothing found"  # words, no patterns
    path.write_text("a line\n" * 25)
    assert search("line").splitlines() == ["a line"] * 10 + ["(25 lines; the first 10 are shown)"]
    with pytest.raises(ValueError, match="the query is empty"):
        search("  ")
    with pytest.raises(UserError, match="no such file"):
        search_in(tmp_path / "none.txt")
    schema = Toolbox([search]).schemas[0]["function"]
    assert (schema["name"], schema["parameters"]["required"]) == ("find", ["query"])
