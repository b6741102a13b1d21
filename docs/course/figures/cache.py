"""What a KV cache saves in work and costs in memory (chapter 9)."""

import torch

from figures.style import label_end
from minillm.config import ModelConfig
from minillm.model import KVCache, Transformer
from minillm.plan.parameters import meta_model

GIB = 2**30
LONGEST = 128 * 1024  # tokens
N_PROMPT, N_NEW = 10, 50


def compute() -> dict:
    """Return the positions computed for 50 new tokens, and the bytes of a cache of Llama 3.1 8B by kv heads."""
    shape = {
        "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 14336, "tie_word_embeddings": False,
    }  # fmt: skip
    lengths = [n * LONGEST // 8 for n in range(1, 9)]
    caches = {n: [_cache_bytes(ModelConfig(**shape, num_key_value_heads=n), t) / GIB for t in lengths]
              for n in (32, 8, 1)}  # fmt: skip
    weights = sum(p.numel() for p in meta_model(ModelConfig(**shape, num_key_value_heads=8)).parameters()) * 2 / GIB
    return {"positions": _positions(), "tokens": [n / 1024 for n in lengths], "caches": caches, "weights": weights}


def _cache_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Return the bytes of the cache of one text in bfloat16; none of them is allocated."""
    cache = KVCache(config, batch_size=1, max_len=n_tokens, device="meta", dtype=torch.bfloat16)
    return sum(tensor.nbytes for tensor in cache.keys + cache.values)


@torch.no_grad()
def _positions() -> dict[str, list[int]]:
    """Return how many positions went through a model after each new token, without a cache and with one."""
    model = Transformer(ModelConfig.preset("demo", num_hidden_layers=1)).eval()
    counted: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: counted.append(inputs[0].shape[1]))
    prompt = torch.zeros(1, N_PROMPT, dtype=torch.long)
    sums = {}
    for name in ("without", "with"):
        cache = KVCache(model.config, batch_size=1, max_len=N_PROMPT + N_NEW) if name == "with" else None
        counted.clear()
        ids = prompt
        for _ in range(N_NEW):
            new = model(ids, cache=cache)[:, -1:].argmax(dim=-1)  # (1, 1)
            ids = torch.cat([ids, new], dim=1) if cache is None else new
        sums[name] = torch.tensor(counted).cumsum(dim=0).tolist()
    return sums


def draw(figure, numbers, theme) -> None:
    """Draw the work on the left and the memory on the right."""
    figure.set_size_inches(figure.get_figwidth(), 3.3)
    left, right = figure.subplots(1, 2)
    steps = range(1, N_NEW + 1)
    for n, (name, values) in enumerate(numbers["positions"].items()):
        cache = "None" if name == "without" else "KVCache"
        color = theme.series[1 - n]
        left.plot(steps, values, color=color)
        left.text(N_NEW, values[-1] + 40, f"cache={cache}: {values[-1]:,}", ha="right", va="bottom", color=color)
    left.set_xlim(0, N_NEW)
    left.set_ylim(0, 2000)
    left.set_xlabel("max_new_tokens")
    left.set_ylabel("n_positions")
    for n, (heads, sizes) in enumerate(numbers["caches"].items()):
        color = theme.series[(1, 0, 2)[n]]
        right.plot([0, *numbers["tokens"]], [0, *sizes], color=color)
        label_end(right, numbers["tokens"][-1], sizes[-1], f"G = {heads}", color, annotation_clip=False)
    right.axhline(numbers["weights"], color=theme.muted, linestyle="--", linewidth=1.2)
    right.text(76, numbers["weights"] + 1, f"8B × bf16 = {numbers['weights']:.1f}", ha="center", color=theme.muted)
    right.set_xlim(0, numbers["tokens"][-1])
    right.set_xticks([0, 32, 64, 96, 128])
    right.set_ylim(0, 66)
    right.set_xlabel("max_len / 1024")
    right.set_ylabel("GiB")
    for axes in (left, right):
        axes.grid()
