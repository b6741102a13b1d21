"""Low-rank adaptation (LoRA): a few percent of the parameters learn what is new, the model stays as it is."""

from minillm.lora.adapters import delete_adapter, disable_lora, set_adapter
from minillm.lora.config import LoRAConfig
from minillm.lora.files import load_lora, save_lora
from minillm.lora.inject import add_adapter, apply_lora, lora_parameters, remove_lora
from minillm.lora.layer import LoRA
from minillm.lora.merge import merge_lora, unmerge_lora

__all__ = [
    "LoRA",
    "LoRAConfig",
    "add_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_lora",
    "load_lora",
    "lora_parameters",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_adapter",
    "unmerge_lora",
]
