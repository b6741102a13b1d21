"""``ChatModel``: a model that answers, with its tokenizer, its name, and the way its prompts are written."""

from dataclasses import dataclass
from typing import Any

from minillm.data.reasoning import DIRECT
from minillm.inference.thinking import NO_THOUGHTS
from minillm.tokenizer import Tokenizer, encode_chat, encode_started
from minillm.tokenizer.chat_format import chat_format


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model in a chat."""

    model: Any
    """A ``Transformer``, or a module that is called like one."""
    tokenizer: Tokenizer
    name: str = ""
    """Where it came from, as ``/model`` takes it."""
    lora_name: str = ""
    """The adapters merged into it, as ``/lora`` takes them."""
    completes_text: bool = False
    """It continues plain text and knows no conversation: a pretrained model."""

    @property
    def opens_with(self) -> str:
        """Return the beginning of the answer that the model's chat template puts into the prompt."""
        return "" if self.completes_text else chat_format(self.tokenizer).opens_with

    @property
    def direct_start(self) -> str:
        """Return the beginning of an answer without thinking; "" if the tokenizer does not know the tags."""
        if not self.tokenizer.has_token("<think>"):
            return ""
        return DIRECT if self.tokenizer.has_token("<answer>") else f"{NO_THOUGHTS}\n\n"

    def encode(self, messages: list[dict], *, tools: list[dict] | None = None, start: str = "") -> list[int]:
        """Return the ids of the prompt for the answer to ``messages``.

        Args:
            tools: functions that the model may call, in OpenAI's form.
            start: the beginning of the answer, which the model continues.

        Raises:
            UserError: the chat template does not accept the conversation.
        """
        if self.completes_text:
            text = "\n".join(message.get("content") or "" for message in messages)
            return self.tokenizer.open_document(self.tokenizer.encode(text))
        if start:
            return encode_started(self.tokenizer, [messages], start=start, tools=[tools])[0]
        return encode_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=True)[0]
