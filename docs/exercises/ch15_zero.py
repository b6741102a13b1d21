"""Chapter 15, exercise 1. 第 15 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch15.py
"""


def zero_bytes(n_parameters, *, stage, ranks):
    """Return the bytes of one rank for weights (2 per parameter), gradients (2) and optimizer (12) under ZeRO.

    Stage 0 shares nothing, 1 the optimizer, 2 the gradients too, 3 the weights too.

    返回 ZeRO 各阶段一个进程的字节数：每个参数的权重 2、梯度 2、优化器 12。
    阶段 0 什么都不分，1 分优化器，2 再分梯度，3 再分权重。
    """
    raise NotImplementedError
