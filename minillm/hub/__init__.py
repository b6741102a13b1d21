"""Models on disk: Hugging Face directories, bare state dicts, and what people call them."""

from minillm.hub.huggingface import load_model, save_model
from minillm.hub.open import open_model

__all__ = ["load_model", "open_model", "save_model"]
