"""Many requests at once: an engine with pages of keys and values, and what stands in front of it."""

from minillm.serving.engine import Engine, Stats
from minillm.serving.request import LogProb, Piece, QueueFullError, Request
from minillm.serving.speculate import DraftModel, PromptLookup

__all__ = ["DraftModel", "Engine", "LogProb", "Piece", "PromptLookup", "QueueFullError", "Request", "Stats"]
