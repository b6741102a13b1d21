"""An engine: many requests at once, each answered as if it were alone.

    submit   check the prompt; the request waits
    step     the scheduler chooses who computes what; the model runs once over all those tokens;
             whoever has reached its last token gets the next one, and leaves if that ends it
    run      steps until nothing is left

Between two steps requests come, go and are cancelled. A greedy request gives the ids of ``generate``; a sampled one
follows its own seed. Neither depends on who else runs, but for the rounding of the logits.

Shapes: N tokens of one step, D hidden, V vocabulary; rows: the tokens behind which logits are needed.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.answer import NOT_FINITE, Constraint, new_answer, next_tokens
from minillm.inference.generate import evaluating, output_logits, uncompiled
from minillm.inference.sampling import SamplingOptions, row_uniforms
from minillm.inference.text import check_stop
from minillm.serving.adapters import ServedAdapters
from minillm.serving.cache import Chunk, PagedCache
from minillm.serving.decode import CompiledDecode, RecordedDecode
from minillm.serving.pages import SCRATCH, PagePool
from minillm.serving.request import MAX_LOGPROBS, LogProb, Piece, QueueFullError, Request, log_prob
from minillm.serving.scheduler import Scheduler, Share
from minillm.serving.speculate import Drafter, DraftModel, check_draft, n_uniforms

GREEDY = SamplingOptions(temperature=0)


@dataclass
class Stats:
    """Counts since the engine was made, and what it does now."""

    n_pages: int
    n_free_pages: int = 0
    n_running: int = 0
    n_waiting: int = 0
    n_steps: int = 0
    n_prompt_tokens: int = 0
    """Of the requests that have run."""
    n_cached_tokens: int = 0
    """Those of them that were found in shared pages."""
    n_new_tokens: int = 0
    n_preempted: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    """Tokens of drafts, and those that became part of an answer."""


class Engine:
    """Answers requests with pages of keys and values, continuous batches and shared prefixes.

    It belongs to one thread; only ``Request.cancel`` may be called from others.

    Args:
        model: a ``Transformer`` without adapter; it is in evaluation mode during each step.
        tokenizer: for text and stop strings; None: ids only.
        n_pages: pages for all requests; None: enough for ``max_batch`` of the model's positions, at most 65,536 tokens.
        page_len: tokens per page.
        max_batch: most requests that run at once.
        max_batch_tokens: most tokens of one step. A longer prompt is read in several steps, so that no answer waits.
        max_queue: most requests that wait; None: any number.
        drafter: guesses tokens that the model then checks together (``speculate.py``); None: one token per step.
        autocast: makes the context of each forward pass (``minillm.precision.autocast``).
        compile: make steps without prompts faster (``decode.py``): on a CPU they are compiled, which takes a minute
            when the first ones come; on a CUDA device they are recorded as graphs. Not so with adapters or drafts.

    Attributes:
        stats: a :class:`Stats`.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        n_pages: int | None = None,
        page_len: int = 16,
        max_batch: int = 64,
        max_batch_tokens: int = 512,
        max_queue: int | None = None,
        drafter: Drafter | None = None,
        autocast: Callable = contextlib.nullcontext,
        compile: bool = False,
    ):
        for name, value in (("max_batch", max_batch), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        config = model.config
        if isinstance(drafter, DraftModel) and drafter.model.config.vocab_size != config.vocab_size:
            raise UserError(
                f"the draft model has {drafter.model.config.vocab_size} tokens and the model {config.vocab_size}: take "
                f"one with the same tokenizer"
            )
        is_alone = (config.rope_scaling or {}).get("rope_type") == "dynamic"
        if is_alone:  # its angles depend on the longest sequence of a pass, and stored keys keep theirs
            if drafter is not None:
                raise UserError(
                    "with rope_type dynamic a draft would change the angles of the answer before it: take no drafter"
                )
            max_batch, max_batch_tokens = 1, config.max_position_embeddings
        if n_pages is None:
            n_tokens = min(max_batch * config.max_position_embeddings, 65_536)
            n_pages = -(-max(n_tokens, config.max_position_embeddings) // max(page_len, 1))
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.device = next(model.parameters()).device
        self.pool = PagePool(n_pages, page_len)
        self.cache = PagedCache(config, n_pages + 1, page_len, device=self.device)
        self.adapters = ServedAdapters(model)
        self.drafter, self.autocast = drafter, autocast
        self.scheduler = Scheduler(
            self.pool,
            max_batch=max_batch,
            max_tokens=max_batch_tokens,
            share_prefixes=not is_alone,
            propose=drafter.propose if drafter is not None else None,
        )
        self._decode = None
        if compile:
            self._decode = (RecordedDecode if self.device.type == "cuda" else CompiledDecode)(self._decode_logits)
        self.stats = Stats(n_pages=n_pages)
        self._n_requests = 0
        self._count()

    # ---- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingOptions = GREEDY,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        adapter: str | None = None,
        n_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """Return a request that waits for the next step.

        Args:
            seed: of its random numbers; None: drawn from torch's generator.
            eos_token_id: id or ids that end the answer; None: those of the model's configuration, ``()``: none.
            adapter: name given to ``add_adapter``; None: the model alone.
            n_logprobs: each piece has the log-probabilities of its ids and of this many most probable ones.
            constraint: what the answer may contain.

        Raises:
            UserError: a value out of range; a prompt that is empty, too long or of another vocabulary; no such adapter.
            QueueFullError: ``max_queue`` requests wait already.
        """
        if self.max_queue is not None and len(self.scheduler.waiting) >= self.max_queue:
            raise QueueFullError(f"{self.max_queue} requests are waiting already (max_queue): try again later")
        if n_logprobs is not None and not 0 <= n_logprobs <= MAX_LOGPROBS:
            raise UserError(f"n_logprobs {n_logprobs}: must lie between 0 and {MAX_LOGPROBS}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise UserError(f"seed {seed}: must lie between -2**63 and 2**64 - 1")
        if adapter is not None:
            self.adapters.check_known(adapter)
        prompt_ids = list(prompt_ids)  # the caller may go on with its own list
        answer = new_answer(
            self.model.config,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            options=sampling,
            eos_token_id=eos_token_id,
            stop=check_stop(stop, self.tokenizer),
            tokenizer=self.tokenizer,
            constraint=constraint,
        )
        n_needed = self.pool.n_needed(len(prompt_ids) + answer.limit - 1)  # the last token's keys are never needed
        if n_needed > self.pool.n_pages:
            raise UserError(
                f"prompt and answer of {len(prompt_ids)} + {answer.limit} tokens need {n_needed} pages, the engine has "
                f"{self.pool.n_pages} of {self.pool.page_len} tokens: ask for fewer tokens (max_new_tokens), or start "
                f"it with more pages (n_pages)"
            )
        if not sampling.greedy:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            answer.uniforms = row_uniforms(1, n_uniforms(answer.limit), generator)[0].tolist()
        request = Request(self._n_requests, answer, adapter, n_logprobs, root=self.adapters.root(adapter))
        self._n_requests += 1
        self.scheduler.waiting.append(request)
        self._count()
        return request

    def add_adapter(self, name: str, source: str | Path) -> None:
        """Load an adapter (a directory of peft, a file of ``save_lora``) under a name that requests can give."""
        self.adapters.add(name, source)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; UserError while requests use it."""
        if any(request.adapter == name for request in (*self.scheduler.running, *self.scheduler.waiting)):
            raise UserError(f"adapter {name!r} is in use: wait for its requests, or cancel them")
        self.adapters.remove(name)

    @property
    def adapter_names(self) -> list[str]:
        """Return the adapters that requests can name."""
        return list(self.adapters.layers)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Return whether a request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def run(self) -> None:
        """Answer all requests."""
        while self.has_work:
            self.step()

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Run the model once; return what requests gained, those included that ended."""
        pieces = self._end_cancelled()
        shares = self.scheduler.next_step()
        if shares:
            shares.sort(key=lambda share: share.request.adapter or "")  # those of one adapter stand together
            logits = self._forward(shares)
            self.stats.n_steps += 1
            for share in shares:
                if not share.is_last:
                    self.scheduler.stored(share.request, share.end)
        pieces += self._advance([share for share in shares if share.is_last], logits) if shares else []
        self._count()
        return pieces

    def _forward(self, shares: Sequence[Share]) -> Tensor:
        """Return the logits (rows, V) behind the last token of each share that reaches it, and behind its draft."""
        chunks = []
        for share in shares:
            request = share.request
            ids = [*request.ids[share.start : share.end], *share.draft.ids]
            chunks.append(Chunk(ids, share.start, [page.number for page in request.pages]))
        if self._can_decode(shares, chunks):
            return self._decoded(chunks)
        tokens = self.cache.plan(chunks)  # (1, N)
        rows = [
            end - back
            for share, end in zip(shares, self.cache.ends.tolist(), strict=True)
            if share.is_last
            for back in range(len(share.draft.ids), -1, -1)
        ]
        rows = torch.tensor(rows, dtype=torch.long, device=self.device)

        def head(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
            return output_logits(hidden[0, rows], output_weight)  # (1, N, D) → (rows, D) → (rows, V)

        lengths = [(share.request.adapter, len(chunk.ids)) for share, chunk in zip(shares, chunks, strict=True)]
        with evaluating(self.model), uncompiled(), self.autocast(), self.adapters.active(lengths):
            return self.model(tokens, cache=self.cache, head=head)

    def _can_decode(self, shares: Sequence[Share], chunks: Sequence[Chunk]) -> bool:
        """Return whether a step is one token per request, without anything special."""
        is_plain = self._decode is not None and not self.adapters.layers
        return is_plain and all(
            share.is_last and len(chunk.ids) == 1 for share, chunk in zip(shares, chunks, strict=True)
        )

    def _decoded(self, chunks: list[Chunk]) -> Tensor:
        """Return the logits (N, V) behind chunks of one token; the batch is filled up with tokens of nobody."""
        n_needed = max(self.pool.n_needed(chunk.start + 1) for chunk in chunks)
        n_requests, n_pages = self._decode.shape(len(chunks), n_needed)
        filled = [*chunks, *[Chunk([0], 0, [SCRATCH])] * (n_requests - len(chunks))]
        tokens = self.cache.plan(filled, n_pages=n_pages)
        with evaluating(self.model), self.autocast():
            return self._decode(self.cache, tokens)[: len(chunks)]

    def _decode_logits(self, cache: PagedCache, tokens: Tensor) -> Tensor:
        return self.model(tokens, cache=cache, head=_all_logits)

    def _advance(self, shares: Sequence[Share], logits: Tensor) -> list[Piece]:
        """Give each share's request its next tokens; free the pages of those that end."""
        pieces, first = [], 0
        for share, token in zip(shares, self._next_tokens(shares, logits), strict=True):
            request, n_draft = share.request, len(share.draft.ids)
            rows = logits[first : first + n_draft + 1]  # (k + 1, V)
            first += n_draft + 1
            if not request.new_ids:  # its prompt has been read now
                self.stats.n_prompt_tokens += len(request.prompt_ids)
                self.stats.n_cached_tokens += request.n_cached
            tokens = check_draft(request.answer, share.draft, rows) if n_draft else [token]
            pieces.append(self._push(request, tokens, rows))
            self.stats.n_drafted += n_draft
            self.stats.n_accepted += sum(a == b for a, b in zip(pieces[-1].ids, share.draft.ids, strict=False))
            if request.finish_reason == "error":  # nobody may read its keys; pages that others read were not its own
                self.cache.clear(self.pool.forget(request.pages))
            else:
                self.scheduler.stored(request, request.n_tokens - 1)
            if request.finish_reason is not None:
                self._leave(request)
        return pieces

    def _next_tokens(self, shares: Sequence[Share], logits: Tensor) -> list[int | None]:
        """Return the next token of each share without a draft, all in one go, and None for the others."""
        if not any(share.draft.ids for share in shares):
            return next_tokens([share.request.answer for share in shares], logits)
        ends = torch.tensor([len(share.draft.ids) + 1 for share in shares]).cumsum(0).tolist()
        plain = [i for i, share in enumerate(shares) if not share.draft.ids]
        tokens: list[int | None] = [None] * len(shares)
        if plain:
            rows = logits[[ends[i] - 1 for i in plain]]
            for i, token in zip(plain, next_tokens([shares[i].request.answer for i in plain], rows), strict=True):
                tokens[i] = token
        return tokens

    def _push(self, request: Request, tokens: Iterable[int], logits: Tensor) -> Piece:
        """Append tokens until one ends the answer; each row of logits (k + 1, V) gave one."""
        ids, text, log_probs = [], "", list[LogProb]()
        for token, row in zip(tokens, logits, strict=False):
            if token < 0:
                request.error = NOT_FINITE.format(len(request.new_ids) + 1)
                text += request.answer.end("error")
                break
            text += request.answer.push(token)
            ids.append(token)
            if request.n_logprobs is not None:
                log_probs.append(log_prob(row, token, request.n_logprobs))
            if request.finish_reason is not None:
                break
        self.stats.n_new_tokens += len(ids)
        return Piece(request, ids, text, log_probs)

    def _end_cancelled(self) -> list[Piece]:
        pieces = []
        for request in [r for r in (*self.scheduler.running, *self.scheduler.waiting) if r.is_cancelled]:
            pieces.append(Piece(request, [], request.answer.end("cancelled"), []))
            self._leave(request)
        return pieces

    def _leave(self, request: Request) -> None:
        self.scheduler.leave(request)
        if self.drafter is not None:
            self.drafter.forget(request)

    def _count(self) -> None:
        self.stats.n_free_pages, self.stats.n_preempted = self.pool.n_free, self.scheduler.n_preempted
        self.stats.n_running, self.stats.n_waiting = len(self.scheduler.running), len(self.scheduler.waiting)


def _all_logits(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
    """Return the logits (N, V) of all tokens (1, N)."""
    return output_logits(hidden[0], output_weight)
