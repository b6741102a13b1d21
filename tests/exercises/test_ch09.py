"""Exercises of chapter 9: the size of a cache, shared heads, and a position that is off by one after the prompt."""

import torch

from minillm.config import ModelConfig
from minillm.model import KVCache
from tests.exercises.kit import exercise, find_the_bug, yours

WIDE = ModelConfig(  # 6 query heads of width 32, 192 numbers, in a stream of 96
    hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=32, use_qk_norm=True
)  # fmt: skip


def library_bytes(config, *, n_rows, n_tokens, bytes_per_number):
    dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}[bytes_per_number]
    cache = KVCache(config, batch_size=n_rows, max_len=n_tokens, dtype=dtype)
    return sum(tensor.nbytes for tensor in cache.keys + cache.values)


def times(factor):
    return lambda config, **sizes: library_bytes(config, **sizes) * factor(config)


def width_of_stream(config):
    return config.hidden_size / config.num_attention_heads / config.head_dim


@exercise(
    "ch09_bytes",
    solution=library_bytes,
    wrong={
        "only keys": (times(lambda config: 0.5), "a key and a value"),
        "a key head per query head": (
            times(lambda config: config.num_attention_heads / config.num_key_value_heads),
            "share",
        ),
        "one layer": (times(lambda config: 1 / config.num_hidden_layers), "every layer"),
        "width from the stream": (times(width_of_stream), "head_dim"),
    },
)
def test_cache_bytes(candidate):
    sizes = {"n_rows": 1, "n_tokens": 1, "bytes_per_number": 2}
    plain = ModelConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    assert candidate(plain, **sizes) == 2 * 64 * 2, "each token leaves a key and a value, here of 2 heads of width 32"
    deep = ModelConfig(hidden_size=64, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2)
    assert candidate(deep, **sizes) == 5 * 2 * 64 * 2, "every layer has its own keys and values"
    grouped = ModelConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1)
    assert candidate(grouped, **sizes) == 2 * 16 * 2, "query heads share key heads: count num_key_value_heads"
    expected = 2 * 3 * 2 * 32 * 4 * 5 * 7
    assert candidate(WIDE, n_rows=5, n_tokens=7, bytes_per_number=4) == expected, (
        "the width of a key is the configuration's head_dim; rows and tokens multiply"
    )


def tiled(keys, n_heads):
    return keys.repeat(1, n_heads // keys.shape[1], 1, 1)


def along_positions(keys, n_heads):
    return keys.repeat_interleave(n_heads // keys.shape[1], dim=2)


def first_only(keys, n_heads):
    return keys[:, :1].expand(-1, n_heads, -1, -1)


@exercise(
    "ch09_gqa",
    solution=lambda keys, n_heads: keys.repeat_interleave(n_heads // keys.shape[1], dim=1),
    wrong={
        "tiled": (tiled, "neighbours"),
        "along the positions": (along_positions, "shape"),
        "one for all": (first_only, "neighbours"),
        "not repeated": (lambda keys, n_heads: keys, "shape"),
    },
)
def test_share_heads(candidate):
    torch.manual_seed(0)
    keys = torch.arange(2.0)[None, :, None, None].expand(1, 2, 5, 3)  # key head g holds the number g
    shared = candidate(keys, 6)
    assert shared.shape == (1, 6, 5, 3), "the shape is (B, H, S, K): heads are repeated, positions are not"
    assert shared[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1], "neighbours share: query head h uses key head h // J"
    keys = torch.randn(2, 3, 4, 5)
    assert torch.equal(candidate(keys, 3), keys), "as many key heads as query heads: nothing to share"


@torch.no_grad()
def right_decode(model, prompt, new):
    cache = KVCache(model.config, batch_size=1, max_len=prompt.shape[1] + new.shape[1])
    logits = [model(prompt, cache=cache)]
    logits += [model(new[:, t : t + 1], cache=cache) for t in range(new.shape[1])]
    return torch.cat(logits, dim=1)


def compare(decode, prompt, new):
    model = yours("ch09_bug", "small_model")()
    with torch.no_grad():
        expected = model(torch.cat([prompt, new], dim=1))
    logits = decode(model, prompt, new)
    assert torch.allclose(logits, expected, atol=1e-4), "decoding is not the forward pass of the whole text"


def finder(decode):
    compare(decode, torch.tensor([[5, 9, 2, 7]]), torch.tensor([[1, 8, 3]]))


def prompt_only(decode):
    compare(decode, torch.tensor([[5, 9, 2, 7]]), torch.zeros(1, 0, dtype=torch.long))


def one_token(decode):
    compare(decode, torch.full((1, 4), 7), torch.full((1, 3), 7))  # equal values: their mean needs no positions


def shape(decode):
    prompt, new = torch.tensor([[5, 9, 2, 7]]), torch.tensor([[1, 8, 3]])
    assert decode(yours("ch09_bug", "small_model")(), prompt, new).shape == (1, 7, 64)


test_find_the_bug = find_the_bug(
    "ch09_bug",
    right=right_decode,
    finder=finder,
    wrong={"prompt only": prompt_only, "one token repeated": one_token, "shape": shape},
    hint="it hides in the prompt's logits, and with a single new token repeated",
)
