"""How many positions have their logits in memory at a time: one rule for all losses.

A chunk's logits are n·V numbers. On a CPU few positions are best, because the numbers then stay in the cache. A GPU
wants at least 1,024: each chunk reads the whole output weight (V, D) and adds to the whole of its gradient, which for a
vocabulary of 150,000 is more traffic than a short chunk's product takes time.
"""

from collections.abc import Iterator

import torch

MIN_POSITIONS_ON_GPU = 1024


def chunk_len(n_tokens: int, *, numel: int, device_type: str) -> int:
    """Return the positions of a chunk.

    Args:
        n_tokens: V. numel: logits that a chunk should have at most, where that is enough positions.
    """
    length = max(1, numel // n_tokens)
    return max(length, MIN_POSITIONS_ON_GPU) if device_type == "cuda" else length


def chunks(n_positions: int, n_tokens: int, *, numel: int, device: torch.device) -> Iterator[slice]:
    """Yield the slices that ``n_positions`` are worked on in."""
    length = chunk_len(n_tokens, numel=numel, device_type=device.type)
    return (slice(start, start + length) for start in range(0, n_positions, length))
