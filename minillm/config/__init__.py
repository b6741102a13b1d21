"""What a model looks like: ``ModelConfig``, its presets, and the families of Hugging Face that hold it on disk."""

from minillm.config.model_config import PRESETS, ModelConfig

__all__ = ["PRESETS", "ModelConfig"]
