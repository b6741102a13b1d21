"""Measures how well a model predicts the expected answers of conversations, without generating its own answers.

The loss shows more than a score of generated answers: a better prediction counts even if the greedy text is the same.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.evaluation.exact_match import read_task
from minillm.losses import IGNORE_INDEX, causal_lm_loss
from minillm.terminal import progress
from minillm.tokenizer import encode_chats


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """The summed loss of the last turns in nats, and the number of their tokens, including the end of the turn."""

    loss_sum: float
    n_targets: int

    @property
    def nats_per_token(self) -> float:
        """The mean loss per target."""
        return self.loss_sum / self.n_targets

    def as_dict(self) -> dict:
        """Return the figures for JSON."""
        return asdict(self) | {"nats_per_token": self.nats_per_token}


@torch.inference_mode()
def answer_loss(model, tokenizer, records: Iterable[dict | Record], *, batch_size: int = 16) -> AnswerLoss:
    """Return the loss of ``model`` on the last turn of each record, given the turns before it.

    Args:
        records: as for ``exact_match``.
        batch_size: conversations per forward pass; it only affects speed and memory.

    Raises:
        UserError: no records, or one whose last turn is not an assistant's or that exceeds the model's positions.
    """
    tasks = [read_task(number, record) for number, record in enumerate(records)]
    if not tasks:
        raise UserError("no records to measure the loss of answers on")
    turns, tools = [task.turns for task in tasks], [task.tools for task in tasks]
    encoded = encode_chats(tokenizer, turns, tools=tools, train_on="last")
    limit = model.config.max_position_embeddings
    for number, (ids, _) in enumerate(encoded):
        if len(ids) - 1 > limit:
            raise UserError(f"record {number} has {len(ids)} tokens and the model reads {limit}: shorten or remove it")
    encoded.sort(key=lambda ids_and_mask: len(ids_and_mask[0]))  # rows of a batch have similar lengths
    loss_sums, counts = [], []
    device = next(model.parameters()).device
    for first in progress(range(0, len(encoded), batch_size), desc="measuring", unit="batch"):
        batch = {name: rows.to(device) for name, rows in padded(encoded[first : first + batch_size]).items()}
        loss_sum, n_targets = causal_lm_loss(model, batch)
        loss_sums.append(loss_sum.item())
        counts.append(int(n_targets))
    return AnswerLoss(loss_sum=math.fsum(loss_sums), n_targets=sum(counts))


def padded(encoded: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Return conversations, given as ids and answer masks, as one batch: columns (B, T), padded at the end."""
    width = max(len(ids) for ids, _ in encoded) - 1
    batch = {
        "input_ids": torch.zeros(len(encoded), width, dtype=torch.long),
        "targets": torch.full((len(encoded), width), IGNORE_INDEX),
        "document_ids": torch.full((len(encoded), width), -1),
    }
    for row, (ids, mask) in enumerate(encoded):
        n = len(ids) - 1
        batch["input_ids"][row, :n] = torch.tensor(ids[:-1])
        is_target = torch.tensor(mask[1:], dtype=torch.bool)
        batch["targets"][row, :n] = torch.tensor(ids[1:]).where(is_target, IGNORE_INDEX)
        batch["document_ids"][row, :n] = 0
    return batch
