"""Chapter 8, exercise 1. 第 8 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch08.py
"""


def rotate_pairs(x, positions, theta):
    """Return x (T, K) turned by RoPE: pair i of position p by the angle p · theta^(-2i/K), counter-clockwise.

    Number i is paired with number i + K/2, as in Hugging Face's weights.

    返回经 RoPE 旋转的 x (T, K)：位置 p 的第 i 对逆时针转过 p · theta^(-2i/K)；第 i 个数与第 i + K/2 个数是一对。

    Args:
        x: (T, K), K even 偶数. positions: (T,). theta: the chapter's base b 章节里的底数 b.
    """
    raise NotImplementedError
