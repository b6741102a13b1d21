"""Chapter 7, exercise 1. 第 7 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch07.py
"""


def attention(q, k, v):
    """Return causal attention, (B, H, T, K), without torch's ``scaled_dot_product_attention``.

    返回因果注意力 (B, H, T, K)，不许用 torch 的 scaled_dot_product_attention。

    Args:
        q, k, v: (B, H, T, K) each; the query at position t sees the keys at 0 to t.
            位置 t 的 query 能看到 0 到 t 的 key。
    """
    raise NotImplementedError
