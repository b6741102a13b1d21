"""Conversations in the format of a foreign chat template: rendered, and what is learned is proven.

The text is the template's own, and the ids are those that transformers' ``apply_chat_template`` gives. A template says
nothing about where an answer stands in its text. That is found by rendering the conversation a second time with an
invisible mark behind the content of each message, and each prompt as the model will see it:

    full rendering     <|user|>\\nHi⁰<|end|>\\n<|assistant|>\\nHello!¹<|end|>\\n
    prompt             <|user|>\\nHi⁰<|end|>\\n<|assistant|>\\n
    behind mark 0              <|end|>\\n<|assistant|>\\n                      the same in both: here the answer begins
    learned                                         Hello! <|end|>          up to the end token behind mark 1

The proof: without its marks the second rendering is the first one; every message stands in it; behind the message
before the answer, prompt and full rendering agree; the answer ends in a token of the model's own end set before the
next message begins. A conversation for which one of these fails is refused with the reason.

What an answer begins with:
- Text that the template opens an answer with in the prompt (an empty think block, say) is given, hence not learned.
- Where the full rendering begins the answer in another way than the prompt does (a template that drops older thoughts,
  an answer with thoughts where the prompt has an empty block), it begins behind the header.
- A token that holds characters of both header and answer counts to the answer: the model has to write it. A control
  token of the header does not, also where it takes in the blanks behind it.

Text in a message that looks like a control token stays text. For the template such text is broken up by another
invisible character; for the tokenizer the control tokens of the template are written as private characters instead.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property, lru_cache

import tokenizers

from minillm.errors import UserError
from minillm.tokenizer.base import CONTROL_TOKENS, TAG_TOKENS, Tokenizer, bad_text
from minillm.tokenizer.chat_format import ChatFormat, chat_format, split_opening

# Characters of Unicode's last private plane: marks behind messages, names of control tokens, what breaks their texts.
MARKS, NAMES, BREAKER = 0x100000, 0x108000, "\U0010fffd"
MOST_MARKS = NAMES - MARKS
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
_MARK = re.compile("[\U00100000-\U00107fff]")

Span = tuple[int, int]


def encode_rendered(
    tokenizer: Tokenizer, conversations: list[list[dict]], *, train_on: str, add_generation_prompt: bool
) -> list[tuple[list[int], list[int]]]:
    """``encode_chats`` for a tokenizer with a foreign template; the messages are checked already.

    With ``add_generation_prompt`` nothing is marked. Raises UserError for a conversation that the template does not
    accept, or whose answers cannot be proven.
    """
    reader = _reader(tokenizer)
    texts = []
    for messages in conversations:
        if add_generation_prompt:
            texts.append(reader.prompt(messages))
        else:
            texts.append(reader.conversation(messages, train_on))
    return reader.encode(texts)


class _Text:
    """A rendered conversation as the tokenizer reads it, and which stretches of it are learned."""

    def __init__(self, text: str, spans: list[Span], names: dict[str, str] | None, tail: str = ""):
        """text: with marks and breakers. names: what to write for each control token; None: write them as they are.
        tail: a control token behind the text, learned."""
        self.is_guarded, self.tail = names is not None, tail
        replaced = [(match.start(), match.end(), "") for match in _PRIVATE.finditer(text)]
        if names is not None:
            replaced += [(match.start(), match.end(), names[match[0]]) for match in _pattern(names).finditer(text)]
        parts, starts, shifts, end, shift = [], [0], [0], 0, 0
        for first, last, new in sorted(replaced):
            parts += [text[end:first], new]
            end, shift = last, shift + len(new) - (last - first)
            starts.append(last)
            shifts.append(shift)
        self.text = "".join([*parts, text[end:]])
        self.spans = [tuple(place + shifts[bisect_right(starts, place) - 1] for place in span) for span in spans]


class _Reader:
    """What reading conversations of one tokenizer needs, made once."""

    def __init__(self, tokenizer: Tokenizer, style: ChatFormat):
        self.tokenizer, self.style, self.template = tokenizer, style, style.template
        unused = {"post_processor": None, "truncation": None, "padding": None}
        spec = json.loads(tokenizer.files["tokenizer.json"]) | unused
        self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        added = {token["content"]: token.get("special", False) for token in spec.get("added_tokens", ())}
        self._ends = [token for token in added if tokenizer.token_id(token) in tokenizer.end_ids]
        self._end = _pattern(self._ends)
        # Control tokens: special ones, and others that the template itself writes.
        known = {*CONTROL_TOKENS, *TAG_TOKENS, *self._ends}
        written = {token for token in added if token.strip() and token in self.template.source}
        control = [token for token, special in added.items() if special or token in known | written]
        self._names = {token: chr(NAMES + place) for place, token in enumerate(control)}
        self._spec = spec
        self._added_ids = {token["id"] for token in spec.get("added_tokens", ())}
        ordinary = [token for token in control if token not in TAG_TOKENS and (added[token] or token in known)]
        self._in_answers = _pattern(ordinary)  # an assistant may write tags and other ordinary tokens
        self._elsewhere = _pattern(control)

    # ---- texts -----------------------------------------------------------------------------------

    def prompt(self, messages: list[dict]) -> _Text:
        """Return the text of an open conversation; nothing is learned from it."""
        plain = self.template.render(messages, add_generation_prompt=True)
        broken, is_broken = self._broken(messages)
        if not is_broken:
            return _Text(plain, [], None)
        text = self.template.render(broken, add_generation_prompt=True)
        self._check_same(text, plain)
        return _Text(text, [], self._names)

    def conversation(self, messages: list[dict], train_on: str) -> _Text:
        """Return the text of a conversation with its answers; see the head of this file for the proof."""
        plain = self.template.render(messages)
        broken, is_broken = self._broken(messages)
        marked = [self._marked(place, message) for place, message in enumerate(broken)]
        text = self.template.render(marked)
        if _PRIVATE.sub("", text) != plain:  # some templates ask what a content ends with, or whether it is empty
            marked = broken
            text = self.template.render(broken) if is_broken else plain
        self._check_same(text, plain)
        marks = self._places_of_marks(marked, text)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        spans, tail = [], ""
        for place in answers if train_on == "all" else answers[-1:]:
            start = self._start(place, marked, text, marks)
            end = self._end_of(place, marked, text, marks, start)
            if end is None:
                end, tail = len(text), self._closing_token(marked, text[max(start, marks.get(place, 0)) :])
            self._check_whole(place, messages, text[start:end], marks)
            if spans and start <= spans[-1][1]:
                raise UserError(f"the answers before and in message {place} are not apart in the chat template's text")
            spans.append((start, end))
        return _Text(text, spans, self._names if is_broken else None, tail)

    def _broken(self, messages: list[dict]) -> tuple[list[dict], bool]:
        """Return the messages with the texts of control tokens broken up, and whether there were any."""
        broken = []
        for place, message in enumerate(messages):
            if _PRIVATE.search(json.dumps(message, ensure_ascii=False, default=str)):
                raise UserError(
                    f"message {place} holds characters of Unicode's last private plane (U+100000 to U+10FFFD), which "
                    "mark the parts of a chat template's text here: remove them"
                )
            pattern = self._in_answers if message["role"] == "assistant" else self._elsewhere
            keep = {"role": message["role"]}
            broken.append({key: _break(value, pattern) for key, value in message.items()} | keep)
        if len(messages) > MOST_MARKS:
            raise UserError(f"the conversation has {len(messages)} messages; at most {MOST_MARKS} can be told apart")
        return broken, broken != messages

    def _marked(self, place: int, message: dict) -> dict:
        """Return the message with its mark behind the last character of its content that is not blank."""
        content = message.get("content") or ""
        core = content.rstrip()
        if not core:
            return message
        return message | {"content": core + chr(MARKS + place) + content[len(core) :]}

    def _check_same(self, text: str, plain: str) -> None:
        if _PRIVATE.sub("", text) != plain:
            raise UserError(
                "a message holds the text of a control token, and the chat template treats it in a way of its own: "
                "remove that text"
            )

    # ---- the proof -------------------------------------------------------------------------------

    def _places_of_marks(self, marked: list[dict], text: str) -> dict[int, int]:
        """Return where the mark of each message stands; every message that has one must stand in the text, once."""
        places: dict[int, int] = {}
        for match in _MARK.finditer(text):
            place = ord(match[0]) - MARKS
            if place in places:
                raise UserError(f"the chat template writes message {place} more than once")
            places[place] = match.start()
        for place, message in enumerate(marked):
            core = (message.get("content") or "").strip()
            is_marked = bool(_MARK.search(core))
            if place not in places if is_marked else message["role"] != "assistant" and core not in text:
                raise UserError(
                    f"the chat template leaves out message {place} ({message['role']}): remove it, or take a template "
                    "that writes it"
                )
        return places

    def _start(self, place: int, marked: list[dict], text: str, marks: dict[int, int]) -> int:
        """Return where answer ``place`` begins in the text: where the prompt before it ends."""
        if place == 0:
            at = text.find(self.style.header) if self.style.header.strip() else -1
            if at < 0:
                raise UserError("the conversation begins with an answer, and the chat template has no header for it")
            at += len(self.style.header)
            return at + len(self.style.opens_with) * text.startswith(self.style.opens_with, at)
        prompt = self.template.render(marked[:place], add_generation_prompt=True)
        before = max((other for other in marks if other < place), default=None)
        begun, after = prompt, 0  # without a mark the texts must agree from the start
        if before is not None:
            _, found, begun = prompt.partition(chr(MARKS + before))
            after = marks[before] + 1
            if not found:
                raise UserError(f"the chat template leaves out message {before} where it stands before an answer")
        if text.startswith(begun, after):
            return after + len(begun)
        last = max((match.end() for match in _MARK.finditer(begun)), default=0)
        header, opening = split_opening(begun[last:])
        header = begun[:last] + header
        if not (opening and text.startswith(header, after)):
            raise UserError(
                f"the chat template begins the answer in message {place} in another way in the whole conversation than "
                "in its prompt, so what is learned cannot be proven"
            )
        return after + len(header)

    def _end_of(self, place: int, marked: list[dict], text: str, marks: dict[int, int], start: int) -> int | None:
        """Return where answer ``place`` ends, behind its end token; None where the text ends without one."""
        content_end = marks.get(place, start)
        if content_end < start:
            raise UserError(f"the chat template writes content of message {place} before the answer begins")
        limit = min((at for other, at in marks.items() if other > place and at > content_end), default=len(text))
        match = self._end.search(text, content_end, limit)
        if match is not None:
            return match.end()
        if place == len(marked) - 1:
            return None
        raise UserError(self._no_end(place, text[content_end:limit]))

    def _closing_token(self, marked: list[dict], after: str) -> str:
        """Return the end token of a last answer that the template ends only where the next question begins.

        after: what the template writes behind the answer's content where it is the last.
        """
        place = len(marked) - 1
        nothing = UserError(self._no_end(place, after))
        mark = chr(MARKS + place)
        try:
            text = self.template.render([*marked, {"role": "user", "content": "question"}])
        except UserError:
            raise nothing from None
        core = (marked[-1].get("content") or "").rstrip()
        _, found, after = text.rpartition(mark if mark in text else core or mark)
        match = self._end.match(after.lstrip()) if found else None
        if match is None:
            raise nothing
        return match[0]

    def _no_end(self, place: int, after: str) -> str:
        after = _PRIVATE.sub("", after).strip()[:20]
        return (
            f"the chat template ends the answer in message {place} "
            + (f"with {after!r}, and no end token of the model" if after else "with no end token")
            + f" ({', '.join(self._ends)}): name the token in eos_token_id of generation_config.json next to the "
            "tokenizer, or mend the template"
        )

    def _check_whole(self, place: int, messages: list[dict], answer: str, marks: dict[int, int]) -> None:
        """Refuse an answer that the template leaves parts out of, but for older thoughts, which many drop."""
        message = messages[place]
        text = _PRIVATE.sub("", answer)
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        thinking, tag, said = content.rpartition("</think>")
        if place not in marks and said.strip() not in text:
            raise UserError(f"the chat template does not write the content of message {place} as it is")
        for call in message.get("tool_calls") or ():
            if (call.get("function") or call)["name"] not in self._elsewhere.sub("", text):
                raise UserError(
                    f"the chat template leaves out tool_calls of message {place}: write the call into the content"
                )
        if any(other["role"] == "user" for other in messages[place:]):
            return
        thinking = reasoning or thinking.partition("<think>")[2] if tag or reasoning else ""
        if thinking.strip() not in text:
            what = "reasoning_content" if reasoning else "the thinking in the content"
            way = "write it into the content as <think>…</think>, " if reasoning else ""
            raise UserError(
                f"the chat template leaves out {what} of message {place}: {way}remove it, or take a template that "
                "writes it"
            )

    # ---- ids -------------------------------------------------------------------------------------

    def encode(self, texts: list[_Text]) -> list[tuple[list[int], list[int]]]:
        """Return ids and mask of each text."""
        encodings: dict[int, tokenizers.Encoding] = {}
        for is_guarded in (False, True):
            places = [place for place, text in enumerate(texts) if text.is_guarded == is_guarded]
            encoder = self._guarded if is_guarded and places else self._full
            try:
                read = encoder.encode_batch([texts[place].text for place in places], add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                for place in places:
                    if not _is_utf8(texts[place].text):
                        raise bad_text(texts[place].text) from None
                raise
            encodings |= zip(places, read, strict=True)
        return [self._with_mask(text, encodings[place]) for place, text in enumerate(texts)]

    def _with_mask(self, text: _Text, encoding: tokenizers.Encoding) -> tuple[list[int], list[int]]:
        ids, mask = encoding.ids, [0] * len(encoding.ids)
        if text.spans:
            spans = iter(text.spans)
            first, last = next(spans)
            for place, (start, end) in enumerate(encoding.offsets):
                while start >= last:
                    first, last = next(spans, (len(text.text) + 1, len(text.text) + 1))
                mask[place] = int(end > first and (start >= first or ids[place] not in self._added_ids))
        if text.tail:
            ids, mask = [*ids, self.tokenizer.token_id(text.tail)], [*mask, 1]
        if mask:
            mask[0] = 0  # nothing stands before it that could predict it
        return ids, mask

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer with its control tokens under private names, so that their texts are ordinary text."""
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


@lru_cache(maxsize=16)
def _reader(tokenizer: Tokenizer) -> _Reader:
    return _Reader(tokenizer, chat_format(tokenizer))


def _pattern(tokens: Iterable[str]) -> re.Pattern:
    """Return what matches each of the tokens, of two that begin at one place the longer; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _break(value, pattern: re.Pattern):
    """Return a message's value with a breaker behind the first character of every text of a control token in it."""
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
