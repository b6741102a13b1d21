"""Measures how often a model gives the chosen reply of a pair a higher probability than the rejected one.

Preference training compares whole replies, and there long replies lose, because every token lowers the probability. So
the same comparison is also made per token (the reward of SimPO, Meng et al., 2024, section 2.2).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import partial

import torch

from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.evaluation.answer_loss import padded
from minillm.evaluation.exact_match import greedy_answers
from minillm.losses import linear_log_probs
from minillm.terminal import progress
from minillm.tokenizer import encode_chats


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """The log-probabilities of a pair's replies in nats, and their lengths in tokens, including the end of the turn."""

    chosen: float
    rejected: float
    n_chosen: int
    n_rejected: int


@dataclass(frozen=True, kw_only=True)
class PreferenceScore:
    """The outcome of a whole file of preferences."""

    pairs: list[PairScore]
    """In the order of the records."""

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen reply has the higher log-probability, 0 to 1."""
        return self._mean(lambda pair: pair.chosen > pair.rejected)

    @property
    def accuracy_per_token(self) -> float:
        """Share of pairs whose chosen reply has the higher log-probability per token, 0 to 1."""
        return self._mean(lambda pair: pair.chosen / pair.n_chosen > pair.rejected / pair.n_rejected)

    @property
    def mean_margin(self) -> float:
        """Mean of log p(chosen) − log p(rejected), in nats."""
        return self._mean(lambda pair: pair.chosen - pair.rejected)

    def as_dict(self, *, pairs: bool = True) -> dict:
        """Return the figures, and with ``pairs`` every pair, as plain values for JSON."""
        names = ("accuracy", "accuracy_per_token", "mean_margin")
        values = {"n": len(self.pairs)} | {name: getattr(self, name) for name in names}
        for side in ("chosen", "rejected"):
            values[f"mean_log_prob_{side}"] = self._mean(lambda pair, side=side: getattr(pair, side))
            values[f"mean_tokens_{side}"] = self._mean(lambda pair, side=side: getattr(pair, f"n_{side}"))
        return values | ({"pairs": [asdict(pair) for pair in self.pairs]} if pairs else {})

    def table(self) -> str:
        """Return the figures as text: the shares, then a line per side."""
        values = self.as_dict(pairs=False)
        lines = [
            f"the chosen reply is more probable in {self.accuracy:.1%} of {len(self.pairs):,} pairs, per token in "
            f"{self.accuracy_per_token:.1%}",
            f"{'reply':<10} {'log-prob, nats':>15} {'tokens':>8}",
        ]
        for side in ("chosen", "rejected"):
            log_prob, n_tokens = values[f"mean_log_prob_{side}"], values[f"mean_tokens_{side}"]
            lines.append(f"{side:<10} {log_prob:>15.3f} {n_tokens:>8.1f}")
        return "\n".join([*lines, f"{'margin':<10} {self.mean_margin:>15.3f}"])

    def _mean(self, value_of) -> float:
        return sum(map(value_of, self.pairs)) / len(self.pairs)


@torch.inference_mode()
def preference_accuracy(model, tokenizer, records: Iterable[Record], *, batch_size: int = 16) -> PreferenceScore:
    """Return the log-probabilities of the chosen and the rejected replies under ``model``.

    The score of a reply is that of its last assistant turn, given the turns before it. There is no reference model: it
    is the ranking of the model itself, not the implicit reward of DPO.

    Args:
        records: preferences from ``read_records``.
        batch_size: replies per forward pass; it only affects speed and memory.

    Raises:
        UserError: no records, or one that is not a preference or longer than the model's positions.
    """
    conversations, tools = [], []
    for number, record in enumerate(records):
        if record.kind != "preference":
            raise UserError(
                f"record {number} (line {record.line}) is a {record.kind} record: give preferences, with chosen and "
                "rejected"
            )
        conversations += [[*record.messages, *reply] for reply in (record.chosen, record.rejected)]
        tools += [record.tools] * 2
    if not conversations:
        raise UserError("there are no records with replies to compare")
    encoded = encode_chats(tokenizer, conversations, tools=tools, train_on="last")
    limit = model.config.max_position_embeddings
    for index, (ids, _) in enumerate(encoded):
        if len(ids) - 1 > limit:
            side = ("chosen", "rejected")[index % 2]
            raise UserError(
                f"record {index // 2} has {len(ids)} tokens with its {side} reply and the model reads {limit}: shorten "
                "or remove it"
            )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))  # batches of similar lengths
    sums: dict[int, float] = {}
    device = next(model.parameters()).device
    for first in progress(range(0, len(order), batch_size), desc="measuring", unit="batch"):
        indices = order[first : first + batch_size]
        batch = {name: rows.to(device) for name, rows in padded([encoded[index] for index in indices]).items()}
        head = partial(linear_log_probs, targets=batch["targets"])
        log_probs = model(batch["input_ids"], document_ids=batch["document_ids"], head=head)  # (B, T)
        # On the CPU, because not every device has float64.
        sums |= zip(indices, log_probs.cpu().double().sum(1).tolist(), strict=True)
    lengths = [sum(mask) for _, mask in encoded]
    return PreferenceScore(
        pairs=[
            PairScore(chosen=sums[i], rejected=sums[i + 1], n_chosen=lengths[i], n_rejected=lengths[i + 1])
            for i in range(0, len(encoded), 2)
        ]
    )


@dataclass(frozen=True, kw_only=True)
class FreeAnswer:
    """The model's own answer to the prompt of a pair."""

    answer: str
    like_chosen: bool
    """Whether it is more similar to the chosen reply than to the rejected one."""


def like_chosen(
    model, tokenizer, records: Iterable[Record], *, max_new_tokens: int = 64, batch_size: int = 64
) -> list[FreeAnswer]:
    """Return the model's greedy answers to the prompts of pairs, and to which reply each is more similar.

    The similarity is the share of equal characters in the longest common blocks (``difflib``, the measure of Ratcliff
    and Obershelp). It measures style and length more than correctness.

    Args:
        records: preferences from ``read_records``.
        max_new_tokens: longest answer.
        batch_size: prompts per batch.
    """
    records = list(records)
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    prompts, tools = [record.messages for record in records], [record.tools for record in records]
    answers = greedy_answers(model, tokenizer, prompts, tools=tools, **limits)
    free_answers = []
    for record, answer in zip(records, answers, strict=True):
        chosen, rejected = (_similarity(answer, reply[-1]["content"]) for reply in (record.chosen, record.rejected))
        free_answers.append(FreeAnswer(answer=answer, like_chosen=chosen > rejected))
    return free_answers


def _similarity(text: str, other: str) -> float:
    return SequenceMatcher(None, text, other, autojunk=False).ratio()
