"""Speculative decoding: guess some tokens, let the model check all of them in one pass, keep those that it would say.

Reading a few tokens costs hardly more than reading one, since the weights are read once. The answer stays exact
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, section 2.3; Chen et al., 2023):

    greedy     a guess is kept while it is the most probable token, so the ids are those without guesses
    sampled    with p the model's distribution and q the guesser's, both after temperature and filters: a guess x is
               kept if u·q(x) < p(x), u uniform; else a token is drawn from max(p - q, 0), normalised. The result
               follows p

Legend: k tokens of a draft, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.answer import Answer, next_logits
from minillm.inference.generate import evaluating, output_logits, uncompiled
from minillm.inference.sampling import draw, process_logits
from minillm.model import KVCache
from minillm.serving.request import Request


class Draft(NamedTuple):
    """Guessed tokens, and what they were drawn from; None: they are certain (q is 1 at the guess)."""

    ids: list[int]
    probabilities: Tensor | None = None  # (k, V) float64


NO_DRAFT = Draft([])


class Drafter(Protocol):
    """Guesses what comes next. A draft depends on its request alone."""

    def propose(self, request: Request) -> Draft:
        """Return a draft behind the request's last token, shorter than what the answer may still have."""

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""


class PromptLookup:
    """Guesses that the text repeats itself: what followed the last few tokens when they occurred before.

    Saxena, Prompt Lookup Decoding (2023). Good where answers quote: summaries, code that is edited, data that repeats.

    Args:
        n_draft: k, most tokens per draft. n_match: number of last tokens that must have occurred before.
    """

    def __init__(self, *, n_draft: int = 8, n_match: int = 3):
        if n_draft < 1 or n_match < 1:
            raise UserError(f"n_draft {n_draft}, n_match {n_match}: both must be at least 1")
        self.n_draft, self.n_match = n_draft, n_match
        self._places: dict[Request, tuple[int, dict[tuple, int]]] = {}  # tokens read; what follows where

    def propose(self, request: Request) -> Draft:
        """Return what followed the last tokens before, if they occurred before."""
        n_draft = min(self.n_draft, request.n_allowed - 1)
        ids, n = request.ids, self.n_match
        if n_draft < 1 or len(ids) <= n:
            return NO_DRAFT
        n_read, places = self._places.get(request, (n, {}))
        for end in range(n_read, len(ids)):  # the last tokens themselves do not count: nothing follows them yet
            places[tuple(ids[end - n : end])] = end
        self._places[request] = (len(ids), places)
        start = places.get(tuple(ids[-n:]))
        return NO_DRAFT if start is None else Draft(ids[start : start + n_draft])

    def forget(self, request: Request) -> None:
        """Drop the places of a request that has ended."""
        self._places.pop(request, None)


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, with the request's own temperature and filters.

    Args:
        model: the smaller model. n_draft: k, tokens per draft.
    """

    def __init__(self, model, *, n_draft: int = 4):
        if n_draft < 1:
            raise UserError(f"n_draft {n_draft}: must be at least 1")
        self.model, self.n_draft = model, n_draft
        self._caches: dict[Request, tuple[KVCache, list[int]]] = {}  # keys and values, and whose they are
        self._drafts: dict[Request, tuple[int, Draft]] = {}  # drafts that no step had room for, at which length

    def propose(self, request: Request) -> Draft:
        """Return what the smaller model would say."""
        n_tokens = request.n_tokens
        n_draft = min(self.n_draft, request.n_allowed - 1, self.model.config.max_position_embeddings - n_tokens)
        if n_draft < 1:
            return NO_DRAFT
        if self._drafts.get(request, (0,))[0] != n_tokens:
            self._drafts[request] = (n_tokens, self._guess(request, n_draft))
        return self._drafts[request][1]

    def forget(self, request: Request) -> None:
        """Drop the keys and values of a request that has ended."""
        self._caches.pop(request, None)
        self._drafts.pop(request, None)

    @torch.inference_mode()
    def _guess(self, request: Request, n_draft: int) -> Draft:
        answer, ids = request.answer, request.ids
        device = next(self.model.parameters()).device
        if request not in self._caches:
            max_len = min(len(answer.prompt) + answer.limit, self.model.config.max_position_embeddings)
            self._caches[request] = KVCache(self.model.config, batch_size=1, max_len=max_len, device=device), []
        cache, known = self._caches[request]
        n_known = 0
        while n_known < min(len(known), len(ids) - 1) and known[n_known] == ids[n_known]:
            n_known += 1
        cache.rewind(n_known)  # behind it: guesses that were rejected
        new, draft, probabilities, seen = ids[n_known:], [], [], None
        for step in range(n_draft):
            with evaluating(self.model), uncompiled():
                logits = self.model(torch.tensor([new], device=device), cache=cache, head=_last)  # (1, V)
            if answer.options.repetition_penalty != 1.0 and seen is None:
                seen = answer.seen(logits[0]).clone()[None]
            logits = process_logits(logits, answer.options, seen)
            if answer.options.greedy:
                token = int(logits.argmax())
            else:
                uniform = torch.tensor([answer.uniforms[2 * answer.limit + len(answer.ids) + step]])
                token = int(draw(logits, uniform))
                probabilities.append(logits[0].double().softmax(dim=-1))
            if seen is not None:
                seen[0, token] = True
            draft.append(token)
            new = [token]
        self._caches[request] = cache, [*ids, *draft[:-1]]
        return Draft(draft, torch.stack(probabilities) if probabilities else None)


def _last(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
    """Return the logits (1, V) behind the last token."""
    return output_logits(hidden[:, -1], output_weight)


def check_draft(answer: Answer, draft: Draft, logits: Tensor) -> Iterator[int]:
    """Yield the next tokens of an answer from the logits (k + 1, V) behind its last token and behind each guess.

    The caller adds each token to the answer before it asks for the next one. −1 where logits are not finite.
    """
    for index, row in enumerate(logits):
        guess = draft.ids[index] if index < len(draft.ids) else None
        if not bool(row.amax().isfinite()):
            yield -1
            return
        target = next_logits(answer, row)  # (V,)
        if answer.options.greedy:
            token = int(target.argmax())
        else:
            q = draft.probabilities[index] if guess is not None and draft.probabilities is not None else None
            token = _draw_or_keep(answer, target, guess, q)
        yield token
        if token != guess:
            return


def _draw_or_keep(answer: Answer, target: Tensor, guess: int | None, q: Tensor | None) -> int:
    """Return the guess, or a token drawn so that the result follows the distribution of ``target`` (V,)."""
    place = len(answer.ids)
    uniform = torch.tensor([answer.uniforms[place]], dtype=torch.float64)
    if guess is None:
        return int(draw(target[None], uniform))
    p = target.double().softmax(dim=-1)
    if q is None:
        q = torch.zeros_like(p)
        q[guess] = 1.0
    if answer.uniforms[answer.limit + place] * float(q[guess]) < float(p[guess]):
        return guess
    return int(draw((p - q).clamp(min=0).log()[None], uniform))


def n_uniforms(limit: int) -> int:
    """Return how many random numbers an answer of at most ``limit`` tokens needs: to draw, to keep, to guess."""
    return 3 * limit
