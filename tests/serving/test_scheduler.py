"""The scheduler alone, without a model: random settings, arrivals, drafts, ends and cancellations."""

import random

import pytest

from minillm.inference import SamplingOptions
from minillm.inference.answer import Answer
from minillm.serving.pages import PagePool
from minillm.serving.request import Request
from minillm.serving.scheduler import Scheduler
from minillm.serving.speculate import Draft


def day(seed: int) -> Scheduler:
    """Run a scheduler with random settings until nothing is left; every step is checked."""
    rng = random.Random(seed)
    page_len, max_batch, max_tokens = rng.choice([1, 2, 3, 16]), rng.choice([1, 2, 8]), rng.choice([1, 2, 5, 30])
    pool = PagePool(-(-rng.choice([40, 60]) // page_len), page_len)
    most = pool.n_pages * page_len
    n_draft = rng.choice([0, 1, 3, 9])

    def propose(request: Request) -> Draft:  # depends on the request alone
        n = (request.number + request.n_tokens) % (n_draft + 1)
        return Draft([1] * min(n, request.n_allowed - 1))

    scheduler = Scheduler(pool, max_batch=max_batch, max_tokens=max_tokens, propose=propose)
    requests = []
    while len(requests) < 20 or scheduler.running or scheduler.waiting:
        if len(requests) < 20 and rng.random() < 0.5:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, most))]
            limit = rng.randrange(1, most - len(prompt) + 2)
            requests.append(Request(len(requests), Answer(prompt, limit=limit, options=SamplingOptions())))
            scheduler.waiting.append(requests[-1])
        if requests and rng.random() < 0.05 and requests[-1].finish_reason is None:
            requests[-1].answer.end("cancelled")
            scheduler.leave(requests[-1])
        shares = scheduler.next_step()
        assert bool(shares) == bool(scheduler.running or scheduler.waiting)
        assert sum(share.end - share.request.n_stored + len(share.draft.ids) for share in shares) <= max_tokens
        assert len(scheduler.running) <= max_batch
        for share in shares:
            assert len(share.request.pages) >= pool.n_needed(share.end + len(share.draft.ids))
            if not share.is_last:
                scheduler.stored(share.request, share.end)
                continue
            for _ in range(1 + rng.randrange(len(share.draft.ids) + 1)):
                share.request.answer.push(rng.randrange(2))
            scheduler.stored(share.request, share.request.n_tokens - 1)
            if share.request.finish_reason is not None:
                scheduler.leave(share.request)
        used = [page.number for request in scheduler.running for page in request.pages]
        assert pool.n_free + len(set(used)) == pool.n_pages
    assert pool.n_free == pool.n_pages
    assert all(request.finish_reason is not None for request in requests)
    return scheduler


@pytest.mark.parametrize("part", range(2))
def test_every_step_keeps_to_its_limits_and_gets_on(part):
    days = [day(seed) for seed in range(part * 50, part * 50 + 50)]
    assert sum(scheduler.n_preempted for scheduler in days) > 100
