"""Chapter 9, exercise 3: find the silent bug. 第 9 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch09.py
"""

import torch

from minillm.config import ModelConfig
from minillm.model import KVCache, Transformer


def small_model():
    """Return a model to test with; it has 64 tokens. 返回一个测试用的模型，词表有 64 个词元。"""
    torch.manual_seed(0)
    config = ModelConfig.preset("demo", vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    return Transformer(config).eval()


@torch.no_grad()
def buggy(model, prompt, new):
    """Return the logits (1, P + N, V) of a prompt (1, P) and of new tokens (1, N) that are put in one by one.

    返回提示 (1, P) 与随后逐个送入的新词元 (1, N) 的 logits，形状 (1, P + N, V)。
    """
    cache = KVCache(model.config, batch_size=1, max_len=prompt.shape[1] + new.shape[1])
    logits = [model(prompt, cache=cache)]
    for t in range(new.shape[1]):
        position_ids = torch.tensor([[prompt.shape[1] + t + 1]])
        logits.append(model(new[:, t : t + 1], cache=cache, position_ids=position_ids))
    return torch.cat(logits, dim=1)


def find_the_bug(decode):
    """Assert something that holds for a right ``decode(model, prompt, new)`` and does not hold for ``buggy``.

    写断言：正确的 decode 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
