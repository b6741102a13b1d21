"""Chapter 8, exercise 2. 第 8 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch08.py
"""


def turns_seen(head_dim, theta, length):
    """Return a list of head_dim / 2 floats: how many turns each pair makes from position 0 to position ``length``.

    A pair with less than one turn meets new angles when the context grows.

    返回 head_dim / 2 个浮点数的列表：从位置 0 走到位置 length，每一对转了多少圈。不足一圈的，上下文变长时就会遇到
    新的角度。

    Args:
        theta: the base b of the chapter, ``rope_theta`` 章节里的底数 b.
    """
    raise NotImplementedError
