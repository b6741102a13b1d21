"""Chapter 11, exercise 2. 第 11 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch11.py
"""


def load_of_experts(chosen, is_token, n_experts):
    """Return (E,) float: how often each expert was chosen, in units of the mean over all experts. Padding is left out.

    返回 (E,) 浮点张量：每个专家被选中的次数，以全体专家的平均次数为单位。填充不算。

    Args:
        chosen: (N, k) numbers of experts 专家编号. is_token: (N,) bool, false for padding 填充处为假. n_experts: E.
    """
    raise NotImplementedError
