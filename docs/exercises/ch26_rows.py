"""Chapter 26, exercise 2. 第 26 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch26.py
"""


def row_order(n_heads, head_dim):
    """Return the order of the rows for RoPE on neighbours, a list of ints: ``weight[order]`` is written to the file.

    返回行的次序（整数列表），使得 RoPE 旋转相邻两维：写进文件的是 weight[order]。

    Args:
        n_heads, head_dim: the projection has n_heads · head_dim rows, head by head, each for RoPE on halves.
            投影矩阵的行逐头排列，每个头按前后两半旋转。
    """
    raise NotImplementedError
