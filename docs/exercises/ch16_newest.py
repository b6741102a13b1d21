"""Chapter 16, exercise 2. 第 16 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch16.py
"""


def newest_intact(directory):
    """Return the newest intact checkpoint, a Path, or None. directory: a Path with folders ``step-00000010``.

    A checkpoint is intact if it has a ``manifest.json`` and every file that this names exists and has its SHA-256:
    {"files": {"weights.bin": {"sha256": "..."}}}. Other folders do not count.

    返回最新的完好检查点（Path），没有则返回 None。directory 里有形如 step-00000010 的文件夹；
    完好指的是有 manifest.json，并且其中列出的每个文件都在，SHA-256 也相符。其他文件夹不算。
    """
    raise NotImplementedError
