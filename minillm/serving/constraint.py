"""Answers that must be JSON: which tokens may come next, by llguidance's grammars over our tokenizers.

A grammar is about bytes, a model chooses tokens. llguidance walks the grammar with the bytes of every token of the
vocabulary and returns a mask; what ends an answer is allowed exactly where the grammar may end. The method is that of
Willard and Louf 2023, "Efficient Guided Generation for Large Language Models", the library
https://github.com/guidance-ai/llguidance.
"""

import json
import threading

import torch
from torch import Tensor

from minillm.errors import UserError, missing_package
from minillm.tokenizer import Tokenizer

# As json.dumps writes it, and as our training data has it: with freedom, a small model may write blanks for ever.
JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
BEFORE = "\x02"  # a character that no token shares with others
CALL_TAGS = ("<tool_call>", "</tool_call>")


class ConstraintMaker:
    """Makes the constraints of one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary = None

    def json(self, schema: dict) -> "TokenConstraint":
        """Return the constraint to JSON of a schema (https://json-schema.org).

        Raises:
            UserError: the schema is wrong, or has a keyword that llguidance cannot keep; llguidance is not installed.
        """
        guidance = _llguidance()
        try:
            grammar = guidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_STYLE)
        except ValueError as error:
            raise UserError(f"the JSON schema cannot be used: {error}") from None
        return self._constraint(grammar, "the JSON schema")

    def tool_call(self, tools: list[dict]) -> "TokenConstraint":
        """Return the constraint to a call of one of ``tools``, as our chat format writes it, and nothing else.

        Raises:
            UserError: the tokenizer has no ``<tool_call>``, or the schema of the parameters cannot be used.
        """
        guidance = _llguidance()
        missing = [tag for tag in CALL_TAGS if not self.tokenizer.has_token(tag)]
        if missing:
            raise UserError(
                f"a call can only be forced if the tokenizer has the tokens {' and '.join(CALL_TAGS)}, and this one "
                f"lacks {' and '.join(missing)}: use tool_choice auto"
            )
        functions = [tool.get("function") or tool for tool in tools]
        calls = {"anyOf": [_call_schema(function) for function in functions], "x-guidance": JSON_STYLE}
        opening, closing = (f"<[{self.tokenizer.token_id(tag)}]>" for tag in CALL_TAGS)
        lark = f'start: {opening} "\\n" call "\\n" {closing}\ncall: %json {json.dumps(calls)}\n'
        return self._constraint(guidance.LLMatcher.grammar_from_lark(lark), "the parameters of the tools")

    def _constraint(self, grammar: str, what: str) -> "TokenConstraint":
        guidance = _llguidance()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = guidance.LLTokenizer(_Vocabulary(self.tokenizer))
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        matcher.compute_bitmask()  # some grammars fail only here, and large ones take their time here
        if matcher.is_error():
            raise UserError(f"{what} cannot be used: {matcher.get_error().strip().splitlines()[0][:300]}")
        return TokenConstraint(matcher, self.tokenizer)


class TokenConstraint:
    """Where one answer is in its grammar."""

    def __init__(self, matcher, tokenizer: Tokenizer):
        self._matcher, self._tokenizer = matcher, tokenizer
        self._end_ids = list(tokenizer.end_ids)

    def copy(self) -> "TokenConstraint":
        """Return the same constraint for another answer, in the same place."""
        return TokenConstraint(self._matcher.deep_copy(), self._tokenizer)

    @property
    def is_done(self) -> bool:
        """Return whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, (V,) bool; at least one of them.

        Ids beyond the tokenizer's vocabulary, which padded embeddings have, never are among them.
        """
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        may_end = self.is_done or self._matcher.is_accepting()
        if not self.is_done:
            words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # the lowest bit is the first id
            n_known = min(vocab_size, self._tokenizer.vocab_size)
            mask[:n_known] = bits.flatten()[:n_known].bool()
        mask[self._end_ids] = False  # a grammar that fails allows its own end token, here or there
        mask[self._end_ids] = may_end or not bool(mask.any())
        return mask

    def accept(self, token: int) -> None:
        """Go on behind ``token``."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as ``llguidance.LLTokenizer`` wants it: the bytes of every token, and how a text is usually cut.

    Where the grammar leaves one text only, such as ``"name": ``, the usual tokens are the only ones that are allowed.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.end_ids})
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(BEFORE)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of ``text`` inside of an answer: SentencePiece puts a blank only before its beginning."""
        ids = self._tokenizer.encode(BEFORE + text)
        own = ids[len(self._before) :]
        is_exact = ids == self._before + own and b"".join(self.tokens[i] for i in own) == text.encode()
        return own if is_exact else self._cut(text.encode())

    def _cut(self, text: bytes) -> list[int]:
        """Return ids with exactly the bytes of ``text``, each the longest that fits."""
        special, ids = set(self.special_token_ids), []
        while text:
            fitting = [
                i for i, token in enumerate(self.tokens) if token and i not in special and text.startswith(token)
            ]
            if not fitting:  # a vocabulary without all bytes: the rest cannot be written
                return ids
            ids.append(max(fitting, key=lambda i: len(self.tokens[i])))
            text = text[len(self.tokens[ids[-1]]) :]
        return ids


def _call_schema(function: dict) -> dict:
    arguments = function.get("parameters") or {"type": "object"}
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _llguidance():
    try:
        import llguidance
    except ImportError:
        raise missing_package("llguidance", purpose="an answer in JSON", extra="serve") from None
    return llguidance
