"""Chapter 10, exercise 1. 第 10 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch10.py
"""


def feed_forward(x, gate, up, down):
    """Return the SwiGLU layer of x, (..., D). 返回 x 经过 SwiGLU 层的结果 (..., D)。

    Args:
        x: (..., D). gate, up: (F, D), as ``nn.Linear`` stores them 与 nn.Linear 的存法相同. down: (D, F).
    """
    raise NotImplementedError
