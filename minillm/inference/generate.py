"""Decoding with a key-value cache: a batch of prompts of different lengths, or one prompt streamed as text.

Prompts are right-padded and processed in one forward pass. The cache stores each row's own length, so all rows then
continue together, one token at a time, without padding between prompt and answer. A finished row leaves the batch.

Shapes: B rows still running, T positions, V vocabulary.
"""

import contextlib
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.sampling import SamplingOptions, row_uniforms, sample
from minillm.inference.text import StopMatcher, TextDecoder, check_stop
from minillm.model import KVCache


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt."""

    ids: list[int]
    """New ids, with the end token or the tokens of the stop string that ended them."""
    text: str | None
    """Their text without special tokens, cut before the stop string; None without a tokenizer."""
    finish_reason: str
    """"eos", "stop" (a stop string) or "length" (max_new_tokens, or no positions left)."""


class _Row:
    """One answer while it is generated: its ids, its text so far, and why it ended."""

    def __init__(self, limit: int, eos_ids: frozenset[int], stop: tuple[str, ...], tokenizer):
        self.limit, self.eos_ids = limit, eos_ids
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._decoder = TextDecoder(tokenizer) if tokenizer is not None else None
        self._matcher = StopMatcher(stop)
        self._pieces: list[str] = []

    def push(self, token: int) -> str:
        """Add ``token`` and return the text that is certain now ("" without a tokenizer)."""
        self.ids.append(token)
        piece = ""
        if token in self.eos_ids:
            self.finish_reason = "eos"
        elif self._decoder is not None:
            piece = self._matcher.push(self._decoder.push(token))
            if self._matcher.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._matcher.finish()
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        text = None if self._decoder is None else "".join(self._pieces)
        return Completion(ids=self.ids, text=text, finish_reason=self.finish_reason)


def complete(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    tokenizer=None,
) -> list[Completion]:
    """Return a :class:`Completion` per prompt, in order; all prompts run as one batch.

    Args:
        prompts: lists of token ids, of any lengths; none may be empty (begin with the eos token).
        max_new_tokens: limit of new tokens per prompt. A row also ends at ``max_position_embeddings``.
        temperature: 0 is greedy; the other sampling options are those of
            :class:`~minillm.inference.sampling.SamplingOptions`, in transformers' order.
        stop: strings that end an answer; they are matched in the text without special tokens, and need ``tokenizer``.
        eos_token_id: id or ids that end an answer; None: those of the configuration, ``()``: none.
        generator: gives one seed per prompt, in order. A prompt's answer depends on its seed and not on the other
            prompts (except for rounding of the logits), so the batch size does not change it.

    Raises:
        UserError: an option out of range; a prompt that is empty, holds an id outside the vocabulary, or
            leaves no position for an answer; logits that are not finite.
    """
    options = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    rows = _rows(model, prompts, max_new_tokens, check_stop(stop, tokenizer), eos_token_id, tokenizer)
    for _ in _decode(model, prompts, rows, options, generator):
        pass
    return [row.completion() for row in rows]


def generate(model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options) -> list[list[int]]:
    """Return the new ids of each prompt, in order: :func:`complete`, with the same options, but ids only.

    If an answer has an end token, it is the last id. With greedy decoding the result equals that of each prompt alone,
    and that of transformers' ``generate``.
    """
    completions = complete(model, prompts, max_new_tokens=max_new_tokens, **options)
    return [completion.ids for completion in completions]


def stream(
    model,
    prompt: Sequence[int],
    *,
    tokenizer,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Generator[str, None, Completion]:
    """Yield the answer to one prompt as text, piece by piece, as soon as each piece is certain.

    A piece never ends inside a character (an emoji may be four tokens) and never contains the beginning of a stop
    string. Special tokens give no text. The joined pieces are the ``text`` of :func:`complete` with the same options
    and generator. The :class:`Completion` is the return value of the generator
    (``completion = yield from stream(...)``). Errors are those of :func:`complete`, raised at the call.
    """
    options = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    rows = _rows(model, [prompt], max_new_tokens, check_stop(stop, tokenizer), eos_token_id, tokenizer)

    def pieces():
        for step in _decode(model, [prompt], rows, options, generator):
            yield from filter(None, step)
        return rows[0].completion()

    return pieces()


def _rows(model, prompts, max_new_tokens, stop, eos_token_id, tokenizer) -> list[_Row]:
    """Check all prompts and return an empty row for each."""
    config = model.config
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if eos_token_id is None:
        eos_token_id = () if config.eos_token_id is None else config.eos_token_id
    eos_ids = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    rows = []
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: begin it with a token, such as the eos token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad_id = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise UserError(
                f"prompt {number} holds token id {bad_id}, the model's vocabulary has {config.vocab_size} ids "
                f"(0..{config.vocab_size - 1}): use the model's own tokenizer"
            )
        n_free = config.max_position_embeddings - len(prompt)
        if n_free < 1:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, the model has {config.max_position_embeddings} "
                "positions and an answer needs at least one: shorten the prompt"
            )
        rows.append(_Row(min(max_new_tokens, n_free), eos_ids, stop, tokenizer))
    return rows


@torch.inference_mode()
def _decode(model, prompts, rows: list[_Row], options: SamplingOptions, generator) -> Iterator[list[str]]:
    """Fill ``rows`` step by step; after each step yield the new text of each running row."""
    if not rows:
        return
    was_training = model.training
    if was_training:
        model.eval()
    try:
        device = next(model.parameters()).device
        max_len = max(len(prompt) + row.limit - 1 for prompt, row in zip(prompts, rows, strict=True))
        cache = KVCache(model.config, batch_size=len(rows), max_len=max_len, device=device)
        uniforms = None
        if not options.greedy:
            uniforms = row_uniforms(len(rows), max(row.limit for row in rows), generator)  # (B, steps)
        tokens, document_ids = _pad(prompts, device)  # (B, T)
        seen = None
        if options.repetition_penalty != 1.0:
            seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)

        running = list(range(len(rows)))
        for step in range(max(row.limit for row in rows)):
            with uncompiled():
                logits = _last_logits(model, tokens, document_ids, cache)  # (B, V)
            is_finite = logits.amax(dim=-1).isfinite()  # (B,): False for NaN anywhere in the row, and for infinity
            if seen is not None:
                seen.scatter_(1, tokens, True)
            uniform = None if uniforms is None else uniforms[running, step]
            new = sample(logits, options, seen=seen, uniform=uniform)  # (B,)
            ids = torch.where(is_finite, new, -1).tolist()
            if min(ids) < 0:
                raise UserError(
                    f"prompt {running[ids.index(-1)]}: the model's logits are not finite (NaN or infinity) at new "
                    f"token {step + 1}: its weights are damaged or overflow their dtype; load them in float32 (--dtype "
                    f"float32), or use an earlier checkpoint"
                )
            yield [rows[index].push(token) for index, token in zip(running, ids, strict=True)]

            kept = [b for b, index in enumerate(running) if rows[index].finish_reason is None]
            if not kept:
                return
            if len(kept) < len(running):
                running = [running[b] for b in kept]
                chosen = torch.tensor(kept, device=device)
                cache.select(chosen)
                new = new[chosen]
                seen = None if seen is None else seen[chosen]
            tokens, document_ids = new[:, None], None  # (B, 1)
    finally:
        if was_training:
            model.train()


def uncompiled():
    """Return a context in which compiled modules run eagerly.

    Otherwise torch would recompile for every length of the cache, up to its limit; after that the same modules would
    also run eagerly in training.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; set_stance would load the compiler
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _pad(prompts, device) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, T) padded on the right, and document ids: 0 at a prompt, -1 at padding (None: all 0).

    The padding repeats the row's last token, so that it adds no token to ``seen``.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if bool((lengths == longest).all()):
        return ids.to(device), None
    padding = torch.arange(longest)[None, :] >= lengths[:, None]  # (B, T)
    return ids.to(device), -padding.long().to(device)


def _last_logits(model, tokens: Tensor, document_ids: Tensor | None, cache) -> Tensor:
    """Return the logits (B, V) after each row's last real token; no other logits are computed."""
    last = tokens.shape[1] - 1
    if document_ids is not None:
        last = (document_ids >= 0).sum(1) - 1  # (B,)
    rows = torch.arange(tokens.shape[0], device=tokens.device)

    def head(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
        used = hidden[rows, last]  # (B, T, D) -> (B, D); an adapted output layer has already made logits of them
        return used if output_weight is None else torch.nn.functional.linear(used, output_weight)  # (B, V)

    out = model(tokens, document_ids=document_ids, cache=cache, head=head)
    return out if out.dim() == 2 else out[rows, last]  # a wrapped output layer ignores head: (B, T, V)
