"""Attention over pages against one query and one head at a time, and against the cache of a single sequence."""

import torch

from minillm.config import ModelConfig
from minillm.kernels.paged_attention import paged_attention, plain_paged_attention
from minillm.model import KVCache, Transformer
from minillm.serving.cache import Chunk, PagedCache


def shape(**overrides) -> ModelConfig:
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ModelConfig(**(sizes | {"num_key_value_heads": 2, "max_position_embeddings": 64} | overrides))


def planned(config: ModelConfig, chunks: list[Chunk]) -> tuple[PagedCache, torch.Tensor]:
    """Return a cache of 12 pages with 3 slots each, planned for ``chunks``, and the tokens."""
    cache = PagedCache(config, 12, 3, device=torch.device("cpu"))
    return cache, cache.plan(chunks)


def test_equals_the_plain_expression():
    torch.manual_seed(0)
    for window in (None, 4):
        config = shape(sliding_window=window)
        mixed = [Chunk([1] * 5, 0, [4, 7]), Chunk([2], 6, [3, 1, 9]), Chunk([3] * 4, 2, [2, 5]), Chunk([4], 0, [8])]
        alone = [Chunk([1], 6, [4, 7, 1]), Chunk([2], 0, [3]), Chunk([3], 3, [2, 5])]
        for chunks in (mixed, alone):
            cache, tokens = planned(config, chunks)
            q = torch.randn(1, 4, tokens.shape[1], 6, dtype=torch.float64)
            keys, values = torch.randn(2, 12, 3, 2, 6, dtype=torch.float64)
            ours = paged_attention(q, keys, values, cache.page_groups)
            torch.testing.assert_close(ours, plain_paged_attention(q, keys, values, cache.page_groups))


def test_a_chunked_prompt_equals_one_pass():
    torch.manual_seed(1)
    model = Transformer(shape(initializer_range=0.3)).double().eval()
    ids = torch.randint(31, (1, 17))
    with torch.no_grad():
        whole = model(ids, cache=KVCache(model.config, batch_size=1, max_len=17))
        cache = PagedCache(model.config, 12, 3, device=torch.device("cpu"))
        parts = []
        for start, end in ((0, 5), (5, 6), (6, 13), (13, 17)):
            tokens = cache.plan([Chunk(ids[0, start:end].tolist(), start, [7, 2, 11, 4, 9, 1])])
            parts.append(model(tokens, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
