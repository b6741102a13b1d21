"""Low-rank adaptation (LoRA): a few percent of the parameters learn what is new, the model stays as it is.

``core.py`` is the idea, complete and usable alone. ``more/`` builds on it; what is exported here is from there.
"""

from minillm.lora.core import LoRA, lora_parameters
from minillm.lora.more.adapters import delete_adapter, disable_lora, set_adapter
from minillm.lora.more.apply import add_adapter, apply_lora, remove_lora
from minillm.lora.more.config import LoRAConfig
from minillm.lora.more.files import load_lora, save_lora
from minillm.lora.more.merge import merge_lora, unmerge_lora

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
