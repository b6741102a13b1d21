"""Chapter 28, exercise 2. 第 28 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch28.py
"""


def run_call(functions, name, arguments):
    """Return the result of a call as a text; of a call that fails, ``error: `` and the reason. Never raise.

    返回调用结果的文本；失败时返回 ``error: `` 加原因。绝不抛出异常。

    Args:
        functions: from name to function. arguments: JSON text of an object, as a model has written it.
            名字到函数的字典；模型写的 JSON 文本，应为一个对象。
    """
    raise NotImplementedError
