"""Chapter 23, exercise 3: find the silent bug. 第 23 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch23.py
"""


def buggy(log_probs, ids, first):
    """Return the log-likelihood of the answer ``ids[first:]``, a float.

    Args:
        log_probs: (T, V), row t is what the model says behind ids[t]. ids: (T,), prompt and answer.
        first: at least 1.
    """
    return float(sum(log_probs[t, ids[t]] for t in range(first, len(ids))))


def find_the_bug(log_likelihood):
    """Assert something that holds for a right ``log_likelihood(log_probs, ids, first)`` and not for ``buggy``.

    写断言：正确的 log_likelihood 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
