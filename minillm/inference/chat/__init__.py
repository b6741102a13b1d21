"""A chat in the terminal: ``chat`` reads questions and commands, and streams the answers of a ``ChatModel``."""

from minillm.inference.chat.loop import chat
from minillm.inference.chat.model import ChatModel
from minillm.inference.chat.output import speed

__all__ = ["ChatModel", "chat", "speed"]
