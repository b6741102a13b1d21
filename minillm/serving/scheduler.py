"""Which requests compute which tokens in the next step.

Requests enter and leave between steps (continuous batching: Yu et al., Orca, 2022, section 3.2). A step has a budget of
tokens. First come the running requests that need a single token, so that answers keep flowing; then stretches of
prompts (chunked prefill: Agrawal et al., Sarathi-Serve, 2024, section 4); then requests that wait. When pages run out,
the youngest running request loses its pages and waits at the front; later its tokens are computed once more
(recomputation: Kwon et al., PagedAttention, 2023, section 4.5).
"""

from collections import deque
from typing import NamedTuple

from minillm.serving.pages import PagePool
from minillm.serving.request import Request
from minillm.serving.speculate import NO_DRAFT, Draft


class Share(NamedTuple):
    """A request's part of a step: its tokens from ``start`` to ``end``, then the draft, which it may yet reject."""

    request: Request
    start: int
    end: int
    draft: Draft

    @property
    def is_last(self) -> bool:
        """Return whether the share reaches the request's last token, so that the next one can be chosen."""
        return self.end == self.request.n_tokens

    @property
    def n_computed(self) -> int:
        """Return how many tokens of the step's budget it takes."""
        return self.end - self.start + len(self.draft.ids)


class Scheduler:
    """The waiting and the running requests, and their pages.

    Args:
        max_batch: most requests that run at once. max_tokens: budget of a step.
        propose: returns a draft for a request (``speculate.py``); None: no drafts.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, max_tokens: int, share_prefixes: bool = True, propose=None):
        self.pool, self.max_batch, self.max_tokens = pool, max_batch, max_tokens
        self.share_prefixes, self.propose = share_prefixes, propose
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.n_preempted = 0

    def next_step(self) -> list[Share]:
        """Return the shares of the next step; their pages are there."""
        shares: dict[int, Share] = {}
        budget = self.max_tokens
        for request in sorted(self.running, key=lambda r: (r.n_tokens - r.n_stored > 1, r.number)):
            if request in self.running:  # it may have lost its pages to an older one
                share = self._share(request, budget)
                if share is not None and self._make_room(request, share):
                    shares[request.number] = share
                    budget -= share.n_computed
                for number in set(shares) - {r.number for r in self.running}:
                    budget += shares.pop(number).n_computed
        while self.waiting and budget > 0 and len(self.running) < self.max_batch:
            request = self.waiting[0]
            self._find_prefix(request)
            share = self._share(request, budget)
            if share is None or self._n_missing(request, share) > self.pool.n_free:
                self._drop_pages(request)
                break
            self.waiting.popleft()
            self.running.append(request)
            self._take_pages(request, share)
            if not request.has_run:
                request.has_run, request.n_cached = True, request.n_stored
            shares[request.number] = share
            budget -= share.n_computed
        self.running.sort(key=lambda r: r.number)
        return list(shares.values())

    def leave(self, request: Request) -> None:
        """Remove a request and free its pages."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._drop_pages(request)

    def stored(self, request: Request, n_stored: int) -> None:
        """Note how many tokens of a request have keys and values now; its full pages can be shared.

        Pages that it took for tokens of a rejected draft stay its own; the next tokens need them.
        """
        request.n_stored = n_stored
        if not self.share_prefixes:
            return
        page_len, ids = self.pool.page_len, None
        while (request.n_shared + 1) * page_len <= n_stored:
            ids = request.ids if ids is None else ids
            n = request.n_shared
            before = request.pages[n - 1] if n else None
            self.pool.add(request.pages[n], ids[n * page_len : (n + 1) * page_len], before, request.root)
            request.n_shared += 1

    def _share(self, request: Request, budget: int) -> Share | None:
        """Return what ``request`` can compute with ``budget`` tokens; None: nothing.

        Whether there is a draft, and which, depends on the request alone: it always goes with the last token.
        """
        if budget < 1:
            return None
        n_missing = request.n_tokens - request.n_stored
        if n_missing > budget:
            return Share(request, request.n_stored, request.n_stored + budget, NO_DRAFT)
        draft = self.propose(request) if self.propose is not None else NO_DRAFT
        draft = draft._replace(ids=draft.ids[: self.max_tokens - 1])  # more would never find room
        if n_missing + len(draft.ids) > budget:  # the last token waits for a step that has room for both
            return Share(request, request.n_stored, request.n_tokens - 1, NO_DRAFT) if n_missing > 1 else None
        return Share(request, request.n_stored, request.n_tokens, draft)

    def _find_prefix(self, request: Request) -> None:
        """Give a request that has no pages those that hold its beginning already."""
        if self.share_prefixes and not request.pages:
            request.pages = self.pool.find(request.ids, request.root)
            request.n_shared = len(request.pages)
            request.n_stored = request.n_shared * self.pool.page_len

    def _n_missing(self, request: Request, share: Share) -> int:
        """Return the number of pages that a request lacks for its share."""
        return self.pool.n_needed(share.end + len(share.draft.ids)) - len(request.pages)

    def _take_pages(self, request: Request, share: Share) -> None:
        request.pages += [self.pool.take() for _ in range(self._n_missing(request, share))]

    def _make_room(self, request: Request, share: Share) -> bool:
        """Give a running request its pages, those of younger ones if need be; return whether it still runs."""
        while self._n_missing(request, share) > self.pool.n_free:
            youngest = max(self.running, key=lambda r: r.number)
            self.running.remove(youngest)
            self._drop_pages(youngest)
            self.waiting.appendleft(youngest)
            self.n_preempted += 1
            if youngest is request:
                return False
        self._take_pages(request, share)
        return True

    def _drop_pages(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.n_stored, request.n_shared = [], 0, 0
