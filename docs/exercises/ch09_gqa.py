"""Chapter 9, exercise 2. 第 9 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch09.py
"""


def share_heads(keys, n_heads):
    """Return (B, H, S, K): for each of H = n_heads query heads the key head that it uses; neighbours share.

    返回 (B, H, S, K)：H = n_heads 个 query 头各自所用的 key 头，相邻的头共用一个。

    Args:
        keys: (B, G, S, K); n_heads is a multiple of G. n_heads 是 G 的倍数。
    """
    raise NotImplementedError
