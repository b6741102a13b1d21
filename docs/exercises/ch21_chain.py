"""Chapter 21, exercise 2. 第 21 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch21.py
"""


def expected_accuracy(n_operations, n_seen, n_steps, n_results):
    """Return the expected share of right answers, a float, of a learner by heart.

    It has seen n_seen operations, drawn evenly from n_operations with repetition. A problem needs n_steps of them;
    if it does not know all of these, its answer is a guess among n_results.

    返回死记硬背的学习者的期望正确率（浮点数）。它见过 n_seen 次单步运算，每次从 n_operations 种里均匀抽取（可重复）。
    一道题需要 n_steps 步；只要有一步不认识，答案就是从 n_results 种里猜的。
    """
    raise NotImplementedError
