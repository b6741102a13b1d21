"""Models on disk: Hugging Face directories, plain state dicts, and the names that the command line accepts."""

from minillm.hub.huggingface import load_model, save_model
from minillm.hub.open import open_model

__all__ = ["load_model", "open_model", "save_model"]
