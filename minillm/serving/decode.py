"""Steps in which every request adds one token, made fast: they come in few shapes, again and again.

On a CPU most of the time of a small model goes into starting hundreds of small operations; the compiler makes a few
large ones of them. A larger model waits for its weights: a single request multiplies each of them once, and the loop
that the compiler writes for that reads memory several times faster than the library of matrix products, which is made
for many rows. On a GPU the launches are recorded once per shape and replayed (CUDA graphs). Either way it is the same
computation.

Shapes: b requests, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.serving.cache import PagedCache


class CompiledDecode:
    """Decode steps on a CPU. One compilation serves a single request, another any number of them.

    Args:
        run: takes the planned cache and its tokens (1, b), and returns logits (b, V).
    """

    def __init__(self, run: Callable[[PagedCache, Tensor], Tensor]):
        def run_with_dot_products(cache: PagedCache, tokens: Tensor) -> Tensor:
            with DotProducts():
                return run(cache, tokens)

        self._run = torch.compile(run_with_dot_products, dynamic=True)

    def shape(self, n_requests: int, n_pages: int) -> tuple[int, int]:
        """Return how many requests and pages to plan for: a single page would be compiled on its own."""
        return n_requests, max(n_pages, 2)

    def __call__(self, cache: PagedCache, tokens: Tensor) -> Tensor:
        return self._run(cache, tokens)


class DotProducts(TorchFunctionMode):
    """Inside, a linear layer on a single row is a dot product per output, for the compiler to make one loop of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and not torch.is_autocast_enabled("cpu"):
            x, weight, bias = (*args, None)[:3]  # (1, 1, D), (O, D), (O,) or None
            if x.numel() == weight.shape[1]:
                y = (weight * x.reshape(-1)).sum(-1)  # (O,)
                return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
        return func(*args, **kwargs or {})


class RecordedDecode:
    """Decode steps on a CUDA device, recorded for each power of two of requests and of pages."""

    def __init__(self, run: Callable[[PagedCache, Tensor], Tensor]):
        self._run = run
        self._recorded: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def shape(self, n_requests: int, n_pages: int) -> tuple[int, int]:
        """Return how many requests and pages to plan for."""
        return power_of_two(n_requests), power_of_two(n_pages)

    def __call__(self, cache: PagedCache, tokens: Tensor) -> Tensor:
        planned = (tokens, *cache.planned)
        shape = (tokens.shape[1], cache.page_groups[0].pages.shape[1])
        if shape not in self._recorded:
            self._recorded[shape] = self._record(cache, planned)
        graph, inputs, logits = self._recorded[shape]
        for static, new in zip(inputs, planned, strict=True):
            static.copy_(new)
        graph.replay()
        return logits

    def _record(self, cache: PagedCache, planned: tuple[Tensor, ...]) -> tuple:
        """Run the step twice, once to warm up on a stream of its own, once recorded, on copies that stay in place."""
        inputs = tuple(tensor.clone() for tensor in planned)
        cache.planned = inputs[1:]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(cache, inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(cache, inputs[0])
        return graph, inputs, logits


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
