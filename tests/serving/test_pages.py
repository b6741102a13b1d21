"""Pages: what is found again, what is forgotten, and that nothing is lost."""

import random

import pytest

from minillm.errors import UserError
from minillm.serving.pages import PagePool

ROOT = (None,)


def fill(pool: PagePool, ids: list[int], root=ROOT) -> list:
    """Return the pages of a request that has stored ``ids``; the full ones can be found."""
    pages = pool.find(ids, root)
    known = len(pages)
    pages += [pool.take() for _ in range(pool.n_needed(len(ids)) - known)]
    for index in range(known, len(ids) // pool.page_len):
        own = ids[index * pool.page_len : (index + 1) * pool.page_len]
        pool.add(pages[index], own, pages[index - 1] if index else None, root)
    return pages


def test_a_prefix_is_shared_by_content():
    pool = PagePool(10, 4)
    first = fill(pool, list(range(11)))  # two full pages and three tokens
    second = fill(pool, [*range(8), 99, 98])
    assert [page.number for page in second[:2]] == [page.number for page in first[:2]]
    assert second[2] is not first[2]
    assert pool.n_free == 10 - 4
    assert fill(pool, [*range(4), 5, 5, 5, 5, 5])[0] is first[0]  # the first page alone


def test_a_page_is_known_by_all_tokens_before_it():
    pool = PagePool(10, 2)
    fill(pool, [1, 2, 7, 8, 0])
    other = fill(pool, [3, 4, 7, 8, 0])
    assert pool.find([1, 2, 7, 8, 0], ROOT)[1] is not other[1]


def test_the_last_token_is_never_found():
    pool = PagePool(10, 4)
    fill(pool, list(range(8)))
    assert len(pool.find(list(range(8)), ROOT)) == 1
    assert len(pool.find(list(range(9)), ROOT)) == 2
    assert pool.find([0, 1, 2, 3], ROOT) == []


def test_adapters_share_nothing():
    pool = PagePool(10, 2)
    fill(pool, [1, 2, 3], root=("a", 1))
    assert pool.find([1, 2, 3], ("b", 1)) == pool.find([1, 2, 3], ("a", 2)) == []
    assert len(pool.find([1, 2, 3], ("a", 1))) == 1


def test_freed_pages_are_found_until_their_space_is_needed():
    pool = PagePool(4, 2)
    old, new = fill(pool, [1, 2, 3, 4]), fill(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.n_free == 4
    assert pool.take() is old[1]  # the end of what was unused longest
    found = pool.find([1, 2, 3, 4, 0], ROOT)
    assert found == [old[0]]
    assert pool.n_free == 2


def test_equal_pages_of_two_requests_are_one_prefix():
    pool = PagePool(10, 2)
    pages = [[pool.take(), pool.take()] for _ in range(2)]  # both were computed in the same step
    for own in pages:
        pool.add(own[0], [1, 2], None, ROOT)
    pool.add(pages[1][1], [3, 4], pages[1][0], ROOT)
    assert pool.find([1, 2, 3, 4, 5], ROOT) == [pages[0][0], pages[1][1]]


def test_hash_collisions_are_compared():
    class Same(int):
        def __hash__(self):
            return 1

    pool = PagePool(10, 2)
    fill(pool, [Same(1), Same(2), Same(3)])
    assert pool.find([Same(4), Same(5), Same(6)], ROOT) == []


def test_random_use_loses_nothing():
    rng, pool, held = random.Random(0), PagePool(30, 3), []
    for _ in range(2000):
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        if pool.n_free >= pool.n_needed(len(ids)):
            held.append(fill(pool, ids))
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        users = [page.number for pages in held for page in pages]
        assert pool.n_free == 30 - len(set(users))
    for pages in held:
        pool.release(pages)
    assert pool.n_free == 30


def test_bad_sizes():
    with pytest.raises(UserError, match="n_pages 0"):
        PagePool(0, 16)
