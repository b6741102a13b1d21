"""Chapter 20, exercise 1. 第 20 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch20.py
"""


def soft_loss(student_logits, teacher_logits, temperature):
    """Return T² times the divergence KL(teacher || student) of every position, (n,), both softened by T.

    返回每个位置上 T² 乘以 KL(教师 || 学生)，(n,)；两个分布都用 T 软化。

    Args:
        student_logits, teacher_logits: (n, V).
    """
    raise NotImplementedError
