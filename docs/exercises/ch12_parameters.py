"""Chapter 12, exercise 1. 第 12 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch12.py
"""


def num_parameters(*, vocab, dim, n_layers, n_heads, n_kv_heads, head_dim, ff_dim, is_tied):
    """Return the number of parameters of a dense model without biases; head_dim need not be dim / n_heads.

    is_tied: the embedding matrix is also the output layer.

    返回一个没有偏置的稠密模型的参数量；head_dim 不一定等于 dim / n_heads。is_tied：词嵌入矩阵同时是输出层。
    """
    raise NotImplementedError
