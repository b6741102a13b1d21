"""Tools: functions that a model may call, their calls in its answers, and the loop from a question to an answer."""

from minillm.serving.tools.functions import tool_schema
from minillm.serving.tools.loop import describe_message, tool_loop
from minillm.serving.tools.parse import ToolCallParser, parse_tool_calls
from minillm.serving.tools.toolbox import Toolbox, load_tools

__all__ = [
    "ToolCallParser", "Toolbox", "describe_message", "load_tools", "parse_tool_calls", "tool_loop", "tool_schema",
]  # fmt: skip
