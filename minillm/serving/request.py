"""One request of an engine: a prompt, how to answer it, and what has become of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.inference.answer import Answer, Completion
from minillm.serving.pages import Page

MAX_LOGPROBS = 20


class QueueFullError(UserError):
    """As many requests wait as may wait; try again later."""


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a new token under the model's own distribution, and the most probable tokens there."""

    log_prob: float
    top: list[tuple[int, float]]
    """(id, log-probability), the most probable one first."""


@dataclass(frozen=True)
class Piece:
    """What a request gained in one step."""

    request: "Request"
    ids: list[int]
    text: str
    """Certain text: never half a character, never a part of a stop string; it may be empty."""
    log_probs: list[LogProb]
    """One per id, if the request asked for them."""


@dataclass(eq=False)
class Request:
    """A request. Its state: waiting (no pages), running (with pages), finished (``finish_reason``).

    ``n_stored`` of its tokens have keys and values in its pages. Whatever else it has is computed in its next chunks:
    the rest of the prompt, the last new token, or everything once more after it has lost its pages. There is no
    difference between reading and writing: a chunk that reaches the last token gives the next one.
    """

    number: int
    """Order of arrival."""
    answer: Answer
    adapter: str | None = None
    n_logprobs: int | None = None
    """Number of most probable tokens whose log-probabilities each piece has; None: no log-probabilities."""
    pages: list[Page] = field(default_factory=list)
    n_stored: int = 0
    n_cached: int = 0
    """Tokens of the prompt that were found in shared pages when the request first ran."""
    has_run: bool = False
    is_cancelled: bool = False
    root: tuple = ()
    """What the content of its pages depends on besides the tokens: the adapter."""
    n_shared: int = 0
    """Full pages that others can find."""
    error: str | None = None
    """Why it failed, if ``finish_reason`` is "error"."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Return the ids of the prompt."""
        return self.answer.prompt

    @property
    def new_ids(self) -> list[int]:
        """Return the ids of the answer so far."""
        return self.answer.ids

    @property
    def ids(self) -> list[int]:
        """Return prompt and answer so far."""
        return [*self.answer.prompt, *self.answer.ids]

    @property
    def n_tokens(self) -> int:
        """Return the length of prompt and answer so far."""
        return len(self.answer.prompt) + len(self.answer.ids)

    @property
    def n_allowed(self) -> int:
        """Return how many tokens the answer may still gain."""
        return self.answer.limit - len(self.answer.ids)

    @property
    def finish_reason(self) -> str | None:
        """Return "eos", "stop", "length", "cancelled" or "error"; None while it runs or waits."""
        return self.answer.finish_reason

    def cancel(self) -> None:
        """Ask for its end; it ends before the engine's next step. May be called from any thread."""
        self.is_cancelled = True

    def completion(self) -> Completion:
        """Return the answer; what there is of it, if it was cancelled."""
        return self.answer.completion()


def log_prob(logits: Tensor, token: int, n_top: int) -> LogProb:
    """Return the log-probabilities of ``token`` and of the ``n_top`` most probable ones from logits (V,)."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    values, ids = log_probs.topk(min(n_top, len(log_probs)))
    return LogProb(float(log_probs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
