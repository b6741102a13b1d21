"""Chapter 20, exercise 3: find the silent bug. 第 20 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch20.py
"""


def buggy(student_logits, teacher_logits):
    """Return the forward divergence KL(teacher || student) of every position, (n,). Both logits: (n, V)."""
    q, p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def find_the_bug(forward_divergence):
    """Assert something that is true of a right ``forward_divergence`` and not of ``buggy`` (same arguments).

    写断言：正确的 forward_divergence 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
