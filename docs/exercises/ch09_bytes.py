"""Chapter 9, exercise 1. 第 9 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch09.py
"""


def cache_bytes(config, *, n_rows, n_tokens, bytes_per_number):
    """Return the bytes of the keys and values of n_rows texts of n_tokens each, in all layers.

    返回 n_rows 段文本（每段 n_tokens 个词元）在所有层里的 key 与 value 一共占多少字节。

    Args:
        config: a ``minillm.config.ModelConfig``; its ``head_dim`` need not be hidden_size / num_attention_heads.
            它的 head_dim 不一定等于 hidden_size / num_attention_heads。
    """
    raise NotImplementedError
