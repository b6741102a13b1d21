"""Chapter 7, exercise 2. 第 7 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch07.py
"""


def mask_of_documents(document_ids):
    """Return (B, 1, T, T) bool, true where query t (third dimension) may look at key s (last dimension).

    A query sees the keys of its own document up to its own position. Padding has the number -1 and sees itself alone,
    because a softmax over no key at all is 0 / 0.

    返回布尔张量 (B, 1, T, T)：第三维的 query t 可以看最后一维的 key s 时为真。query 只能看自己文档里、不晚于自己的
    key。填充的编号是 -1，它只能看自己：如果一个 key 都看不到，softmax 就成了 0 / 0。

    Args:
        document_ids: (B, T) whole numbers, equal within a document. (B, T) 整数，同一文档内相等。
    """
    raise NotImplementedError
