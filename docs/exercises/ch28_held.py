"""Chapter 28, exercise 1. 第 28 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch28.py
"""


def n_held_back(text, stop):
    """Return how many characters at the end of ``text`` must be held back: they may be the beginning of ``stop``.

    返回 text 末尾必须扣住几个字符：它们可能是 stop 的开头。

    Args:
        text: does not contain ``stop``. 不含 stop。
    """
    raise NotImplementedError
