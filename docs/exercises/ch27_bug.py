"""Chapter 27, exercise 3: find the silent bug. 第 27 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch27.py
"""


def buggy(stored, prompt, page_len):
    """Return how many pages a prompt can take over from ``stored``: both are lists of ids.

    At least one token of the prompt must be left to compute.

    返回 prompt 可以从 stored 接过来的页数；两者都是词元 id 的列表。prompt 至少要留一个词元来计算。
    """
    known = {tuple(stored[n : n + page_len]) for n in range(0, len(stored) - page_len + 1, page_len)}
    n_pages = 0
    for start in range(0, len(prompt) - page_len, page_len):
        if tuple(prompt[start : start + page_len]) not in known:
            break
        n_pages += 1
    return n_pages


def find_the_bug(n_shared):
    """Assert something that holds for a right ``n_shared(stored, prompt, page_len)`` and does not hold for ``buggy``.

    写断言：正确的 n_shared 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
