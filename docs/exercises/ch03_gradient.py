"""Chapter 3, exercise 1. 第 3 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch03.py
"""


def table_gradient(ids, grad, vocab_size):
    """Return the gradient (V, D) of an embedding table.

    返回嵌入表的梯度 (V, D)。

    Args:
        ids: (T,) the tokens that were looked up. grad: (T, D) the loss's gradient at their embeddings. vocab_size: V.
    """
    raise NotImplementedError
