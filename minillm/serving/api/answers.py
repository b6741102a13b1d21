"""OpenAI's answers as dictionaries: whole ones, chunks of a stream, usage, log-probabilities, models."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from minillm.serving.request import LogProb, Request
from minillm.tokenizer import Tokenizer

LOWEST = -9999.0  # OpenAI's number for a probability of 0: JSON has no infinity
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "length"}


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have in common."""

    id: str
    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict], usage: dict) -> dict:
        """Return an answer that is not streamed."""
        return self._fields("chat.completion") | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], usage: dict | None, *, with_usage: bool) -> dict:
        """Return a chunk of a stream; with ``with_usage`` every chunk has the field, and the last one its value."""
        chunk = self._fields("chat.completion.chunk") | {"choices": choices}
        return chunk | {"usage": usage} if with_usage else chunk

    def _fields(self, kind: str) -> dict:
        return {
            "id": self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


def usage(requests: Sequence[Request], n_choices: int) -> dict:
    """Return how many tokens were read and written; ``n_choices`` requests share each prompt."""
    prompts = requests[::n_choices]  # the first of a prompt's requests: the others find its pages
    n_prompt, n_new = sum(len(request.prompt_ids) for request in prompts), sum(len(r.new_ids) for r in requests)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": sum(request.n_cached for request in prompts)},
    }


def model_card(name: str, created: int, *, max_len: int, parent: str | None) -> dict:
    """Return an entry of ``/v1/models``; ``parent`` is the model of an adapter."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "minillm", "max_model_len": max_len}
    return card if parent is None else card | {"parent": parent}


# ---- log-probabilities -------------------------------------------------------------------------------------------


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], log_probs: Sequence[LogProb]) -> dict:
    """Return ``logprobs`` of a chat: for each token its text, bytes, log-probability and alternatives."""
    content = []
    for token, own in zip(ids, log_probs, strict=True):
        entry = _entry(tokenizer, token, own.log_prob)
        content.append(entry | {"top_logprobs": [_entry(tokenizer, *other) for other in own.top]})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, ids: Sequence[int], log_probs: Sequence[LogProb], offset: int) -> dict:
    """Return ``logprobs`` of a completion: lists with an entry per token; ``offset`` is that of the first one."""
    tokens = [_text(tokenizer, token) for token in ids]
    offsets = [offset + sum(map(len, tokens[:n])) for n in range(len(tokens))]
    top: list[dict] = [{} for _ in ids]
    for entry, own in zip(top, log_probs, strict=True):
        for other, value in own.top:  # of tokens with the same text, such as half characters, the most probable one
            entry.setdefault(_text(tokenizer, other), _clamp(value))
    return {
        "tokens": tokens,
        "token_logprobs": [_clamp(own.log_prob) for own in log_probs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict:
    text, raw = _text(tokenizer, token), _bytes(tokenizer, token)
    return {"token": text, "logprob": _clamp(value), "bytes": list(raw)}


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes of a token; none for an id beyond the vocabulary, which padded embeddings have."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def _text(tokenizer: Tokenizer, token: int) -> str:
    return _bytes(tokenizer, token).decode("utf-8", errors="replace")


def _clamp(value: float) -> float:
    return max(value, LOWEST)
