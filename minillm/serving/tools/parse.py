"""Finds the calls of functions in a model's answer, also while the answer is still being generated.

The forms, each with the models that write it; white space may stand between all parts:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>            ours, Qwen, Hermes
    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                  Mistral
    [TOOL_CALLS]NAME[ARGS]{…}                                       newer Mistral models
    {"name": …, "parameters": {…}}; {…}                             Llama 3, also after <|python_tag|>

The last form, and Mistral's list, are also found without a token before them, because decoding drops special tokens;
but only where the answer begins, and only for functions that were declared. A call within ``<think>…</think>`` is a
thought. Whatever is not a complete call stays text, character by character.

Every character is read once. A scanner finds where a JSON value ends, or the first character that cannot belong to
JSON; text up to there is then content, and the search for calls goes on behind it.
"""

import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import NamedTuple

from minillm.inference.text import n_matched

MAX_DEPTH = 64  # of nested JSON values
MAX_HEADER_LEN = 200  # characters between [TOOL_CALLS] and the arguments
CHUNK = 1024  # characters that parse_tool_calls reads at once, so that its time grows only with the length

_ID_CHARACTERS = string.ascii_letters + string.digits
_OUTSIDE_STRINGS = frozenset(' \t\n\r{}[]:,"+-.0123456789E' + "truefalsenull")


class _Form(NamedTuple):
    """How a call is written. In all patterns, white space may come first."""

    header: re.Pattern  # between the token and the JSON value
    header_start: re.Pattern  # matches every text that can still become a header
    tail: re.Pattern  # after the value
    tail_start: re.Pattern  # matches every text that can still become a tail
    repeats: bool = False  # whether another value follows the tail


_NO_HEADER = (re.compile(r"\s*(?=[\[{])"), re.compile(r"\s*"))
_OBJECT = (re.compile(r"\s*(?=\{)"), re.compile(r"\s*"))
_NO_TAIL = (re.compile(""), re.compile("(?!)"))
_SEMICOLON = (re.compile(r"\s*;\s*(?=\{)"), re.compile(r"\s*;?\s*"))
_NAME_AND_ARGS = (
    re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]\s*)?(?=[\[{])"),
    re.compile(r"\s*[\w.-]*(?:\[[\w\[\]]*)?\s*"),
)
_JSON_BEGINNING = re.compile(r"\s*(?:\[\s*)?(?P<brace>\{|\Z)")
_CLOSING_TAG = "</tool_call>"
_CLOSED = (
    re.compile(rf"\s*{_CLOSING_TAG}"),
    re.compile(r"\s*(?:" + "|".join(re.escape(_CLOSING_TAG[:n]) for n in range(len(_CLOSING_TAG))) + ")"),
)
_BARE = _Form(*_NO_HEADER, *_SEMICOLON, repeats=True)
_FORMS = {
    "<tool_call>": _Form(*_OBJECT, *_CLOSED),
    "[TOOL_CALLS]": _Form(*_NAME_AND_ARGS, *_NO_TAIL),
    "<|python_tag|>": _BARE,
}
_THINK, _END_OF_THINKING = "<think>", "</think>"
_OPENINGS = (*_FORMS, _THINK)


def parse_tool_calls(text: str, *, tools: Sequence[dict] | None = None) -> tuple[str, list[dict]]:
    """Return the content of an answer without its calls, and the calls in OpenAI's form.

    A call is ``{"id", "type": "function", "function": {"name", "arguments"}}`` with the arguments as JSON *text*. Ids
    are new: nine letters and digits, because Mistral's templates accept nothing else. White space around calls is left
    out; one newline separates content before and after them.

    Args:
        tools: the declared functions, in OpenAI's form. Without a token before it, JSON is a call only if it names one
            of them (None: any name).
    """
    parser = ToolCallParser(tools=tools)
    pieces = [parser.push(text[start : start + CHUNK]) for start in range(0, len(text), CHUNK)]
    pieces.append(parser.finish())
    return "".join(content for content, _ in pieces), [call for _, calls in pieces for call in calls]


class ToolCallParser:
    """Separates content and calls of an answer that arrives in pieces.

    The joined results of ``push`` and ``finish`` do not depend on how the answer is cut; they are those of
    ``parse_tool_calls``. An end that may be the beginning of a call is held back. So is an answer that begins as JSON,
    until its first value is complete.

    Args:
        tools: as for ``parse_tool_calls``.
    """

    def __init__(self, *, tools: Sequence[dict] | None = None):
        self._names = None if tools is None else {(tool.get("function") or tool)["name"] for tool in tools}
        self._pending = ""  # what was not decided yet
        self._read = self._read_text  # what reads it: returns False if it needs more
        self._is_start = True  # no content but thoughts so far
        self._has_content = self._follows_call = False
        self._space = ""  # white space that is content only if more content follows directly
        self._opening, self._form, self._must_be_declared = "", _BARE, False
        self._scanner = _JsonScanner()
        self._content: list[str] = []
        self._calls: list[dict] = []

    def push(self, piece: str) -> tuple[str, list[dict]]:
        """Return the content and the calls that are certain now."""
        self._pending += piece
        return self._advance(at_end=False)

    def finish(self) -> tuple[str, list[dict]]:
        """Return what was held back; call it when no more text follows."""
        content, calls = self._advance(at_end=True)
        return content + ("" if self._follows_call else self._space), calls

    def _advance(self, *, at_end: bool) -> tuple[str, list[dict]]:
        while self._read(at_end):
            pass
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return content, calls

    # ---- readers: each uses up some of the pending text, and says which reader comes next ----------------

    def _read_text(self, at_end: bool) -> bool:
        text = self._pending
        beginning = _JSON_BEGINNING.match(text) if self._is_start else None
        if beginning and beginning["brace"]:
            return self._open("", _BARE, must_be_declared=True)
        if beginning and not at_end:  # only white space, or a bracket
            return False
        positions = {text.find(opening): opening for opening in _OPENINGS if opening in text}
        if positions:
            start = min(positions)
            self._say(text[:start])
            opening = positions[start]
            self._pending = text[start + len(opening) :]
            if opening == _THINK:
                self._say(opening, is_thought=True)
                self._read = self._read_thoughts
                return True
            return self._open(opening, _FORMS[opening], must_be_declared=False)
        n_held = 0 if at_end else max(n_matched(text, opening) for opening in _OPENINGS)
        self._say(text[: len(text) - n_held])
        self._pending = text[len(text) - n_held :]
        return False

    def _open(self, opening: str, form: _Form, *, must_be_declared: bool) -> bool:
        self._opening, self._form, self._must_be_declared = opening, form, must_be_declared
        self._scanner, self._read = _JsonScanner(), self._read_call
        return True

    def _read_thoughts(self, at_end: bool) -> bool:
        text = self._pending
        end = text.find(_END_OF_THINKING)
        n_held = 0 if at_end or end >= 0 else n_matched(text, _END_OF_THINKING)
        n_thoughts = end + len(_END_OF_THINKING) if end >= 0 else len(text) - n_held
        self._say(text[:n_thoughts], is_thought=True)
        self._pending = text[n_thoughts:]
        if end >= 0:
            self._read = self._read_text
        return end >= 0

    def _read_call(self, at_end: bool) -> bool:
        text, scanner = self._pending, self._scanner
        header = self._form.header.match(text)
        if header is None or header.end() > MAX_HEADER_LEN:
            may_come = header is None and len(text) <= MAX_HEADER_LEN and self._form.header_start.fullmatch(text)
            return False if may_come and not at_end else self._give_up(0)
        scanner.read(text, header.end())
        if not (scanner.is_complete or scanner.is_broken or at_end):
            return False
        value = text[header.end() : scanner.position]
        calls = _calls(value, header.groupdict().get("name")) if scanner.is_complete else []
        names = {call["function"]["name"] for call in calls}
        if not names or (self._must_be_declared and self._names is not None and not names <= self._names):
            return self._give_up(scanner.position)
        self._calls += calls
        self._follows_call, self._space = True, "\n" if self._has_content else ""
        self._pending, self._read = text[scanner.position :], self._read_tail
        return True

    def _give_up(self, n_read: int) -> bool:
        """What was read is no call: it is content, and the rest is read as text."""
        read, self._pending = self._pending[:n_read], self._pending[n_read:]
        self._say(self._opening + read)
        self._read = self._read_text
        return True

    def _read_tail(self, at_end: bool) -> bool:
        tail = self._form.tail.match(self._pending)
        if tail is None and not at_end and self._form.tail_start.fullmatch(self._pending):
            return False
        self._pending = self._pending[tail.end() :] if tail else self._pending
        self._is_start = False
        if tail and self._form.repeats:
            return self._open(tail[0], self._form, must_be_declared=self._must_be_declared)
        self._read = self._read_text
        return True

    def _say(self, text: str, *, is_thought: bool = False) -> None:
        """Add content; white space at its end waits, because it is left out before a call."""
        if self._follows_call:
            text = text.lstrip()
        if not text:
            return
        text = self._space + text
        content = text.rstrip()
        self._space = text[len(content) :]
        if content:
            self._content.append(content)
            self._follows_call, self._has_content = False, True
            self._is_start = self._is_start and is_thought


class _JsonScanner:
    """Finds the end of a JSON object or array in a growing text, and reads every character once.

    Attributes:
        position: up to where the text was read: the end of the value, or the first character that is not JSON.
    """

    def __init__(self):
        self.position = 0
        self.is_complete = self.is_broken = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def read(self, text: str, start: int) -> None:
        """Read on in ``text``, whose value begins at ``start``."""
        self.position = max(self.position, start)
        while self.position < len(text) and not self.is_complete:
            character = text[self.position]
            self.is_broken = self._breaks(character)
            if self.is_broken:
                return
            self.position += 1
            if self._in_string:
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                self.is_complete = self._depth == 0

    def _breaks(self, character: str) -> bool:
        if self._in_string:
            return character < " "  # JSON writes control characters as escapes
        return character not in _OUTSIDE_STRINGS or (character in "{[" and self._depth == MAX_DEPTH)


def _calls(value: str, name: str | None) -> list[dict]:
    """Return the calls that a JSON value describes; none if anything in it is not a call.

    ``name`` is the function's, if the value has only its arguments.
    """
    try:
        parsed = json.loads(value)
        if name is not None:
            return [_call(name, parsed)]
        items = parsed if isinstance(parsed, list) else [parsed]
        return [_call(*_name_and_arguments(item)) for item in items]
    except (ValueError, TypeError, AttributeError, KeyError):
        return []


def _name_and_arguments(item: dict) -> tuple[str, dict]:
    item = item.get("function") or item
    return item["name"], item["arguments"] if "arguments" in item else item["parameters"]


def _call(name: str, arguments) -> dict:
    """Return a call in OpenAI's form; ValueError if it is none."""
    if isinstance(arguments, str):  # JSON within JSON
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    (function["name"] + function["arguments"]).encode()  # ValueError: a lone surrogate cannot be sent
    return {"id": _new_id(), "type": "function", "function": function}


def _new_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
