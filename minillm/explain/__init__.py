"""What happens between a text and the next token, with the numbers of a real model."""

from minillm.explain.trace import Part, Trace, trace

__all__ = ["Part", "Trace", "trace"]
