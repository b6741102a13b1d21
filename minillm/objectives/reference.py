"""The reference of preference tuning: the model as it was, which must not move while the policy does.

There are three ways: a frozen copy (twice the weights in memory), the same model with its adapter off (no memory at
all), or its log-probabilities computed beforehand and kept on disk (no memory, and one forward pass for all epochs).
"""

import contextlib
import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.distributed.engine import Engine
from minillm.kernels import compiled
from minillm.lora import disable_lora
from minillm.losses import forward_with_head, linear_log_probs
from minillm.objectives.column_cache import cached_columns, model_hash
from minillm.reports import announce

COLUMN = "reference_log_probs"


def token_log_probs(model: nn.Module, batch: dict[str, Tensor], router_stats=None, *, prefix: str = "") -> Tensor:
    """Return the log-probability of every target of a batch, (B, T) in float32 at least; 0 where there is none.

    Args:
        prefix: ``other_`` for the second rows of judged replies.
    """
    targets, positions = batch[prefix + "targets"], batch.get(prefix + "target_positions")
    head = partial(linear_log_probs, targets=targets, target_positions=positions)
    return forward_with_head(model, batch, head, router_stats, prefix=prefix)


class Reference:
    """The model before it is tuned. Create it before the model gets an adapter.

    Args:
        kind: "copy", "adapter" or "cached". model: the policy, as it is now.
        args: of the run. engine: for device, dtype and ranks.

    It takes the policy's way through the kernels, which may differ between training and validation, so that both are
    bit-equal at first: a copy follows the policy's mode, and a cache is computed in the mode that its rows are used in.
    There is no dropout in the model.

    Attributes:
        hash: of its weights and configuration.
    """

    def __init__(self, kind: str, model: nn.Module, args, engine: Engine):
        self.kind, self.policy, self.args, self.engine, self.hash = kind, model, args, engine, model_hash(model)
        self.model = copy.deepcopy(model) if kind == "copy" else model
        self.is_compiled = compiled.is_wanted(args.compile, engine.device, parallel=args.parallel)
        if self.is_compiled:
            self.model.block_attention = False  # as Run.wrap does with the policy
        if kind == "copy":
            self.model.to(engine.device).requires_grad_(False)

    def add_to(self, rows, *, training: bool = True):
        """Return ``rows`` with a column of the reference's log-probabilities, if this kind has them on disk.

        Args:
            training: whether they are rows to train on, or to validate with.
        """
        if self.kind != "cached":
            return rows
        args, engine = self.args, self.engine
        announce.check_rows(rows, allow=args.allow_rejected, flag="the data")  # before time is spent on it
        self.model.to(engine.device).train(training)
        return engine.ranks.main_rank_first(
            lambda: cached_columns(
                rows,
                Path(args.reference_cache or Path(args.save_dir) / ".reference_cache"),
                identity={
                    "reference": self.hash,
                    "dtype": str(engine.dtype).removeprefix("torch."),
                    "device": engine.device.type,
                    "compile": self.is_compiled,
                    "training": training,
                },
                compute=self.columns,
                bytes_per_position=4,
                flag="--reference_cache",
                batch_size=args.batch_size,
            )
        )

    @torch.no_grad()
    def columns(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the log-probabilities of a batch's targets, and of those of its other rows where it has such."""
        if self.kind == "copy":
            self.model.train(self.policy.training)
        batch = self.engine.to_device(batch)
        prefixes = ["", "other_"] if "other_input_ids" in batch else [""]
        without_adapter = disable_lora(self.model) if self.kind == "adapter" else contextlib.nullcontext()
        with self.engine.autocast(), without_adapter:
            return {prefix + COLUMN: token_log_probs(self.model, batch, prefix=prefix) for prefix in prefixes}
