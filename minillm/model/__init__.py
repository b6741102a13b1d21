"""The model: a decoder-only transformer written by hand, with Hugging Face's parameter names."""

from minillm.model.kv_cache import KVCache
from minillm.model.router_stats import RouterStats
from minillm.model.transformer import Transformer

__all__ = ["KVCache", "RouterStats", "Transformer"]
