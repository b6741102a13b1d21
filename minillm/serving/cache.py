"""The keys and values of all requests, and the plan of one forward pass over some of them.

Legend: N tokens of one pass, G kv heads, K head width; of one group: b requests, T queries each, P pages each, L slots
per page, S = P·L keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.kernels.paged_attention import PageGroup


class Chunk(NamedTuple):
    """New tokens of one request: ``ids`` at the positions from ``start`` on, with the pages of all up to their end."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]


class PagedCache:
    """Keys and values (pages, L, G, K) per layer. The model uses it like a ``KVCache``; ``plan`` says what comes next.

    They have the dtype in which the model makes them; under autocast that is not the weights'.

    Args:
        n_pages: page 0 included.
    """

    mask, is_causal = None, False  # a ``KVCache`` has these instead of groups

    def __init__(self, config: ModelConfig, n_pages: int, page_len: int, *, device: torch.device):
        self.page_len, self.device, self.window = page_len, device, config.sliding_window
        self._shape = (n_pages, page_len, config.num_key_value_heads, config.head_dim)
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers

    def plan(self, chunks: Sequence[Chunk], *, n_pages: int = 1) -> Tensor:
        """Plan one forward pass; return its tokens, (1, N): the chunks one behind the other.

        Args:
            n_pages: attention reads at least so many pages per request.

        Afterwards ``position_ids`` is (1, N), and ``ends`` (chunks,) says where in the row each chunk's last token is.
        """
        lengths = [len(chunk.ids) for chunk in chunks]
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.ids))]
        slots = [
            chunk.pages[p // self.page_len] * self.page_len + p % self.page_len
            for chunk in chunks
            for p in range(chunk.start, chunk.start + len(chunk.ids))
        ]
        self.position_ids = torch.tensor([positions], device=self.device)
        self._slots = torch.tensor(slots, device=self.device)  # (N,)
        self.ends = torch.tensor(starts[1:], device=self.device) - 1
        if all(length == 1 for length in lengths):
            self.page_groups = [self._group(chunks, None, n_pages)]
        else:
            self.page_groups = [
                self._group([chunks[i] for i in rows], [starts[i] for i in rows], n_pages) for rows in _alike(chunks)
            ]
        return torch.tensor([[token for chunk in chunks for token in chunk.ids]], device=self.device)

    @property
    def planned(self) -> tuple[Tensor, ...]:
        """Return (or set) all tensors of the plan of a pass with one token per request, but for the tokens."""
        (group,) = self.page_groups
        return self.position_ids, self._slots, group.pages, group.mask

    @planned.setter
    def planned(self, tensors: tuple[Tensor, ...]) -> None:
        """Put other tensors of the same shapes in their place."""
        self.position_ids, self._slots, pages, mask = tensors
        self.page_groups = [PageGroup(None, None, pages, mask)]

    def _group(self, chunks: Sequence[Chunk], starts: list[int] | None, n_pages: int) -> PageGroup:
        """Return the group of these chunks, which begin at ``starts`` in the row; None: one token each, in order."""
        n_pages = max(n_pages, *(-(-(chunk.start + len(chunk.ids)) // self.page_len) for chunk in chunks))
        pages = torch.tensor([[*chunk.pages[:n_pages], *[0] * (n_pages - len(chunk.pages))] for chunk in chunks])
        lengths = torch.tensor([len(chunk.ids) for chunk in chunks])
        steps = torch.arange(int(lengths.max())).minimum(lengths[:, None] - 1)  # (b, T), the last one repeated
        positions = torch.tensor([chunk.start for chunk in chunks])[:, None] + steps
        keys = torch.arange(n_pages * self.page_len)  # (S,)
        is_seen = keys <= positions[..., None]  # (b, T, S)
        if self.window is not None:
            is_seen &= keys > positions[..., None] - self.window
        mask = torch.zeros(is_seen.shape).masked_fill_(~is_seen, float("-inf"))[:, None]
        queries = None if starts is None else (torch.tensor(starts)[:, None] + steps).to(self.device)
        n_queries = None if starts is None or int(lengths.min()) == steps.shape[1] else lengths.to(self.device)
        return PageGroup(queries, n_queries, pages.to(self.device), mask.to(self.device))

    def clear(self, pages: Sequence[int]) -> None:
        """Set pages to zero: masked keys are still multiplied, and what is not finite would reach other requests."""
        for layer in filter(None, self._layers):
            for pool in layer:
                pool[list(pages)] = 0

    def begin(self, seq_len: int, document_ids: None) -> None:
        """Do nothing: ``plan`` has planned this pass."""

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer, each (1, G, N, K); return those of all pages, (pages, L, G, K)."""
        if self._layers[layer] is None:
            self._layers[layer] = tuple(keys.new_zeros(self._shape) for _ in range(2))
        for pool, new in zip(self._layers[layer], (keys, values), strict=True):
            pool.view(-1, *pool.shape[2:]).index_copy_(0, self._slots, new[0].transpose(0, 1).to(pool.dtype))
        return self._layers[layer]

    def end(self) -> None:
        """Do nothing: the engine counts what is stored."""


def _alike(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Return the indices of the chunks in groups: those whose lengths and contexts are within the same powers of two.

    A group is computed as one batch, as long and as wide as its longest member; so at most half of either is wasted.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, chunk in enumerate(chunks):
        length, context = len(chunk.ids), chunk.start + len(chunk.ids)
        key = (0, 0) if length == 1 else (length.bit_length(), context.bit_length())
        groups.setdefault(key, []).append(index)
    return list(groups.values())
