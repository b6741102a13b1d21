"""What clients send: OpenAI's requests, as far as this server knows them.

The fields have OpenAI's names; ``top_k``, ``min_p`` and ``repetition_penalty`` are those of vLLM and llama.cpp. None
means that the client left a field out, or sent null. Unknown fields are ignored, because clients send many. FastAPI
checks types, ``options.py`` checks values.

These are plain dataclasses, so that no module needs pydantic to be imported.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class ContentPart:
    """A part of a message whose content is a list; only texts can be read."""

    type: str
    text: str | None = None


@dataclass(kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(kw_only=True)
class StreamOptions:
    """How an answer is streamed."""

    include_usage: bool | None = None


@dataclass(kw_only=True)
class JsonSchema:
    """The schema of an answer in JSON."""

    name: str | None = None
    schema: dict[str, Any] = field(default_factory=dict)
    strict: bool | None = None


@dataclass(kw_only=True)
class ResponseFormat:
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


@dataclass(kw_only=True)
class GenerationRequest:
    """What both kinds of requests have."""

    model: str | None = None
    """The model or one of its adapters (``/v1/models`` lists them); without it the model."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


@dataclass(kw_only=True)
class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


@dataclass(kw_only=True)
class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


_TYPES = (ContentPart, Message, StreamOptions, JsonSchema, ResponseFormat, ChatRequest, CompletionRequest)
FIELD_NAMES = frozenset(member.name for kind in _TYPES for member in dataclasses.fields(kind))
