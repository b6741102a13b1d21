"""The shape of a model: ``ModelConfig``, its presets, and the Hugging Face families in which it is stored."""

from minillm.config.model_config import PRESETS, ModelConfig

__all__ = ["PRESETS", "ModelConfig"]
