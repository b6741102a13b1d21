"""Decoding with a key-value cache: a batch of prompts of different lengths, or one prompt streamed as text.

Prompts are right-padded and processed in one forward pass. The cache stores each row's own length, so all rows then
continue together, one token at a time, without padding between prompt and answer. A finished row leaves the batch.

Shapes: B answers still running, T positions, V vocabulary.
"""

import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.answer import NOT_FINITE, Answer, Completion, new_answer, next_tokens
from minillm.inference.sampling import SamplingOptions, row_uniforms
from minillm.inference.text import check_stop
from minillm.model import KVCache


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
    settings = {"stop": check_stop(stop, tokenizer), "eos_token_id": eos_token_id, "tokenizer": tokenizer}
    answers = _answers(model, prompts, max_new_tokens, options, generator, **settings)
    for _ in _decode(model, answers):
        pass
    return [answer.completion() for answer in answers]


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
    settings = {"stop": check_stop(stop, tokenizer), "eos_token_id": eos_token_id, "tokenizer": tokenizer}
    answers = _answers(model, [prompt], max_new_tokens, options, generator, **settings)

    def pieces():
        for step in _decode(model, answers):
            yield from filter(None, step)
        return answers[0].completion()

    return pieces()


def _answers(model, prompts, max_new_tokens, options, generator, **settings) -> list[Answer]:
    """Check all prompts and return an empty answer for each."""
    answers = [
        new_answer(
            model.config, prompt, max_new_tokens=max_new_tokens, options=options, name=f"prompt {number}", **settings
        )
        for number, prompt in enumerate(prompts)
    ]
    if answers and not options.greedy:
        uniforms = row_uniforms(len(answers), max(answer.limit for answer in answers), generator)  # (B, steps)
        for answer, numbers in zip(answers, uniforms.tolist(), strict=True):
            answer.uniforms = numbers
    return answers


@torch.inference_mode()
def _decode(model, answers: list[Answer]) -> Iterator[list[str]]:
    """Fill ``answers`` step by step; after each step yield the new text of each running one."""
    if not answers:
        return
    with evaluating(model):
        device = next(model.parameters()).device
        max_len = max(len(answer.prompt) + answer.limit - 1 for answer in answers)
        cache = KVCache(model.config, batch_size=len(answers), max_len=max_len, device=device)
        tokens, document_ids = _pad([answer.prompt for answer in answers], device)  # (B, T)
        running = list(range(len(answers)))
        for step in itertools.count(1):
            with uncompiled():
                logits = _last_logits(model, tokens, document_ids, cache)  # (B, V)
            ids = next_tokens([answers[index] for index in running], logits)
            if min(ids) < 0:
                raise UserError(f"prompt {running[ids.index(-1)]}: {NOT_FINITE.format(step)}")
            yield [answers[index].push(token) for index, token in zip(running, ids, strict=True)]

            kept = [b for b, index in enumerate(running) if answers[index].finish_reason is None]
            if not kept:
                return
            if len(kept) < len(running):
                running = [running[b] for b in kept]
                cache.select(torch.tensor(kept, device=device))
            tokens, document_ids = torch.tensor([[ids[b]] for b in kept], device=device), None  # (B, 1)


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
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
    """Return ids (B, T) padded on the right, and document ids: 0 at a prompt, -1 at padding (None: all 0)."""
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
        return output_logits(hidden[rows, last], output_weight)  # (B, T, D) -> (B, D) -> (B, V)

    out = model(tokens, document_ids=document_ids, cache=cache, head=head)
    return out if out.dim() == 2 else out[rows, last]  # a wrapped output layer ignores head: (B, T, V)


def output_logits(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
    """Return logits (n, V) of hidden states (n, D); without a weight they are logits: the layer has an adapter."""
    return hidden if output_weight is None else torch.nn.functional.linear(hidden, output_weight)
