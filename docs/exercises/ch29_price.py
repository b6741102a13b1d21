"""Chapter 29, exercise 1. 第 29 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch29.py
"""


def hours_and_price(*, n_parameters, n_tokens, peak, mfu, n_gpus, price):
    """Return (hours, price) of a training run by the rule 6ND. 按 6ND 返回一次训练的（小时数，总价）。

    Args:
        peak: FLOP/s of one GPU. 一块 GPU 的峰值（FLOP/s）。
        mfu: the share of it that the model's own operations reach. 模型自身的运算达到峰值的比例。
        price: of one GPU for one hour. 一块 GPU 一小时的价格。
    """
    raise NotImplementedError
