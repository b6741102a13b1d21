"""A toolbox runs the calls of a model. Whatever goes wrong becomes the result that the model reads.

Each call runs in a thread of its own. A thread starts at once and shares the program's state, so any function can be a
tool, also one that holds an open file or a connection. A child process could be killed when it hangs; but it would have
to import the program again for every call, or be forked from a program with threads, which may deadlock. The price: a
function that hangs is left behind. Its thread is a daemon, so the program goes on and can exit, and a toolbox refuses
new calls while ``MAX_HUNG`` of them are left. A tool that needs to be killed can start a process itself.
"""

import json
import threading
from collections.abc import Callable, Sequence

from minillm.errors import UserError
from minillm.serving.tools.functions import check_tool_schema, load_functions, tool_schema
from minillm.serving.tools.json_schema import check_value

MAX_HUNG = 8


class Toolbox:
    """Functions that a model may call.

    Args:
        functions: with types and docstrings, see ``tool_schema``. A function with an attribute ``schema`` is described
            by that instead: a tool in OpenAI's form.
        timeout: seconds that a call may take.
        max_result_len: characters of a result; longer ones are cut, and say so.

    Attributes:
        schemas: the functions in OpenAI's form, for the chat template.

    Raises:
        UserError: a function that cannot be described; two of one name; a limit out of range.
    """

    def __init__(self, functions: Sequence[Callable], *, timeout: float = 10.0, max_result_len: int = 4000):
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise UserError(f"timeout {timeout}: must be above 0 seconds")
        if max_result_len < 1:
            raise UserError(f"max_result_len {max_result_len}: must be at least 1 character")
        self.timeout, self.max_result_len = timeout, max_result_len
        self.schemas = [getattr(function, "schema", None) or tool_schema(function) for function in functions]
        self._functions: dict[str, tuple[Callable, dict]] = {}
        for function, schema in zip(functions, self.schemas, strict=True):
            check_tool_schema(schema)
            described = schema.get("function") or schema
            if described["name"] in self._functions:
                raise UserError(f"two tools have the name {described['name']!r}: rename one of them")
            self._functions[described["name"]] = (function, described.get("parameters", {}))
        self._threads: list[threading.Thread] = []  # of calls that took too long

    def run(self, call: dict) -> str:
        """Return the result of a call in OpenAI's form as text; of one that fails ``error: `` and the reason.

        The arguments are checked first. Texts stay as they are, other results are written as JSON.
        """
        try:
            text = self._run(call["function"]["name"], call["function"]["arguments"])
        except UserError as error:
            text = f"error: {error}"
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
        if len(text) <= self.max_result_len:
            return text
        return f"{text[: self.max_result_len]}\n[cut: {self.max_result_len:,} of {len(text):,} characters]"

    def _run(self, name: str, arguments: str) -> str:
        if name not in self._functions:
            raise UserError(f"there is no function {name!r}; there are {', '.join(self._functions) or 'none'}")
        function, schema = self._functions[name]
        try:
            values = json.loads(arguments)
        except (ValueError, TypeError, RecursionError):
            raise UserError("the arguments are not JSON") from None
        if not isinstance(values, dict):
            raise UserError("the arguments must be a JSON object")
        check_value(values, schema)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MAX_HUNG:
            raise UserError(f"{len(self._threads)} earlier calls still run: no new ones until they end")
        return self._in_thread(name, lambda: _as_text(function(**values)))

    def _in_thread(self, name: str, run: Callable[[], str]) -> str:
        outcome: list[str | BaseException] = []

        def target() -> None:
            try:
                outcome.append(run())
            except BaseException as error:  # also SystemExit: a tool must not end the program
                outcome.append(error)

        thread = threading.Thread(target=target, name=f"tool {name}", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            self._threads.append(thread)
            raise UserError(f"{name} did not answer within {self.timeout:g} seconds")
        (result,) = outcome
        if isinstance(result, BaseException):
            raise UserError(f"{type(result).__name__}: {_message(result)}")
        return result


def load_tools(path: str, **limits) -> Toolbox:
    """Return the tools of a Python file (``--tools``); ``limits`` are those of ``Toolbox``.

    Raises:
        UserError: as ``load_functions`` and ``Toolbox``.
    """
    return Toolbox(load_functions(path), **limits)


def _as_text(result) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the error may be of any class
        return "(no message)"
