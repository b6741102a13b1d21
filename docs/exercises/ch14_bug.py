"""Chapter 14, exercise 3: find the silent bug. 第 14 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch14.py
"""


def buggy(scaled_gradient, scale, max_norm):
    """Return the gradient (n,) without the loss scale, clipped to a norm of at most max_norm."""
    norm = float(scaled_gradient.norm())
    clipped = scaled_gradient * min(1.0, max_norm / (norm + 1e-6))
    return clipped / scale


def find_the_bug(unscale_and_clip):
    """Assert something that holds for a right ``unscale_and_clip(scaled_gradient, scale, max_norm)``, not for buggy.

    写断言：正确的 unscale_and_clip 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
