"""Chapter 19, exercise 3: find the silent bug. 第 19 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch19.py
"""


def buggy(log_probs, targets):
    """Return the log-probability of each row's answer, (B,).

    Args:
        log_probs: (B, T), log p(target). targets: (B, T), -100 where there is no target (then log_probs is 0).
    """
    is_target = targets != -100
    return (log_probs * is_target).sum(dim=1) / is_target.sum(dim=1).clamp(min=1)


def find_the_bug(answer_log_prob):
    """Assert something that holds for a right ``answer_log_prob(log_probs, targets)`` and not for ``buggy``.

    写断言：正确的 answer_log_prob 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
