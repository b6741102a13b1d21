"""A run that diverges says so: its loss is above that of guessing, or far above its own best.

Guessing among V tokens costs ln V nats per target; a model that has learned anything costs less. That holds for the
cross-entropy of tokens alone. Losses of pairs, and of distillation, are compared with their own past: with their best,
and with their value before the first update, which for DPO is ln 2.

A base model that has never seen the markers of a chat may begin above ln V, and is below within some steps: at first,
weights that come from elsewhere are only expected to stay below twice that.
"""

import math

LAST_STEPS = 0.95  # weight of a step's past in the running mean: about the last 20 steps count
MIN_STEPS, BEST_FROM = 10, 5  # steps before the best is compared with, and before a mean can be the best
GRACE_STEPS = 30  # in which weights that come from elsewhere may be above ln V
TIMES_BEST = 3.0
MARGIN = 0.5  # nats above either limit: a loss near 0 may triple by chance


class LossAlarm:
    """Watches the losses of one run; each method returns a sentence to print, or None.

    A sentence comes once per episode, which ends when the loss is below its limit again.

    Args:
        vocab_size: V of the model. from_scratch: its weights are random.
        unit: what the loss counts: "token", or "pair" and "reply", whose validation loss is not a cross-entropy.
        is_cross_entropy: whether the training loss is that of tokens; it is not in distillation.
        advice: what to try, for people.

    Attributes:
        messages: all sentences so far.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        from_scratch: bool,
        unit: str = "token",
        is_cross_entropy: bool = True,
        advice: str = "",
    ):
        self.uniform, self.from_scratch, self.advice = math.log(vocab_size), from_scratch, advice
        self.counts_tokens = unit == "token"
        self.is_cross_entropy = is_cross_entropy and self.counts_tokens
        self.messages: list[str] = []
        self._first: float | None = None  # before any update
        self._sums = [0.0, 0.0]  # of weighted losses, of their weights
        self._n_steps = 0
        self._was_below = from_scratch  # whether the loss has been below ln V; random weights begin there
        self._best = {"training": math.inf, "validation": math.inf}
        self._wrong: set[str] = set()  # episodes that go on

    def train(self, step: int, loss: float) -> str | None:
        """See the mean loss of a step that was applied. The sentence begins with "note: " where all may be well."""
        if self._first is None:
            self._first = loss
            if self.from_scratch and self.is_cross_entropy and abs(loss - self.uniform) > MARGIN:
                self._wrong.add("training above uniform")
                return self._say(
                    f"the first loss is {loss:.3f}, a fresh model should start near ln V = {self.uniform:.3f}; look at "
                    "the initialisation, the targets and the loss"
                )
        self._n_steps += 1
        self._sums = [LAST_STEPS * self._sums[0] + loss, LAST_STEPS * self._sums[1] + 1]
        mean = self._sums[0] / self._sums[1]
        if self._n_steps >= BEST_FROM:
            self._best["training"] = min(self._best["training"], mean)
        self._was_below |= mean < self.uniform
        what = "the loss of the first step" if step == 1 else "the training loss (mean of the last steps)"
        if step == 1 and not self.from_scratch:
            advice = "do the weights know this tokenizer and this kind of text? look at --from_weight and the data"
        else:
            advice = self.advice
        message = self._see("training", step, mean, self.is_cross_entropy, f"{what} is {mean:.3f}", advice)
        if message is None and step == 1 and self.is_cross_entropy and loss > self.uniform and not self.from_scratch:
            return (
                f"note: {what} is {loss:.3f}, more than ln V = {self.uniform:.3f}: some tokens of this data, the "
                "markers of a chat perhaps, are new to the weights; it should fall soon"
            )
        return message

    def valid(self, step: int, loss: float) -> str | None:
        """See a validation loss."""
        text = f"the validation loss is {loss:.3f}"
        message = self._see("validation", step, loss, self.counts_tokens, text, self.advice)
        self._best["validation"] = min(self._best["validation"], loss)
        return message

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"first": self._first, "sums": self._sums, "n_steps": self._n_steps, "best": self._best,
                "was_below": self._was_below, "wrong": sorted(self._wrong), "messages": self.messages}  # fmt: skip

    def load_state(self, state: dict | None) -> None:
        """Go on from it; None: the checkpoint was made without an alarm."""
        if state is not None:
            self._first, self._sums, self._n_steps = state["first"], list(state["sums"]), state["n_steps"]
            self._best, self._wrong = dict(state["best"]), set(state["wrong"])
            self._was_below = state["was_below"]
            self.messages = list(state["messages"])

    def _see(self, split: str, step: int, loss: float, is_cross_entropy: bool, text: str, advice: str) -> str | None:
        is_new = not self._was_below and step < GRACE_STEPS
        limit = 2 * self.uniform if is_new else self.uniform + MARGIN
        if is_cross_entropy and self._begins(f"{split} above uniform", loss > limit):
            return self._say(f"step {step}: {text}, more than ln V = {self.uniform:.3f}, that of guessing; {advice}")
        best = self._best[split]
        if split == "training" and self._n_steps < MIN_STEPS:
            best = math.inf
        # A loss of pairs is noisy, and only one above that of the untrained model tells something.
        floor = 0.0 if is_cross_entropy else max(math.log(2), self._first or 0.0)
        limit = max(TIMES_BEST * best, floor) + MARGIN
        if self._begins(f"{split} above best", loss > limit) and not self._wrong & {f"{split} above uniform"}:
            return self._say(f"step {step}: {text}, more than {TIMES_BEST:g} times its best, {best:.3f}; {advice}")
        return None

    def _begins(self, episode: str, is_wrong: bool) -> bool:
        """Return whether ``episode`` begins now."""
        was_wrong = episode in self._wrong
        (self._wrong.add if is_wrong else self._wrong.discard)(episode)
        return is_wrong and not was_wrong

    def _say(self, message: str) -> str:
        self.messages.append(message)
        return message


def advice_of(args) -> str:
    """Return what to try against divergence, with the values of now (``TrainArguments``)."""
    clip = f"lower --grad_clip (now {args.grad_clip:g})" if args.grad_clip else "set --grad_clip 1"
    return (
        f"the run diverges: lower --learning_rate (now {args.learning_rate:g}), raise --warmup_ratio (now "
        f"{args.warmup_ratio:g}), {clip}, or look at the data of these steps"
    )
