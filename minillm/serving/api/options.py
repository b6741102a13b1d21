"""From a request's fields to the engine's arguments, with a clear refusal of what the engine cannot do."""

import secrets

from minillm.inference import SamplingOptions
from minillm.serving.api.errors import ApiError
from minillm.serving.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from minillm.tokenizer.chat import check_tools

MAX_CHOICES = 128  # OpenAI's limit of n
MAX_STOPS, MAX_STOP_LEN = 16, 1000  # strings, and characters: each is compared with the answer at every token
MAX_LOGPROBS = 20
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
COMPLETION_TOKENS = 16  # OpenAI's default for completions


def sampling_options(body: GenerationRequest, defaults: SamplingOptions) -> SamplingOptions:
    """Return how the next token is chosen; fields that are left out come from ``defaults``.

    Raises:
        UserError, ApiError: a value out of range, or a field that the engine does not know.
    """
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise _refused(name, getattr(body, name), "is not supported: use repetition_penalty, or 0")
    if body.logit_bias:
        raise ApiError(400, "logit_bias is not supported: leave it out", param="logit_bias")
    names = SamplingOptions.__dataclass_fields__
    values = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if values.get("top_k") == -1:  # vLLM's word for all tokens
        values["top_k"] = 0
    return SamplingOptions(**{name: getattr(defaults, name) for name in names} | values)


def stop_strings(body: GenerationRequest) -> list[str]:
    """Return the strings that end an answer."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_LEN for text in stop):
        message = f"stop: at most {MAX_STOPS} strings of 1 to {MAX_STOP_LEN} characters"
        raise ApiError(400, message, param="stop")
    return stop


def seeds(body: GenerationRequest, n_choices: int) -> list[int]:
    """Return a seed per choice: ``seed``, ``seed + 1``, …; random ones without a seed."""
    if body.seed is None:  # not torch's generator, which starts with the same number in every process
        return [secrets.randbits(62) for _ in range(n_choices)]
    if not MIN_SEED <= body.seed <= MAX_SEED:
        raise _refused("seed", body.seed, f"must lie between {MIN_SEED} and {MAX_SEED}")
    return [body.seed + i for i in range(n_choices)]


def n_choices(body: GenerationRequest, n_prompts: int = 1) -> int:
    """Return the number of answers to each prompt."""
    n = 1 if body.n is None else body.n
    if n < 1 or n * n_prompts > MAX_CHOICES:
        of_prompts = f" for {n_prompts} prompts" if n_prompts > 1 else ""
        raise _refused("n", n, f"must be at least 1, and at most {MAX_CHOICES} choices per request{of_prompts}")
    return n


def max_new_tokens(body: GenerationRequest, default: int | None, n_free: int) -> int:
    """Return the most tokens of an answer, of which there is room for ``n_free``.

    More than there is room for is no error: the answer then ends with finish_reason "length".
    """
    name = "max_tokens"
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        name = "max_completion_tokens"
    wanted = getattr(body, name)
    if wanted is None:
        wanted = COMPLETION_TOKENS if isinstance(body, CompletionRequest) else default or n_free
    elif wanted < 1:
        raise _refused(name, wanted, "must be at least 1")
    return min(wanted, n_free)


def n_logprobs(body: ChatRequest | CompletionRequest) -> int | None:
    """Return how many of the most probable tokens are listed; None: no log-probabilities."""
    if isinstance(body, CompletionRequest):
        name, n = "logprobs", body.logprobs
    else:
        name, n = "top_logprobs", body.top_logprobs
        if n and not body.logprobs:
            raise ApiError(400, f"top_logprobs {n}: needs logprobs: true", param=name)
        n = (n or 0) if body.logprobs else None
    if n is not None and not 0 <= n <= MAX_LOGPROBS:
        raise _refused(name, n, f"must lie between 0 and {MAX_LOGPROBS}")
    return n


def chosen_tools(body: ChatRequest) -> tuple[list[dict] | None, list[dict] | None]:
    """Return the functions that the model sees, and those of which it must call one (None: it may answer).

    Raises:
        UserError, ApiError: tools in another form, or a ``tool_choice`` that does not fit them.
    """
    choice, tools = body.tool_choice, body.tools or None
    check_tools(tools)
    if choice == "none":
        return None, None
    if choice in (None, "auto"):
        return tools, None
    if tools is None:
        raise ApiError(400, "tool_choice needs tools to choose from", param="tool_choice")
    if choice == "required":
        return tools, tools
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    forced = [tool for tool in tools if (tool.get("function") or tool)["name"] == name]
    if not forced:
        names = ", ".join((tool.get("function") or tool)["name"] for tool in tools)
        raise ApiError(400, f"tool_choice: must be auto, none, required or one of the functions {names}",
                       param="tool_choice")  # fmt: skip
    return tools, forced


def check_completion(body: CompletionRequest) -> None:
    """Refuse what only OpenAI's old completion models did."""
    if body.echo:
        raise ApiError(400, "echo is not supported: the prompt is not scored; use minillm.evaluation", param="echo")
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the models continue a text", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _refused("best_of", body.best_of, "is not supported: ask for n choices and choose yourself")


def _refused(name: str, value, rule: str) -> ApiError:
    shown = str(value)
    return ApiError(400, f"{name} {shown if len(shown) <= 40 else shown[:40] + '…'}: {rule}", param=name)
