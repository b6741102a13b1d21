"""Models on disk: Hugging Face directories, plain state dicts, GGUF, and the names that the command line accepts."""

from minillm.hub.gguf import export_gguf
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.open import open_model

__all__ = ["export_gguf", "load_model", "open_model", "save_model"]
