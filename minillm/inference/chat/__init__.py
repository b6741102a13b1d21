"""A chat in the terminal: ``chat`` reads questions and commands, and a ``ChatSession`` answers them.

loop.py          reads and answers until the user leaves
lines.py         what is typed: history, texts of several lines
commands.py      /system, /model, /save and the others
session.py       the state of a chat; one answer
conversation.py  questions and answers, their part in a prompt, their file
model.py         the model with its tokenizer, and how its prompts are written
output.py        an answer on the screen
"""

from minillm.inference.chat.loop import chat
from minillm.inference.chat.model import ChatModel
from minillm.inference.chat.output import speed
from minillm.inference.chat.session import ChatSession

__all__ = ["ChatModel", "ChatSession", "chat", "speed"]
