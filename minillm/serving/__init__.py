"""Many requests at once: an engine with pages of keys and values, and what stands in front of it."""

from minillm.serving.api import create_app
from minillm.serving.engine import Engine, Stats
from minillm.serving.request import LogProb, Piece, QueueFullError, Request
from minillm.serving.speculate import DraftModel, PromptLookup
from minillm.serving.tools import parse_tool_calls, tool_loop

__all__ = [
    "DraftModel", "Engine", "LogProb", "Piece", "PromptLookup", "QueueFullError", "Request", "Stats", "create_app",
    "parse_tool_calls", "tool_loop",
]  # fmt: skip
