"""From messages or texts to prompt ids."""

from minillm.serving.api.errors import ApiError
from minillm.serving.api.schema import Message
from minillm.tokenizer import Tokenizer, encode_chat

KEPT = ("reasoning_content", "tool_calls", "tool_call_id", "name")


def encode_messages(tokenizer: Tokenizer, messages: list[Message], tools: list[dict] | None) -> list[int]:
    """Return the ids of a conversation, with an open answer at the end.

    Raises:
        UserError, ApiError: a conversation that the template cannot write, or content that is not text.
    """
    turns = [_as_turn(index, message) for index, message in enumerate(messages)]
    return encode_chat(tokenizer, turns, tools=tools or None, add_generation_prompt=True)[0]


def encode_prompts(tokenizer: Tokenizer, prompt: str | list) -> list[list[int]]:
    """Return the ids of each prompt of a completion. A text begins a document; ids are taken as they are.

    Names of special tokens in a text stay ordinary text, as everywhere in minillm.

    Raises:
        UserError, ApiError: no prompt, or a text that cannot be encoded.
    """
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or not all(isinstance(one, str) or one for one in prompt):
        raise ApiError(400, "prompt is empty: give a text, a list of texts, ids, or a list of lists of ids",
                       param="prompt")  # fmt: skip
    return [tokenizer.open_document(tokenizer.encode(one)) if isinstance(one, str) else one for one in prompt]


def _as_turn(index: int, message: Message) -> dict:
    """Return a message as ``encode_chat`` takes it."""
    turn: dict = {"role": "system" if message.role == "developer" else message.role}
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                place = f"messages.{index}.content.{number}"
                raise ApiError(400, f"{place}: only parts with type text can be read, not {part.type}", param=place)
        content = "\n".join(part.text for part in content)
    if content is not None or message.role != "assistant":
        turn["content"] = content
    return turn | {name: value for name in KEPT if (value := getattr(message, name)) is not None}
