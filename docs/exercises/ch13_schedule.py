"""Chapter 13, exercise 2. 第 13 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch13.py
"""


def cosine_factor(step, *, total_steps, warmup_steps, min_ratio):
    """Return the factor of the learning rate for update number ``step``, counted from 0 to total_steps - 1.

    It grows linearly during the warm-up, is 1 in the first update after it, and then falls along a half cosine to
    min_ratio in the last update.

    返回第 step 次更新（从 0 数到 total_steps - 1）的学习率系数：预热期线性增长，预热后的第一次更新是 1，
    然后沿半个余弦下降，最后一次更新恰好是 min_ratio。
    """
    raise NotImplementedError
