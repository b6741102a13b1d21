"""Encodes conversations with a model's own chat template, and proves which tokens are the answers.

The template renders the text, and the ids are those of transformers' ``apply_chat_template``. But a template does not
tell where an answer is in its text. To find it, the conversation is rendered a second time with an invisible mark
(shown as ⁰ and ¹) after the content of each message, and so is the prompt before each answer:

    full rendering     <|user|>\\nHi⁰<|end|>\\n<|assistant|>\\nHello!¹<|end|>\\n
    prompt             <|user|>\\nHi⁰<|end|>\\n<|assistant|>\\n
    after mark 0               <|end|>\\n<|assistant|>\\n                      the same in both; then the answer begins
    targets                                         Hello! <|end|>          up to the end token after mark 1

The proof has five parts. Without its marks the second rendering equals the first one. It contains every message. After
the message before the answer, the prompt and the full rendering agree. The answer holds the words of its
message unchanged. It ends with one of the model's end tokens, before the next message begins. If one of these fails,
the conversation is refused with the reason.

Some templates end an earlier answer with another token than the last one (gpt-oss: ``<|end|>`` and ``<|return|>``). If
the model's end token stands there when the conversation ends with that answer, its text is a target and the other token
is not: a model that wrote it would not stop.

Where an answer begins:
- If the prompt already contains the beginning of the answer (such as an empty think block), that part is not a target.
- If the full rendering begins the answer differently from the prompt (a template that drops older thoughts, or an
  answer with thoughts while the prompt has an empty block), the answer begins after the header.
- A token with characters of both header and answer belongs to the answer, because the model must generate it. A control
  token of the header does not, even if it includes the white space after it.

The ids of a prompt are the beginning of those in training. A tokenizer may cut white space by what follows it: GPT-2's
expression makes one token of ``\\n\\n`` at the end of a text, and two before a letter. So a prompt that ends with white
space is encoded with a word after it, and cut where it ends. (transformers encodes it alone.)

Text in a message that looks like a control token stays text. For the template such text is broken up by another
invisible character; for the tokenizer the real control tokens are written as private characters instead.
"""

import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property, lru_cache

import tokenizers

from minillm.errors import UserError
from minillm.tokenizer.base import CONTROL_TOKENS, TAG_TOKENS, Tokenizer, bad_text
from minillm.tokenizer.chat_format import ANSWER, ChatFormat, chat_format, split_opening

# Characters of Unicode's last private plane: the first mark, the first name of a control token, and the character that
# breaks up text which looks like a control token.
MARKS, NAMES, BREAKER = 0x100000, 0x108000, "\U0010fffd"
MAX_MARKS = NAMES - MARKS
NEXT_WORD = ANSWER[0]["content"]  # after the white space at the end of a prompt
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
_MARK = re.compile("[\U00100000-\U00107fff]")

Span = tuple[int, int]


def encode_rendered(
    tokenizer: Tokenizer,
    conversations: list[list[dict]],
    *,
    tools: list[list[dict] | None],
    train_on: str,
    add_generation_prompt: bool,
) -> list[tuple[list[int], list[int]]]:
    """Return ``encode_chats`` for a tokenizer with a foreign template; messages and tools are already checked.

    With ``add_generation_prompt`` all masks are 0.

    Raises:
        UserError: the template does not accept a conversation, or the position of an answer cannot be proven.
    """
    renderer = _renderer(tokenizer)
    texts = []
    for messages, declared_tools in zip(conversations, tools, strict=True):
        if add_generation_prompt:
            texts.append(renderer.prompt(messages, declared_tools))
        else:
            texts.append(renderer.conversation(messages, declared_tools, train_on))
    return renderer.encode(texts)


class _Text:
    """A rendered conversation as the tokenizer receives it, and the ranges of characters that are targets.

    Args:
        text: with marks and breakers; ``self.text`` is without them.
        spans: the ranges of the answers in ``text``; ``self.spans`` are the ranges in ``self.text``.
        names: the private character for each control token; None: control tokens stay unchanged.
        tail: a control token after the text, which is a target.
        is_prompt: whether an answer follows the text.
    """

    def __init__(
        self, text: str, spans: list[Span], names: dict[str, str] | None, *, tail: str = "", is_prompt: bool = False
    ):
        self.is_guarded, self.tail, self.is_prompt = names is not None, tail, is_prompt
        replacements = [(match.start(), match.end(), "") for match in _PRIVATE.finditer(text)]
        if names is not None:
            replacements += [(match.start(), match.end(), names[match[0]]) for match in _pattern(names).finditer(text)]
        # From replaced_ends[i] on, characters move by shifts[i].
        parts, replaced_ends, shifts = [], [0], [0]
        for start, end, new in sorted(replacements):
            parts += [text[replaced_ends[-1] : start], new]
            shifts.append(shifts[-1] + len(new) - (end - start))
            replaced_ends.append(end)
        self.text = "".join([*parts, text[replaced_ends[-1] :]])
        self.spans = [
            tuple(position + shifts[bisect_right(replaced_ends, position) - 1] for position in span) for span in spans
        ]


class _Renderer:
    """Renders and encodes the conversations of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, style: ChatFormat):
        self.tokenizer, self.style, self.template = tokenizer, style, style.template
        unused = {"post_processor": None, "truncation": None, "padding": None}
        spec = json.loads(tokenizer.files["tokenizer.json"]) | unused
        self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        added = {token["content"]: token.get("special", False) for token in spec.get("added_tokens", ())}
        self._ends = [token for token in added if tokenizer.token_id(token) in tokenizer.end_ids]
        self._end = _pattern(self._ends)
        # Control tokens are the special ones, and others that the template itself writes.
        known_tokens = {*CONTROL_TOKENS, *TAG_TOKENS, *self._ends}
        template_tokens = {token for token in added if token.strip() and token in self.template.source}
        control = [
            token for token, special in added.items() if special or token in known_tokens or token in template_tokens
        ]
        self._names = {token: chr(NAMES + index) for index, token in enumerate(control)}
        self._spec = spec
        self._added_ids = {token["id"] for token in spec.get("added_tokens", ())}
        self._has_warned = False
        # Which control tokens stay text in an answer (an assistant may write tags and the like), and elsewhere.
        text_in_answers = [
            token for token in control if token not in TAG_TOKENS and (added[token] or token in known_tokens)
        ]
        self._in_answers = _pattern(text_in_answers)
        self._elsewhere = _pattern(control)

    # ---- texts -----------------------------------------------------------------------------------

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> _Text:
        """Return the text of a conversation that waits for an answer; it has no targets."""
        messages = self._with_arguments(messages)
        plain = self.template.render(messages, tools=tools, add_generation_prompt=True)
        self._check_tools(messages, tools, plain, add_generation_prompt=True)
        broken, broken_tools = self._break_control_texts(messages), self._break_tools(tools)
        if broken == messages and broken_tools == tools:
            return _Text(plain, [], None, is_prompt=True)
        text = self.template.render(broken, tools=broken_tools, add_generation_prompt=True)
        self._check_same(text, plain)
        return _Text(text, [], self._names, is_prompt=True)

    def conversation(self, messages: list[dict], tools: list[dict] | None, train_on: str) -> _Text:
        """Return the text of a conversation with its answers; the module's docstring explains the proof."""
        messages = self._with_arguments(messages)
        plain = self.template.render(messages, tools=tools)
        self._check_tools(messages, tools, plain, add_generation_prompt=False)
        broken, broken_tools = self._break_control_texts(messages), self._break_tools(tools)
        has_broken = broken != messages or broken_tools != tools
        marked, tools = [self._mark(index, message) for index, message in enumerate(broken)], broken_tools
        text = self.template.render(marked, tools=tools)
        if _PRIVATE.sub("", text) != plain:  # some templates test the end of a content, or whether it is empty
            marked = broken
            text = self.template.render(broken, tools=tools) if has_broken else plain
        self._check_same(text, plain)
        marks = self._mark_positions(marked, text)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans, tail = [], ""
        for index in answers if train_on == "all" else answers[-1:]:
            start = self._answer_start(index, marked, tools, text, marks)
            end = self._answer_end(index, marked, tools, text, marks, start)
            if end is None:
                end, tail = len(text), self._closing_token(marked, tools, text, max(start, marks.get(index, 0)))
            inner = [other for other, place in marks.items() if other != index and start <= place < end]
            if inner:  # such as a tool's result before the words that came with the call
                raise UserError(f"the chat template writes message {inner[0]} inside the answer in message {index}")
            self._check_complete(index, messages, text[start:end], marks)
            if spans and start <= spans[-1][1]:
                raise UserError(
                    f"the answer in message {index} and the answer before it are not separate in the chat template's "
                    "text"
                )
            spans.append((start, end))
        return _Text(text, spans, self._names if has_broken else None, tail=tail)

    def _with_arguments(self, messages: list[dict]) -> list[dict]:
        """Return the messages with the arguments of tool calls in the form that the template takes."""
        if self.style.arguments == "any" or not any(message.get("tool_calls") for message in messages):
            return messages
        return [
            message | {"tool_calls": [self._with_form(index, call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for index, message in enumerate(messages)
        ]

    def _with_form(self, index: int, call: dict) -> dict:
        if call.get("function"):
            return call | {"function": self._with_form(index, call["function"])}
        arguments = call["arguments"]
        if self.style.arguments == "text" and not isinstance(arguments, str):
            return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        if self.style.arguments == "object" and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                raise UserError(
                    f"the arguments of a tool call of message {index} are not a JSON object, which the chat template "
                    f"needs: {call['arguments']!r}"
                )
            return call | {"arguments": arguments}
        return call

    def _check_tools(self, messages: list[dict], tools: list[dict] | None, plain: str, **options) -> None:
        """Raise UserError if the template does not write the declared tools."""
        if tools and self.template.render(messages, **options) == plain:
            raise UserError(
                "the chat template does not write tools: use a template that does, or write them into the system "
                "message and remove the key tools"
            )

    def _break_tools(self, tools: list[dict] | None) -> list[dict] | None:
        _check_not_private("tools", tools)
        return _break(tools, self._elsewhere)

    def _break_control_texts(self, messages: list[dict]) -> list[dict]:
        """Return the messages with all text that looks like a control token broken up."""
        broken = []
        for index, message in enumerate(messages):
            _check_not_private(f"message {index}", message)
            pattern = self._in_answers if message["role"] == "assistant" else self._elsewhere
            broken.append({key: _break(value, pattern) for key, value in message.items()} | {"role": message["role"]})
        if len(messages) > MAX_MARKS:
            raise UserError(f"the conversation has {len(messages)} messages; at most {MAX_MARKS} are supported")
        return broken

    def _mark(self, index: int, message: dict) -> dict:
        """Return the message with its mark after its content, before the white space at the end."""
        content = message.get("content") or ""
        stripped = content.rstrip()
        if not stripped:
            return message
        return message | {"content": stripped + chr(MARKS + index) + content[len(stripped) :]}

    def _check_same(self, text: str, plain: str) -> None:
        if _PRIVATE.sub("", text) != plain:
            raise UserError(
                "a message holds the text of a control token, and the chat template treats it specially: remove that "
                "text"
            )

    # ---- the proof -------------------------------------------------------------------------------

    def _mark_positions(self, marked: list[dict], text: str) -> dict[int, int]:
        """Return the position of each message's mark in the text; UserError unless the text has every message once."""
        positions: dict[int, int] = {}
        for match in _MARK.finditer(text):
            index = ord(match[0]) - MARKS
            if index in positions:
                raise UserError(f"the chat template writes message {index} more than once")
            positions[index] = match.start()
        for index, message in enumerate(marked):
            content = (message.get("content") or "").strip()
            if _MARK.search(content):
                is_missing = index not in positions
            else:
                is_missing = message["role"] != "assistant" and content not in text
            if is_missing:
                raise UserError(
                    f"the chat template leaves out message {index} ({message['role']}): remove it, or use a template "
                    "that writes it"
                )
        return positions

    def _answer_start(
        self, index: int, marked: list[dict], tools: list[dict] | None, text: str, marks: dict[int, int]
    ) -> int:
        """Return the position in the text where answer ``index`` begins: where the prompt before it ends."""
        if index == 0:
            header_start = text.find(self.style.header) if self.style.header.strip() else -1
            if header_start < 0:
                raise UserError("the conversation begins with an answer, and the chat template has no header for it")
            start = header_start + len(self.style.header)
            return start + len(self.style.opens_with) * text.startswith(self.style.opens_with, start)
        prompt = self.template.render(marked[:index], tools=tools, add_generation_prompt=True)
        # Compare the prompt and the text after the last mark before the answer, or without one from the beginning.
        prompt_end, position = prompt, 0
        last_marked = max((other for other in marks if other < index), default=None)
        if last_marked is not None:
            _, mark, prompt_end = prompt.partition(chr(MARKS + last_marked))
            position = marks[last_marked] + 1
            if not mark:
                raise UserError(f"the chat template leaves out message {last_marked} when an answer follows it")
        if text.startswith(prompt_end, position):
            return position + len(prompt_end)
        # The prompt may open the answer's thinking, and the text not; then the answer begins after the header.
        after_marks = max((match.end() for match in _MARK.finditer(prompt_end)), default=0)
        header, opening = split_opening(prompt_end[after_marks:])
        header = prompt_end[:after_marks] + header
        if not (opening and text.startswith(header, position)):
            raise UserError(
                f"the chat template begins the answer in message {index} differently in the whole conversation and in "
                "the prompt, so its position cannot be proven"
            )
        return position + len(header)

    def _answer_end(
        self,
        index: int,
        marked: list[dict],
        tools: list[dict] | None,
        text: str,
        marks: dict[int, int],
        start: int,
    ) -> int | None:
        """Return where answer ``index`` ends, after its end token; None if it is the last and has no end token.

        An earlier answer with another end than a last one ends before that token.
        """
        content_end = marks.get(index, start)
        if content_end < start:
            raise UserError(f"the chat template writes content of message {index} before the answer begins")
        later_marks = [position for other, position in marks.items() if other > index and position > content_end]
        limit = min(later_marks, default=len(text))
        match = self._end.search(text, content_end, limit)
        if match is not None:
            return match.end()
        if index == len(marked) - 1:
            return None
        other_end = len(text) - len(text[content_end + 1 :].lstrip())
        if index in marks and self._elsewhere.match(text, other_end):
            as_last = self.template.render(marked[: index + 1], tools=tools)
            if self._end.match(as_last.partition(chr(MARKS + index))[2].lstrip()):
                return other_end
        raise UserError(self._no_end(index, text[content_end:limit]))

    def _closing_token(self, marked: list[dict], tools: list[dict] | None, text: str, content_end: int) -> str:
        """Return the end token of a last answer, for templates that write it only when another message follows.

        Args:
            text: the rendered conversation.
            content_end: where the content of the answer ends in it.
        """
        index = len(marked) - 1
        no_end = UserError(self._no_end(index, text[content_end:]))
        mark = chr(MARKS + index)
        role = "tool" if marked[-1].get("tool_calls") else "user"
        try:
            longer_text = self.template.render([*marked, {"role": role, "content": "question"}], tools=tools)
        except UserError:
            raise no_end from None
        if longer_text.startswith(text):
            after_answer = longer_text.removeprefix(text)
        else:  # some templates drop thoughts of earlier answers
            content = (marked[-1].get("content") or "").rstrip()
            _, separator, after_answer = longer_text.rpartition(mark if mark in longer_text else content or mark)
            if not separator:
                raise no_end
        match = self._end.match(after_answer.lstrip())
        if match is None:
            raise no_end
        return match[0]

    def _no_end(self, index: int, after: str) -> str:
        """Return the message for an answer without an end token; ``after`` is the text after its content."""
        after = _PRIVATE.sub("", after).strip()[:20]
        return (
            f"the chat template ends the answer in message {index} "
            + (f"with {after!r}, and no end token of the model" if after else "with no end token")
            + f" ({', '.join(self._ends)}): name the token in eos_token_id of generation_config.json next to the "
            "tokenizer, or correct the template"
        )

    def _check_complete(self, index: int, messages: list[dict], answer: str, marks: dict[int, int]) -> None:
        """Raise UserError if the template drops parts of an answer, except for older thoughts, which many drop."""
        message = messages[index]
        text = _PRIVATE.sub("", answer)
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        before_tag, end_tag, after_thinking = content.rpartition("</think>")
        if after_thinking.strip() not in text:
            raise UserError(f"the chat template changes the content of message {index}")
        for call in message.get("tool_calls") or ():
            call, written = call.get("function") or call, self._elsewhere.sub("", text)
            keys = call["arguments"] if isinstance(call["arguments"], dict) else ()
            if call["name"] not in written or not all(_json_or_plain(key, written) for key in keys):
                raise UserError(
                    f"the chat template leaves out tool_calls of message {index}: write the call into the content"
                )
        if any(other["role"] == "user" for other in messages[index:]):
            return
        thinking = reasoning
        if end_tag and not reasoning:
            thinking = before_tag.partition("<think>")[2]
        if thinking.strip() not in text:
            part = "reasoning_content" if reasoning else "the thinking in the content"
            advice = "write it into the content as <think>…</think>, " if reasoning else ""
            raise UserError(
                f"the chat template leaves out {part} of message {index}: {advice}remove it, or use a template that "
                "writes it"
            )

    # ---- ids -------------------------------------------------------------------------------------

    def encode(self, texts: list[_Text]) -> list[tuple[list[int], list[int]]]:
        """Return ids and mask of each text."""
        encodings: dict[int, tokenizers.Encoding] = {}
        for is_guarded in (False, True):
            indices = [index for index, text in enumerate(texts) if text.is_guarded == is_guarded]
            encoder = self._encoder(is_guarded and bool(indices))
            to_encode = [_with_next_word(texts[i].text) if texts[i].is_prompt else texts[i].text for i in indices]
            try:
                batch = encoder.encode_batch(to_encode, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                for index in indices:
                    if not _is_utf8(texts[index].text):
                        raise bad_text(texts[index].text) from None
                raise
            encodings |= zip(indices, batch, strict=True)
        return [self._with_mask(text, encodings[index]) for index, text in enumerate(texts)]

    def _encoder(self, is_guarded: bool) -> tokenizers.Tokenizer:
        return self._guarded if is_guarded else self._full

    def _with_mask(self, text: _Text, encoding: tokenizers.Encoding) -> tuple[list[int], list[int]]:
        if text.is_prompt:
            ids = self._prompt_ids(text.text, encoding, is_guarded=text.is_guarded)
            return ids, [0] * len(ids)
        ids, mask = encoding.ids, [0] * len(encoding.ids)
        seams = {start for start, _ in text.spans if text.text[max(0, start - 1) : start + 1].isspace()}
        if text.spans:
            spans = iter(text.spans)
            span_start, span_end = next(spans)
            for index, (start, end) in enumerate(encoding.offsets):
                while start >= span_end:
                    span_start, span_end = next(spans, (len(text.text) + 1, len(text.text) + 1))
                mask[index] = int(end > span_start and (start >= span_start or ids[index] not in self._added_ids))
                if mask[index] and start < span_start:
                    seams.add(span_start)
        for seam in sorted(seams):
            self._check_seam(text, encoding, seam)
        if text.tail:
            ids, mask = [*ids, self.tokenizer.token_id(text.tail)], [*mask, 1]
        if mask:
            mask[0] = 0  # no token before it could predict it
        return ids, mask

    # ---- where a prompt ends and the answer begins -----------------------------------------------

    def _prompt_ids(self, prompt: str, encoding: tokenizers.Encoding, *, is_guarded: bool) -> list[int]:
        """Return the ids of ``prompt``, given the encoding of it ``_with_next_word``."""
        n = _n_tokens_before(len(prompt), encoding)
        if n == len(encoding.ids) or encoding.offsets[n][0] >= len(prompt):
            return encoding.ids[:n]
        # The word and the white space before it share a token, so the prompt has no ids that every answer continues.
        ids = self._encoder(is_guarded).encode(prompt, add_special_tokens=False).ids
        self._warn_of_seam(in_training=encoding.ids[n : n + 1], in_prompt=ids[n:])
        return ids

    def _check_seam(self, text: _Text, encoding: tokenizers.Encoding, start: int) -> None:
        """Warn if the ids before the answer that begins at character ``start`` are not those of its prompt."""
        if self._has_warned:
            return
        prompt, is_guarded = text.text[:start], text.is_guarded
        with_word = self._encoder(is_guarded).encode(_with_next_word(prompt), add_special_tokens=False)
        prompt_ids = self._prompt_ids(prompt, with_word, is_guarded=is_guarded)
        pairs = enumerate(zip(prompt_ids, encoding.ids, strict=False))
        n_equal = next((n for n, (in_prompt, in_training) in pairs if in_prompt != in_training), len(prompt_ids))
        if n_equal < len(prompt_ids):
            n_before = _n_tokens_before(start, encoding)
            self._warn_of_seam(in_training=encoding.ids[n_equal : n_before + 1], in_prompt=prompt_ids[n_equal:])

    def _warn_of_seam(self, *, in_training: list[int], in_prompt: list[int]) -> None:
        """Warn of tokens that differ between training and prompts, once for each tokenizer."""
        if self._has_warned:
            return
        self._has_warned = True
        trained, asked = (" ".join(repr(self.tokenizer.decode([i])) for i in ids) for ids in (in_training, in_prompt))
        warnings.warn(
            f"{self.tokenizer.origin}: where an answer begins, training has {trained}, and a prompt ends with {asked}; "
            "the model has not learned to answer such a prompt: let answers begin as prompts end, without white space "
            "and with the thinking that a prompt opens",
            stacklevel=2,
        )

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer with private names for its control tokens; their usual names are then ordinary text."""
        spec = json.loads(json.dumps(self._spec))
        names, model = self._names, spec["model"]
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _with_next_word(prompt: str) -> str:
    """Return a prompt that ends with white space with a word after it; any other prompt unchanged."""
    return prompt + NEXT_WORD if prompt[-1:].isspace() else prompt


def _n_tokens_before(position: int, encoding: tokenizers.Encoding) -> int:
    """Return how many tokens end at or before a character."""
    return next((n for n, (_, end) in enumerate(encoding.offsets) if end > position), len(encoding.ids))


@lru_cache(maxsize=16)
def _renderer(tokenizer: Tokenizer) -> _Renderer:
    return _Renderer(tokenizer, chat_format(tokenizer))


def _pattern(tokens: Iterable[str]) -> re.Pattern:
    """Return the pattern that matches any of the tokens, the longest first; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _check_not_private(name: str, value) -> None:
    if _PRIVATE.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise UserError(
            f"{name} holds characters of Unicode's last private plane (U+100000 to U+10FFFD), which minillm uses to "
            "mark the parts of a chat template's text: remove them"
        )


def _json_or_plain(key: str, text: str) -> bool:
    return key in text or json.dumps(key, ensure_ascii=False)[1:-1] in text


def _break(value, pattern: re.Pattern):
    """Return a message's value with a breaker after the first character of all text that matches ``pattern``."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + BREAKER + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _break(item, pattern) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_break(item, pattern) for item in value]
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
