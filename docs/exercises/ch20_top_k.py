"""Chapter 20, exercise 2. 第 20 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch20.py
"""


def top_k_divergence(teacher, student, k):
    """Return KL(teacher || student), a float, where all tokens but the teacher's k best count as one.

    返回 KL(教师 || 学生)（浮点数）：除教师最好的 k 个词元外，其余的并成一个。

    Args:
        teacher, student: (V,), probabilities above 0. k: 1 to V - 1.
    """
    raise NotImplementedError
