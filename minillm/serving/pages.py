"""Pages of keys and values: who has which, and which prefixes are there already.

A page holds the keys and values of ``page_len`` consecutive tokens, of every layer. A request has as many pages as its
tokens need, anywhere in memory, so that nothing is reserved for tokens that may never come (Kwon et al.,
PagedAttention, 2023, section 4.2). What a page holds depends on its tokens and on all tokens before them, so a full
page is known by its *prefix*: the prefix of the page before it, and its own tokens. Requests with the same prefix share
its pages (section 4.4). A page without users keeps its content until the space is needed; the one unused longest goes
first.

Page 0 belongs to nobody: what is computed only to fill up a batch is written there.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from minillm.errors import UserError

SCRATCH = 0


@dataclass
class Page:
    """One page: its number, who uses it, and what it holds once it is full."""

    number: int
    n_users: int = 0
    key: tuple | None = None
    """Where it is found: (prefix before it, its tokens); None until it is full."""
    prefix: int | None = None
    """Number of the prefix that ends with this page; never used again for another one."""


class PagePool:
    """The pages of an engine.

    Args:
        n_pages: pages that requests can have; there is one more, page 0.
    """

    def __init__(self, n_pages: int, page_len: int):
        if n_pages < 1 or page_len < 1:
            raise UserError(f"n_pages {n_pages}, page_len {page_len}: both must be at least 1")
        self.n_pages, self.page_len = n_pages, page_len
        self._free: OrderedDict[int, Page] = OrderedDict((n, Page(n)) for n in range(1, n_pages + 1))
        self._known: dict[tuple, Page] = {}  # a dict compares keys whole where their hashes agree
        self._n_prefixes = 0

    @property
    def n_free(self) -> int:
        """Return the number of pages without users."""
        return len(self._free)

    def n_needed(self, n_tokens: int) -> int:
        """Return the number of pages for ``n_tokens``."""
        return -(-n_tokens // self.page_len)

    def take(self) -> Page:
        """Return an empty page for one user; there must be a free one. What it held is forgotten."""
        _, page = self._free.popitem(last=False)
        page.n_users = 1
        self.forget([page])
        return page

    def release(self, pages: Sequence[Page]) -> None:
        """Take one user from each page. The last ones of a request go first when space is needed."""
        for page in reversed(pages):
            page.n_users -= 1
            if page.n_users == 0:
                self._free[page.number] = page

    def forget(self, pages: Sequence[Page]) -> list[int]:
        """Let nobody find those of ``pages`` that have a single user; return their numbers."""
        own = [page for page in pages if page.n_users == 1]
        for page in own:
            if page.key is not None:
                del self._known[page.key]
            page.key, page.prefix = None, None
        return [page.number for page in own]

    def find(self, ids: Sequence[int], root: Hashable) -> list[Page]:
        """Return the pages that hold the beginning of ``ids``, each with one user more.

        At least one token is left over: somebody has to compute the logits behind the last one.

        Args:
            root: what else the content depends on, such as the adapter; not a number.
        """
        pages: list[Page] = []
        prefix: Hashable = root
        for start in range(0, len(ids) - self.page_len, self.page_len):
            page = self._known.get((prefix, tuple(ids[start : start + self.page_len])))
            if page is None:
                break
            pages.append(page)
            prefix = page.prefix
        for page in pages:
            page.n_users += 1
            self._free.pop(page.number, None)
        return pages

    def add(self, page: Page, ids: Sequence[int], before: Page | None, root: Hashable) -> None:
        """Let others find a page that is full now, with the tokens ``ids``; ``before`` is the request's page before it.

        Where another page has the same content, that one is found. Both are the same prefix for the pages behind them.
        """
        prefix = root if before is None else before.prefix
        key = (prefix, tuple(ids))
        if key in self._known:
            page.prefix = self._known[key].prefix
        else:
            self._n_prefixes += 1
            page.key, page.prefix = key, self._n_prefixes
            self._known[key] = page
