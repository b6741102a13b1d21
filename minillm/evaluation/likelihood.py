"""The log-likelihood of answers: how probable is each answer after its prompt?

    prompt          Question: 2+2=   Answer:
    prompt+answer   Question: 2+2=   Answer: 4
    ids             bos t1 t2 ... tn a1            encoded as one text, with one bos
    scored                           a1            from the first token that differs from the prompt's own ids

The end of the prompt and the beginning of the answer can merge into one token (``：`` and ``A`` into ``：A``). Ids of
the answer alone, or those behind the length of the prompt's ids, would then be wrong or empty; the first difference is
always there.

Shapes: B rows, T positions, D hidden, V vocabulary, N scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.losses import linear_log_probs
from minillm.model import KVCache
from minillm.terminal import progress


class AnswerIds(NamedTuple):
    """A prompt with one answer, as ids."""

    ids: list[int]
    first: int
    """Index of the first scored token; at least 1, and below ``len(ids)``."""

    @property
    def inputs(self) -> list[int]:
        """Return what the model reads: every token predicts the next one."""
        return self.ids[:-1]


class Likelihood(NamedTuple):
    """The log-likelihood of an answer in nats, and the number of its tokens."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool | None = None
    """Whether each of its tokens is the most probable one; None if that was not asked for."""


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """The result of ``answer_likelihoods``."""

    groups: list[list[Likelihood]]
    n_truncated: int
    """Groups whose prompt was cut on the left, because it was longer than the model's positions."""


def answer_likelihoods(
    model, tokenizer, groups: Sequence[Sequence[tuple[str, str]]], *, batch_size: int = 16
) -> Likelihoods:
    """Return the log-likelihood of each answer, in groups as given.

    Args:
        groups: (prompt, answer) pairs; the answers of one group are compared with each other. The prompt of a group is
            computed once if it is the same.
        batch_size: groups per forward pass; it only affects speed and memory.

    Raises:
        UserError: an answer that is empty or longer than the model's positions; a model whose log-likelihoods are NaN.
    """
    limit = model.config.max_position_embeddings
    encoded, n_truncated = [], 0
    for answers in encode_answers(tokenizer, groups):
        kept, was_cut = truncate_prompt(answers, limit=limit)
        encoded.append(kept)
        n_truncated += was_cut
    return Likelihoods(groups=score_answers(model, encoded, batch_size=batch_size), n_truncated=n_truncated)


def score_answers(
    model, groups: Sequence[Sequence[AnswerIds]], *, batch_size: int, with_greedy: bool = False
) -> list[list[Likelihood]]:
    """Return the log-likelihood of each answer, in groups as given, from ids that fit into the model's positions.

    Args:
        with_greedy: also find out whether greedy decoding would give the answer (``is_greedy``).
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    order = sorted(range(len(groups)), key=lambda n: -max(len(answer.ids) for answer in groups[n]))
    results: list[list[Likelihood]] = [[] for _ in groups]
    was_training = model.training
    model.eval()
    try:
        for start in progress(range(0, len(order), batch_size), desc="measuring", unit="batch"):
            numbers = order[start : start + batch_size]  # the largest batch first: it must fit
            scored = _score(model, [groups[n] for n in numbers], with_greedy=with_greedy)
            for number, likelihoods in zip(numbers, scored, strict=True):
                results[number] = likelihoods
    finally:
        model.train(was_training)
    return results


def encode_answers(tokenizer, groups: Sequence[Sequence[tuple[str, str]]]) -> list[list[AnswerIds]]:
    """Return the ids of each (prompt, answer), with one bos, and where the answer begins.

    Raises:
        UserError: an answer is empty.
    """
    pairs = [pair for group in groups for pair in group]
    for prompt, answer in pairs:
        if not answer.strip():
            raise UserError(f"the answer after {prompt[-40:]!r} is empty: give it a text")
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    ids_of = dict(zip(prompts, tokenizer.encode_batch(prompts), strict=True))
    whole = iter(tokenizer.encode_batch([prompt + answer for prompt, answer in pairs]))
    encoded = []
    for group in groups:
        encoded.append([])
        for prompt, _ in group:
            ids = tokenizer.open_document(next(whole))
            n_common = common_length([ids, tokenizer.open_document(ids_of[prompt])])
            encoded[-1].append(AnswerIds(ids, min(n_common, len(ids) - 1)))
    return encoded


def truncate_prompt(answers: list[AnswerIds], *, limit: int) -> tuple[list[AnswerIds], bool]:
    """Return the group with at most ``limit`` inputs each, and whether that took away tokens.

    Tokens go from the left, behind the bos, and as many from each answer, so that the prompts stay the same.

    Raises:
        UserError: the answer itself does not fit.
    """
    n_over = max(len(answer.inputs) for answer in answers) - limit
    if n_over <= 0:
        return answers, False
    if n_over > min(answer.first for answer in answers) - 1:
        longest = max(len(answer.ids) - answer.first for answer in answers)
        raise UserError(f"an answer has {longest} tokens and the model reads {limit}: shorten or remove the question")
    return [AnswerIds([ids[0], *ids[1 + n_over :]], first - n_over) for ids, first in answers], True


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest beginning that all rows share."""
    columns = enumerate(zip(*rows, strict=False))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, rows)))


@torch.inference_mode()
def _score(model, groups: list[Sequence[AnswerIds]], *, with_greedy: bool) -> list[list[Likelihood]]:
    """Return the likelihoods of a batch of groups; what the answers of a group have in common is computed once.

    First the common inputs of each group fill a cache. Then each different rest is a row on a copy of its group's
    entries. Answers of one token have the same inputs, so they share a row too.
    """
    rows = [list(dict.fromkeys(tuple(answer.inputs) for answer in group)) for group in groups]
    n_rows = sum(map(len, rows))
    device = next(model.parameters()).device
    n_cached, cache = [0] * len(groups), None
    if n_rows > len(groups):
        # The last common input is left for the rows: it predicts the first token of an answer.
        n_cached = [
            min(common_length(inputs), *(a.first for a in group)) - 1
            for inputs, group in zip(rows, groups, strict=True)
        ]
    if any(n_cached):
        longest = max(len(inputs) for group_rows in rows for inputs in group_rows)
        cache = KVCache(model.config, batch_size=len(groups), max_len=longest, device=device)
        prefixes = [inputs[0][:n] for inputs, n in zip(rows, n_cached, strict=True)]
        model(**_padded(prefixes, device), cache=cache, head=lambda hidden, weight: None)
        cache.select(torch.tensor([n for n, inputs in enumerate(rows) for _ in inputs], device=device))
    rests, places = [], []  # of each scored token: its row, the position that predicts it, and its id
    for group, inputs, n in zip(groups, rows, n_cached, strict=True):
        first_row = len(rests)
        rests += [row[n:] for row in inputs]
        for ids, first in group:
            row = first_row + inputs.index(tuple(ids[:-1]))
            places += [(row, index - 1 - n, ids[index]) for index in range(first, len(ids))]
    row_of, position_of, targets = torch.tensor(places, device=device).T  # (N,) each

    def head(hidden: Tensor, output_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        used = hidden[row_of, position_of]  # (N, D), or (N, V): logits
        is_top = _are_most_probable(used, output_weight, targets) if with_greedy else None
        return linear_log_probs(used, output_weight, targets), is_top  # (N,) each

    batch = _padded(rests, device)
    if cache is None:
        # Without a cache no token sees the padding on its right, and plain causal attention is the fastest.
        batch.pop("document_ids")
    log_probs, is_top = model(**batch, cache=cache, head=head)
    log_probs = log_probs.cpu().double()  # on the CPU, because not every device has float64
    if log_probs.isnan().any():
        raise UserError("the model's log-probabilities are NaN: its weights are broken, or float16 overflows")
    likelihoods, start = [], 0
    for group in groups:
        likelihoods.append([])
        for answer in group:
            end = start + len(answer.ids) - answer.first
            is_greedy = None if is_top is None else bool(is_top[start:end].all())
            likelihoods[-1].append(Likelihood(log_probs[start:end].sum().item(), end - start, is_greedy))
            start = end
    return likelihoods


def _are_most_probable(hidden: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
    """Return whether each target is the most probable token, (N,), from at most 256 rows of logits at a time."""
    logits = (part if weight is None else part @ weight.T for part in hidden.split(256))  # (n, V) each
    tops = [part.argmax(dim=-1) for part in logits]
    return torch.cat(tops) == targets


def _padded(rows: Sequence[Sequence[int]], device) -> dict[str, Tensor]:
    """Return the ids as a batch (B, T), padded on the right."""
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    document_ids = torch.full_like(input_ids, -1)
    for number, ids in enumerate(rows):
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        document_ids[number, : len(ids)] = 0
    return {"input_ids": input_ids.to(device), "document_ids": document_ids.to(device)}
