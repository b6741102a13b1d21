"""From a question to an answer by way of tools: the model calls, the functions run, the model reads the results.

    user       What is 23*45?
    assistant  <tool_call>{"name": "calculate", "arguments": {"expression": "23*45"}}</tool_call>
    tool       1035
    assistant  23*45=1035

Terminal, server and page use this loop; what differs is ``generate_reply``.
"""

from collections.abc import Callable, Iterator, Sequence

from minillm.errors import UserError
from minillm.serving.tools.parse import parse_tool_calls
from minillm.serving.tools.toolbox import Toolbox


def tool_loop(
    generate_reply: Callable[[list[dict], list[dict]], str | dict],
    messages: Sequence[dict],
    tools: Toolbox | Sequence[Callable],
    *,
    max_rounds: int = 5,
) -> Iterator[dict]:
    """Yield the messages that follow ``messages``: calls and their results in turn, and at last the answer.

    Each message comes as soon as it is complete. If the model still calls after ``max_rounds`` rounds, these calls are
    not run: their results say so, and the messages end with them instead of an answer. The conversation stays complete
    either way: every call has a result.

    Args:
        generate_reply: takes the conversation and the tools in OpenAI's form, and returns the text of the assistant's
            reply, calls included; or the message, if a server has found the calls already. It may show the text
            meanwhile (``ToolCallParser`` hides the calls). What it raises ends the loop.
        messages: the conversation up to the question.
        tools: a ``Toolbox``, or functions for one with the default limits.
        max_rounds: of calls; the calls of one reply are a round.

    Raises:
        UserError: ``max_rounds`` below 1, or tools that cannot be described; at the call.
    """
    if max_rounds < 1:
        raise UserError(f"max_rounds {max_rounds}: must be at least 1")
    toolbox = tools if isinstance(tools, Toolbox) else Toolbox(tools)
    return _messages(generate_reply, list(messages), toolbox, max_rounds)


def _messages(generate_reply, conversation: list[dict], toolbox: Toolbox, max_rounds: int) -> Iterator[dict]:
    def added(message: dict) -> dict:
        conversation.append(message)
        return message

    for n_rounds in range(max_rounds + 1):
        reply = generate_reply(list(conversation), toolbox.schemas)
        message = reply if isinstance(reply, dict) else _parsed(reply, toolbox)
        yield added(message)
        if not message.get("tool_calls"):
            return
        for call in message["tool_calls"]:
            is_allowed = n_rounds < max_rounds
            result = toolbox.run(call) if is_allowed else f"error: not run, after {max_rounds} rounds of calls"
            name = call["function"]["name"]
            yield added({"role": "tool", "tool_call_id": call["id"], "name": name, "content": result})


def _parsed(reply: str, toolbox: Toolbox) -> dict:
    content, calls = parse_tool_calls(reply, tools=toolbox.schemas)
    if not calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content or None, "tool_calls": calls}


def describe_message(message: dict) -> str:
    """Return one of the messages as text for a terminal: the content, and a line for each call.

    >>> describe_message({"role": "tool", "name": "add", "content": "3"})
    '[add: 3]'
    """
    if message["role"] == "tool":
        return f"[{message['name']}: {message['content']}]"
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    lines = [f"[{function['name']} {function['arguments']}]" for function in functions]
    return "\n".join(filter(None, [message["content"], *lines]))
