"""Chapter 13, exercise 1. 第 13 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch13.py
"""


def adamw_step(weight, grad, m, v, *, step, lr, weight_decay, betas=(0.9, 0.95), eps=1e-8):
    """Return (weight, m, v) after update number ``step``, counted from 1; all are tensors of one shape.

    m and v are the running averages of the gradient and of its square, without bias correction. Decay is decoupled, and
    comes before the update.

    返回第 step 次更新（从 1 数起）之后的 (weight, m, v)。m 和 v 是梯度与梯度平方的滑动平均，
    不含偏差修正；权重衰减与梯度解耦，先衰减，再更新。
    """
    raise NotImplementedError
