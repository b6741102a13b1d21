"""Chapter 1, exercise 2. 第 1 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch01.py
"""


def floor(records, encode):
    """Return the lowest loss, in nats per token, that a model can have on average over ``records``.

    返回模型在这些记录上平均能达到的最低损失，单位是每词元奈特。

    Args:
        records: list of {"text": str, "log_prob": float}; log_prob is the natural logarithm of the text's probability.
        encode: function from a text to its list of ids. A model must also predict the end of each text, one token.
    """
    raise NotImplementedError
