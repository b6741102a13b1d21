"""Chapter 27, exercise 2. 第 27 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch27.py
"""


def after_rejection(p, q):
    """Return the distribution (V,) from which the token is drawn after a guess from ``q`` was rejected.

    返回来自 q 的猜测被拒绝之后，抽取词元所用的分布 (V,)。

    Args:
        p: the model's distribution, (V,). q: the guesser's, (V,), not equal to p. 模型的分布；猜测者的分布，与 p 不同。
    """
    raise NotImplementedError
