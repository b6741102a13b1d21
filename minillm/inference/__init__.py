"""Text from a trained model: sampling, batched generation, streaming."""

from minillm.inference.answer import Completion
from minillm.inference.generate import complete, generate, stream
from minillm.inference.sampling import SamplingOptions

__all__ = ["Completion", "SamplingOptions", "complete", "generate", "stream"]
