"""Running calls: arguments, results, and everything that a tool can do wrong."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm.errors import UserError
from minillm.serving.tools import Toolbox, load_tools
from minillm.serving.tools.toolbox import MAX_HUNG

ROOT = Path(__file__).parents[3]


def call(name, arguments):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "a1b2c3d4e", "type": "function", "function": {"name": name, "arguments": text}}


def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


def say(text: str) -> str:
    """Say."""
    return text


def table() -> dict:
    """Give a table."""
    return {"鸟": [1, None, complex(1, 2)]}


def fail(how: str):
    """Fail."""

    class Silent(Exception):
        def __str__(self):
            raise RuntimeError

    if how == "loop":
        a = []
        a.append(a)
        return a
    errors = {"value": ValueError("bad value"), "exit": SystemExit(3), "silent": Silent(), "ctrl": KeyboardInterrupt()}
    raise errors[how]


def test_results_are_texts():
    toolbox = Toolbox([add, say, table])
    assert [tool["function"]["name"] for tool in toolbox.schemas] == ["add", "say", "table"]
    assert toolbox.run(call("add", {"a": 2})) == "3"
    assert toolbox.run(call("add", {"a": 2, "b": 5})) == "7"
    assert toolbox.run(call("say", {"text": "a\n鸟"})) == "a\n鸟"
    assert toolbox.run(call("table", {})) == '{"鸟": [1, null, "(1+2j)"]}'


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("sub", {}, "there is no function 'sub'; there are add, say, fail"),
        ("add", {}, "arguments lacks 'a'"),
        ("add", {"a": "2"}, "arguments.a is '2'; it must be of type integer"),
        ("add", {"a": 2, "c": 3}, "TypeError: add() got an unexpected keyword argument 'c'"),
        ("add", "{", "the arguments are not JSON"),
        ("add", "[" * 100_000, "the arguments are not JSON"),
        ("add", "[2]", "the arguments must be a JSON object"),
        ("fail", {"how": "value"}, "ValueError: bad value"),
        ("fail", {"how": "exit"}, "SystemExit: 3"),
        ("fail", {"how": "silent"}, "Silent: (no message)"),
        ("fail", {"how": "ctrl"}, "KeyboardInterrupt: "),
        ("fail", {"how": "loop"}, "ValueError: Circular reference detected"),
    ],
)
def test_errors_become_results(name, arguments, message):
    result = Toolbox([add, say, fail]).run(call(name, arguments))
    assert result == f"error: {message}"


def test_a_megabyte_is_cut_and_says_so():
    toolbox = Toolbox([say], max_result_len=1000)
    assert toolbox.run(call("say", {"text": "x" * 1000})) == "x" * 1000
    text = toolbox.run(call("say", {"text": "鸟" * 1_000_001}))
    assert text == "鸟" * 1000 + "\n[cut: 1,000 of 1,000,001 characters]"
    text = toolbox.run(call("say", '{"text": "\\ud800"}'))
    assert text == "?"


def test_a_tool_that_hangs_is_given_up_and_too_many_of_them_refused():
    release = threading.Event()

    def wait(seconds: float) -> str:
        """Wait."""
        release.wait(seconds)
        return "done"

    toolbox = Toolbox([wait, add], timeout=0.02)
    start = time.perf_counter()
    for _ in range(MAX_HUNG):
        assert toolbox.run(call("wait", {"seconds": 60})) == "error: wait did not answer within 0.02 seconds"
    assert time.perf_counter() - start < 5
    refusal = f"error: {MAX_HUNG} earlier calls still run: no new ones until they end"
    assert toolbox.run(call("add", {"a": 1})) == refusal
    release.set()
    for thread in threading.enumerate():
        if thread.name == "tool wait":
            thread.join()
    assert toolbox.run(call("add", {"a": 1})) == "2"


def test_a_program_with_a_hung_tool_goes_on_and_exits(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from minillm.serving.tools import Toolbox\n"
        "def sleep():\n    time.sleep(3600)\n"
        "def spin():\n    while True:\n        pass\n"
        "toolbox = Toolbox([sleep, spin], timeout=0.05)\n"
        "for name in ('sleep', 'spin'):\n"
        "    print(toolbox.run({'function': {'name': name, 'arguments': '{}'}}))\n"
        "print('end')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "error: sleep did not answer within 0.05 seconds",
        "error: spin did not answer within 0.05 seconds",
        "end",
    ]


def test_a_tool_may_bring_its_own_schema():
    def anything(**values):
        return values

    anything.schema = {"name": "any", "parameters": {"properties": {"n": {"type": "integer", "maximum": 9}}}}
    toolbox = Toolbox([anything])
    assert toolbox.schemas == [anything.schema]
    assert toolbox.run(call("any", {"n": 3, "m": 4})) == '{"n": 3, "m": 4}'
    assert toolbox.run(call("any", {"n": 10})) == "error: arguments.n is 10; it must be at most 9"
    anything.schema = {"name": "any", "parameters": {"pattern": "a"}}
    with pytest.raises(UserError, match="the parameters of the tool any: the keyword 'pattern' cannot be checked"):
        Toolbox([anything])


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"timeout": float("nan")}, {"max_result_len": 0}])
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(UserError, match=next(iter(limits))):
        Toolbox([add], **limits)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(UserError, match="two tools have the name 'add'"):
        Toolbox([add, add])


def test_tools_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def double(n: int) -> int:\n    '''Double.'''\n    return 2 * n\n")
    toolbox = load_tools(path, timeout=3, max_result_len=2)
    assert toolbox.timeout == 3
    assert toolbox.run(call("double", {"n": 21})) == "42"
