"""One answer while it is generated: which token comes next, what text is certain, and why the answer ends.

``complete`` decodes a fixed batch of answers, the engine (``minillm/serving``) a batch that changes at every step. Both
use what is here, so they choose the same tokens and write the same text.

Shapes: B answers, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.sampling import SamplingOptions, process_logits, sample
from minillm.inference.text import StopMatcher, TextDecoder

NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity) at new token {}: its weights are damaged or overflow their "
    "dtype; load them in float32 (--dtype float32), or use an earlier checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt."""

    ids: list[int]
    """New ids, with the end token or the tokens of the stop string that ended them."""
    text: str | None
    """Their text without special tokens, cut before the stop string; None without a tokenizer."""
    finish_reason: str
    """"eos", "stop" (a stop string) or "length" (max_new_tokens, or no positions left); the engine adds others."""


class Constraint(Protocol):
    """What an answer may contain, token by token: a grammar, such as that of JSON."""

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, (V,) bool."""

    def accept(self, token: int) -> None:
        """Go on behind ``token``."""


class Answer:
    """The ids and the text of one answer so far.

    Args:
        prompt: ids; those of them count as seen for the repetition penalty.
        limit: most new tokens.
        uniforms: one number in [0, 1) per new token (``row_uniforms``); greedy answers need none.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        options: SamplingOptions,
        eos_ids: frozenset[int] = frozenset(),
        stop: tuple[str, ...] = (),
        tokenizer=None,
        uniforms: Sequence[float] = (),
        constraint: Constraint | None = None,
    ):
        self.prompt, self.limit, self.options, self.eos_ids = prompt, limit, options, eos_ids
        self.uniforms, self.constraint = uniforms, constraint
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._decoder = TextDecoder(tokenizer) if tokenizer is not None else None
        self._matcher = StopMatcher(stop)
        self._pieces: list[str] = []
        self._seen: Tensor | None = None  # (V,) bool

    def push(self, token: int) -> str:
        """Add ``token`` and return the text that is certain now ("" without a tokenizer)."""
        self.ids.append(token)
        if self._seen is not None:
            self._seen[token] = True
        piece = ""
        if token in self.eos_ids:
            self.finish_reason = "eos"
        elif self._decoder is not None:
            piece = self._matcher.push(self._decoder.push(token))
            if self._matcher.stopped:
                self.finish_reason = "stop"
        if self.constraint is not None and self.finish_reason is None:
            self.constraint.accept(token)
        if self.finish_reason is None and len(self.ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._matcher.finish()
        self._pieces.append(piece)
        return piece

    def end(self, reason: str) -> str:
        """End the answer here; return the text that was held back."""
        self.finish_reason = reason
        self._pieces.append(self._matcher.finish())
        return self._pieces[-1]

    def seen(self, logits: Tensor) -> Tensor:
        """Return which tokens prompt and answer contain, (V,) bool, on the device of ``logits`` (V,)."""
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            self._seen[torch.tensor([*self.prompt, *self.ids], device=logits.device)] = True
        return self._seen

    def completion(self) -> Completion:
        """Return what there is of the answer."""
        text = None if self._decoder is None else "".join(self._pieces)
        return Completion(ids=self.ids, text=text, finish_reason=self.finish_reason)


def new_answer(
    config,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    name: str = "the prompt",
    **options,
) -> Answer:
    """Return an empty answer to ``prompt`` for a model of ``config``.

    Args:
        eos_token_id: id or ids that end it; None: those of the configuration, ``()``: none.
        name: of the prompt, for messages.
        options: of :class:`Answer`.

    Raises:
        UserError: a prompt that is empty, holds an id outside the vocabulary, or leaves no position for an answer.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if not len(prompt):
        raise UserError(f"{name} is empty: begin it with a token, such as the eos token")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        bad_id = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise UserError(
            f"{name} holds token id {bad_id}, the model's vocabulary has {config.vocab_size} ids "
            f"(0..{config.vocab_size - 1}): use the model's own tokenizer"
        )
    n_free = config.max_position_embeddings - len(prompt)
    if n_free < 1:
        raise UserError(
            f"{name} has {len(prompt)} tokens, the model has {config.max_position_embeddings} "
            "positions and an answer needs at least one: shorten the prompt"
        )
    if eos_token_id is None:
        eos_token_id = () if config.eos_token_id is None else config.eos_token_id
    eos_ids = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    return Answer(prompt, limit=min(max_new_tokens, n_free), eos_ids=eos_ids, **options)


def next_tokens(answers: Sequence[Answer], logits: Tensor) -> list[int]:
    """Return the next token of each answer from logits (B, V); −1 where they are not finite.

    A token depends on its own answer alone: on its options, its uniform number and its row of logits.
    """
    is_finite = logits.amax(dim=-1).isfinite()  # (B,): False for NaN anywhere in the row, and for infinity
    tokens = torch.empty(len(answers), dtype=torch.long, device=logits.device)
    for options, rows in _by_options(answers).items():
        chosen = [answers[row] for row in rows]
        own = logits if len(rows) == len(answers) else logits[rows]
        uniform = None
        if not options.greedy:
            uniform = torch.tensor([answer.uniforms[len(answer.ids)] for answer in chosen], dtype=torch.float64)
        new = sample(_allowed(chosen, own), options, seen=_seen(chosen, own, options), uniform=uniform)
        if len(rows) == len(answers):
            tokens = new
        else:
            tokens[rows] = new
    return torch.where(is_finite, tokens, -1).tolist()


def next_logits(answer: Answer, logits: Tensor) -> Tensor:
    """Return one answer's logits (V,) after penalty, temperature and filters: what its next token is drawn from."""
    own = logits[None]
    return process_logits(_allowed([answer], own), answer.options, _seen([answer], own, answer.options))[0]


def _by_options(answers: Sequence[Answer]) -> dict[SamplingOptions, list[int]]:
    """Return the rows with equal options; they are computed together."""
    rows: dict[SamplingOptions, list[int]] = {}
    for row, answer in enumerate(answers):
        rows.setdefault(answer.options, []).append(row)
    return rows


def _seen(answers: Sequence[Answer], logits: Tensor, options: SamplingOptions) -> Tensor | None:
    if options.repetition_penalty == 1.0:
        return None
    return torch.stack([answer.seen(row) for answer, row in zip(answers, logits, strict=True)])


def _allowed(answers: Sequence[Answer], logits: Tensor) -> Tensor:
    """Return the logits with what an answer's constraint forbids at -inf."""
    if all(answer.constraint is None for answer in answers):
        return logits
    everything = torch.ones(logits.shape[-1], dtype=torch.bool)
    masks = [a.constraint.allowed(logits.shape[-1]) if a.constraint is not None else everything for a in answers]
    return logits.masked_fill(~torch.stack(masks).to(logits.device), float("-inf"))
