"""Chapter 7, exercise 3: find the silent bug. 第 7 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch07.py
"""

import torch


def buggy(q, k, v):
    """Return causal attention (B, H, T, K) of the *last* T positions of a text. k, v: (B, H, S, K), S >= T.

    返回一段文本*最后* T 个位置的因果注意力；k、v 是整段文本的，S >= T。
    """
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, S)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def find_the_bug(attention):
    """Assert something that holds for a right ``attention(q, k, v)`` and does not hold for ``buggy``.

    写断言：正确的 attention 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
