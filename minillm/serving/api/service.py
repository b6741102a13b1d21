"""What the endpoints do: a request becomes prompts, runs in the engine, and comes back whole or as events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from minillm.inference import SamplingOptions
from minillm.serving.api import answers, options
from minillm.serving.api.errors import CLIENT_LEFT, ApiError
from minillm.serving.api.guard import Trace
from minillm.serving.api.metrics import Metrics
from minillm.serving.api.parsing import AnswerParser, join_deltas
from minillm.serving.api.prompts import encode_messages, encode_prompts
from minillm.serving.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from minillm.serving.api.worker import EngineWorker, Stream, Update
from minillm.serving.constraint import ConstraintMaker, TokenConstraint
from minillm.tokenizer.chat_format import chat_format

KEEP_ALIVE_S = 15.0  # a stream without news sends a comment: proxies close silent connections


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server behaves; ``create_app`` takes them as keyword arguments."""

    model_name: str = "minillm"
    """Name of the model itself; adapters have their own."""
    api_key: str = ""
    """Clients must send this key; "": anybody may ask."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """For requests that leave these fields out."""
    max_new_tokens: int | None = None
    """Longest answer of a chat that gives no limit; None: as many as there are positions."""
    max_body_bytes: int = 4 * 2**20
    """Longest body of a request."""
    send_timeout_s: float = 60.0
    """A client that reads nothing for so long is given up."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may ask from a browser, such as "http://localhost:3000", or "*"."""
    log_content: bool = False
    """Also log what was asked and answered."""


@dataclass
class _Choice:
    """One answer of a request while it is written."""

    parser: AnswerParser
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    finish_reason: str | None = None
    n_characters: int = 0
    """Of the tokens that were listed with log-probabilities, in a streamed completion."""


@dataclass
class Job:
    """A request in the engine, and how its answers are written."""

    stream: Stream
    envelope: answers.Envelope
    trace: Trace
    choices: list[_Choice]
    n_choices: int
    """Answers to each prompt."""
    is_streamed: bool
    has_logprobs: bool
    with_usage: bool


class Service:
    """Starts requests and writes their answers."""

    def __init__(self, engine, worker: EngineWorker, metrics: Metrics, settings: ServerOptions):
        self.engine, self.worker, self.metrics, self.settings = engine, worker, metrics, settings
        self.tokenizer = engine.tokenizer
        self.created = int(time.time())
        n_stored = engine.pool.n_pages * engine.pool.page_len + 1  # the last token needs no keys
        self.max_len = min(engine.model.config.max_position_embeddings, n_stored)
        self.constraints = ConstraintMaker(self.tokenizer)

    # ---- models and health ------------------------------------------------------------------------------------------

    def models(self) -> list[dict]:
        """Return the entries of ``/v1/models``: the model, then its adapters."""
        base = self.settings.model_name
        parents = {base: None} | dict.fromkeys(self.engine.adapter_names, base)
        return [answers.model_card(n, self.created, max_len=self.max_len, parent=p) for n, p in parents.items()]

    def model(self, name: str) -> dict:
        """Return the entry of one model; ApiError if there is none."""
        for card in self.models():
            if card["id"] == name:
                return card
        raise self._unknown(name)

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a model's name means; None for the model itself.

        Raises:
            ApiError: there is no such model.
        """
        if not name or name == self.settings.model_name:
            return None
        if name in self.engine.adapter_names:
            return name
        raise self._unknown(name)

    def _unknown(self, name: str) -> ApiError:
        known = ", ".join([self.settings.model_name, *self.engine.adapter_names])
        message = f"there is no model '{name[:100]}'; this server has: {known}"
        return ApiError(404, message, param="model", code="model_not_found")

    def health(self) -> str:
        """Return ok, ending or failed."""
        return self.worker.state

    # ---- from a request to the engine -------------------------------------------------------------------------------

    async def start_chat(self, body: ChatRequest, trace: Trace) -> Job:
        """Start the answers to a conversation.

        Raises:
            UserError, ApiError: a wrong value, an unknown model, a full queue.
        """
        tools, forced = options.chosen_tools(body)
        ids = await asyncio.to_thread(encode_messages, self.tokenizer, body.messages, tools)
        constraint = await self._constraint(body, forced)
        opened = None
        if constraint is None and self.tokenizer.has_token("<think>"):
            opened = chat_format(self.tokenizer).opens_with
        parser_settings = {"opened": opened, "tools": tools}
        return await self._start(body, [ids], constraint, trace, parser_settings)

    async def start_completion(self, body: CompletionRequest, trace: Trace) -> Job:
        """Start the continuations of one or several prompts; errors as for ``start_chat``."""
        options.check_completion(body)
        prompts = await asyncio.to_thread(encode_prompts, self.tokenizer, body.prompt)
        constraint = await self._constraint(body, None)
        return await self._start(body, prompts, constraint, trace, {"opened": None, "tools": None})

    async def _start(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        constraint: TokenConstraint | None,
        trace: Trace,
        parser_settings: dict,
    ) -> Job:
        adapter = self.adapter_of(body.model)
        n_choices, n_logprobs = options.n_choices(body, len(prompts)), options.n_logprobs(body)
        common = {
            "sampling": options.sampling_options(body, self.settings.sampling),
            "stop": options.stop_strings(body),
            "eos_token_id": self.tokenizer.end_ids,
            "adapter": adapter,
            "n_logprobs": n_logprobs,
        }
        seeds = options.seeds(body, n_choices)
        requests = []
        for prompt in prompts:
            limit = options.max_new_tokens(body, self.settings.max_new_tokens, self._n_free(body, prompt))
            for seed in seeds:
                own = None if constraint is None else constraint.copy()
                requests.append(
                    {"prompt_ids": prompt, "max_new_tokens": limit, "seed": seed, "constraint": own, **common}
                )
        trace.stream = await self.worker.submit(requests)
        is_chat = isinstance(body, ChatRequest)
        answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{trace.id}"
        job = Job(
            stream=trace.stream,
            envelope=answers.Envelope(answer_id, model=adapter or self.settings.model_name, is_chat=is_chat),
            trace=trace,
            choices=[_Choice(AnswerParser(**parser_settings)) for _ in requests],
            n_choices=n_choices,
            is_streamed=bool(body.stream),
            has_logprobs=n_logprobs is not None,
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        trace.describe = lambda: self._describe(job, body)
        return job

    def _n_free(self, body: GenerationRequest, prompt: Sequence[int]) -> int:
        """Return how many tokens an answer to ``prompt`` may have."""
        n_free = self.max_len - len(prompt)
        if n_free < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.max_len} tokens, answer included. However, your prompt "
                f"has {len(prompt)} tokens: shorten it.",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return n_free

    async def _constraint(self, body: GenerationRequest, forced: list[dict] | None) -> TokenConstraint | None:
        """Return what the answers may contain: JSON, JSON of a schema, or a call of one of ``forced``."""
        wanted = body.response_format
        if wanted is not None and wanted.type != "text":
            if getattr(body, "tools", None) and body.tool_choice != "none":
                message = "response_format goes without tools: leave one out, or give tool_choice none"
                raise ApiError(400, message, param="response_format")
            schema = {"type": "object"}
            if wanted.type == "json_schema":
                if wanted.json_schema is None:
                    message = "response_format.json_schema: is required with type json_schema"
                    raise ApiError(400, message, param="response_format.json_schema")
                schema = wanted.json_schema.schema
            return await asyncio.to_thread(self.constraints.json, schema)
        return None if forced is None else await asyncio.to_thread(self.constraints.tool_call, forced)

    # ---- from the engine to the client ------------------------------------------------------------------------------

    async def whole(self, job: Job) -> dict:
        """Return the answer to a request that is not streamed."""
        async for update in job.stream.updates():
            self._note(job, update)
        choices = []
        for index, choice in enumerate(job.choices):
            text = "".join(choice.text)
            entry = {"index": index, "finish_reason": choice.finish_reason}
            if job.envelope.is_chat:
                message = join_deltas(choice.parser.push(text) + choice.parser.finish())
                entry |= {"message": message, "finish_reason": _finish_reason(choice)}
            else:
                entry["text"] = text
            choices.append(entry | {"logprobs": self._take_logprobs(job, choice)})
        self.metrics.request_s.observe(job.trace.seconds())
        return job.envelope.whole(choices, answers.usage(job.stream.requests, job.n_choices))

    async def events(self, job: Job) -> AsyncIterator[str]:
        """Yield the answer as server-sent events: chunks, ``[DONE]`` at the end; an error ends them without it."""
        try:
            if job.envelope.is_chat:
                for index in range(len(job.choices)):
                    yield self._event(job, [_chat_choice(index, {"role": "assistant", "content": ""})])
            async for update in job.stream.updates(silence_s=KEEP_ALIVE_S):
                if update is None:
                    yield ": the answer takes a while\n\n"
                    continue
                self._note(job, update)
                write = self._chat_chunks if job.envelope.is_chat else self._completion_chunks
                for choice in write(job, update):
                    yield self._event(job, [choice])
            self.metrics.request_s.observe(job.trace.seconds())
            if job.with_usage:
                yield self._event(job, [], answers.usage(job.stream.requests, job.n_choices))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            job.trace.status = error.status
            if error.status == CLIENT_LEFT:
                raise
            yield f"data: {json.dumps(error.body)}\n\n"

    def _note(self, job: Job, update: Update) -> None:
        """Add an update to its choice."""
        choice = job.choices[update.index]
        if update.ids and job.trace.first_token_s is None:
            job.trace.first_token_s = job.trace.seconds()
            self.metrics.first_token_s.observe(job.trace.first_token_s)
        choice.text.append(update.text)
        if job.has_logprobs:
            for token, log_prob in zip(update.ids, update.log_probs, strict=True):
                if token not in self.tokenizer.end_ids:  # the end of an answer is not a part of it
                    choice.ids.append(token)
                    choice.log_probs.append(log_prob)
        if update.finish_reason is not None:
            choice.finish_reason = answers.FINISH_REASONS.get(update.finish_reason)

    def _take_logprobs(self, job: Job, choice: _Choice) -> dict | None:
        """Return the log-probabilities of the tokens that were not listed yet; None if there are none to list."""
        if not job.has_logprobs:
            return None
        if job.envelope.is_chat:
            listed = answers.chat_logprobs(self.tokenizer, choice.ids, choice.log_probs)
        else:
            offset = choice.n_characters
            listed = answers.completion_logprobs(self.tokenizer, choice.ids, choice.log_probs, offset)
            choice.n_characters += sum(map(len, listed["tokens"]))
        choice.ids, choice.log_probs = [], []
        return listed

    def _chat_chunks(self, job: Job, update: Update) -> list[dict]:
        choice = job.choices[update.index]
        deltas = choice.parser.push(update.text)
        if choice.finish_reason is not None:
            deltas += choice.parser.finish()
        if choice.ids and not deltas:
            deltas = [{"content": ""}]  # its text is held back, its log-probabilities are not
        chunks = [_chat_choice(update.index, delta) for delta in deltas]
        if chunks and job.has_logprobs:
            chunks[0]["logprobs"] = self._take_logprobs(job, choice)
        if choice.finish_reason is not None:
            chunks.append(_chat_choice(update.index, {}, _finish_reason(choice)))
        return chunks

    def _completion_chunks(self, job: Job, update: Update) -> list[dict]:
        choice = job.choices[update.index]
        if not (update.text or choice.ids or choice.finish_reason is not None):
            return []
        logprobs = self._take_logprobs(job, choice)
        return [
            {"index": update.index, "text": update.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        ]

    def _event(self, job: Job, choices: list[dict], usage: dict | None = None) -> str:
        chunk = job.envelope.chunk(choices, usage, with_usage=job.with_usage)
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _describe(self, job: Job, body: ChatRequest | CompletionRequest) -> dict:
        """Return the fields of the log line."""
        requests, n_choices = job.stream.requests, job.n_choices
        used = answers.usage(requests, n_choices)
        described = {
            "model": job.envelope.model,
            "streamed": job.is_streamed,
            "prompt_tokens": used["prompt_tokens"],
            "cached_tokens": used["prompt_tokens_details"]["cached_tokens"],
            "new_tokens": used["completion_tokens"],
            "finish_reasons": [request.finish_reason for request in requests],
            "first_token_s": job.trace.first_token_s and round(job.trace.first_token_s, 4),
        }
        if self.settings.log_content:
            described["prompt"] = [self.tokenizer.decode(request.prompt_ids) for request in requests[::n_choices]]
            described["answers"] = [request.completion().text for request in requests]
        return described


def _chat_choice(index: int, delta: dict, finish_reason: str | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _finish_reason(choice: _Choice) -> str | None:
    return "tool_calls" if choice.finish_reason == "stop" and choice.parser.n_calls else choice.finish_reason
