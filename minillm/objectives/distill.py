"""Distillation inside a run: a batch's loss with its teacher, and a projection between hidden states of two widths.

Legend: B rows, T positions, D hidden.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.checkpoints.outputs import WholeModel
from minillm.files import system_errors, use_umask
from minillm.losses import forward_with_head, hidden_distance, linear_distill_loss, linear_top_k_distill_loss
from minillm.objectives.objective import Batch, Objective
from minillm.objectives.on_policy import OnPolicy
from minillm.objectives.teacher import Teacher

PROJECTION = "hidden_projection"


class DistillLoss(Objective):
    """The loss of a student. Validation is plain cross-entropy, which compares with every other stage.

    Args:
        student: the model that is trained. teacher: asked for every batch without the columns of its best tokens.
        args: of the run, with the settings of the loss. on_policy: makes the student's own answers for some steps.
    """

    is_cross_entropy = False
    name = "the distillation loss"

    def __init__(self, student: nn.Module, teacher: Teacher, args, *, on_policy: OnPolicy | None = None):
        self.student, self.teacher, self.args, self.on_policy = student, teacher, args, on_policy

    def settings(self) -> dict:
        """Return the settings of the loss: they must match to resume."""
        names = ("teacher", "alpha", "temperature", "divergence", "top_k", "hidden_weight", "on_policy", "from_weight")
        return {name: getattr(self.args, name) for name in names} | {"teacher's weights": self.teacher.hash}

    def prepare(self, micro_batches: list[Batch], *, training: bool, step: int) -> list[Batch]:
        """Return the micro-batches of the data, or in some steps the student's answers to their prompts."""
        if self.on_policy is None or not training:
            return micro_batches
        return self.on_policy(micro_batches, step=step)

    def __call__(self, model: nn.Module, batch: Batch, router_stats=None) -> tuple[Tensor, Tensor]:
        """Return ``(loss_sum, n_targets)``: per target alpha CE + (1 - alpha) T² divergence + the hidden states' part.

        On the student's own answers (``on_policy`` in the batch) there is no cross-entropy: they are not the truth.
        """
        args, targets, weights = self.args, batch["targets"], batch.get("weights")
        settings = {
            "targets": targets,
            "weights": weights,
            "target_positions": batch.get("target_positions"),
            "alpha": 0.0 if "on_policy" in batch else args.alpha,
            "temperature": args.temperature,
            "divergence": args.divergence,
        }
        if "teacher_ids" in batch:
            taught = {name: batch[name] for name in ("teacher_ids", "teacher_log_probs", "teacher_log_rest")}
        else:
            taught = self.teacher.outputs(batch)

        def head(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
            loss = linear_top_k_distill_loss if "teacher_ids" in batch else linear_distill_loss
            loss_sum, n_targets = loss(hidden, weight, **taught, **settings)
            if args.hidden_weight:
                projected = getattr(self.student, PROJECTION)(hidden)  # inside forward, where DDP sees it
                distance, _ = hidden_distance(projected, taught["teacher_hidden"], targets, weights)
                loss_sum = loss_sum + args.hidden_weight * distance
            return loss_sum, n_targets

        if router_stats is not None:
            router_stats.begin(batch)
        loss_sum, n_targets = forward_with_head(model, batch, head, router_stats)
        return (loss_sum if router_stats is None else loss_sum + router_stats.finish()), n_targets


def add_projection(student: nn.Module, teacher_dim: int, *, seed: int) -> None:
    """Give the student a linear layer from its hidden states to the teacher's; it is trained, and never exported."""
    projection = nn.Linear(student.config.hidden_size, teacher_dim, bias=False, device="meta")
    draw = torch.randn(projection.weight.shape, generator=torch.Generator().manual_seed(seed))
    projection.weight = nn.Parameter(draw / student.config.hidden_size**0.5)
    student.add_module(PROJECTION, projection)


class StudentAlone(WholeModel):
    """A student whose projection is kept in checkpoints and left out of what is exported."""

    def export(self, model, path: Path, *, tokenizer, dtype: torch.dtype) -> None:
        """Write what is to be used."""
        projection = model._modules.pop(PROJECTION, None)
        try:
            super().export(model, path, tokenizer=tokenizer, dtype=dtype)
        finally:
            if projection is not None:
                model.add_module(PROJECTION, projection)

    def write_checkpoint(self, model, path: Path, *, tokenizer) -> None:
        """Write what is needed to go on, exactly."""
        self.export(model, path, tokenizer=tokenizer, dtype=torch.float32)
        if PROJECTION in model._modules:
            file = path / f"{PROJECTION}.safetensors"
            with system_errors():
                save_file(getattr(model, PROJECTION).state_dict(), file)
            use_umask(file)

    def read_checkpoint(self, model, path: Path) -> None:
        """Read it back into ``model``."""
        projection = model._modules.pop(PROJECTION, None)
        super().read_checkpoint(model, path)
        if projection is not None:
            projection.load_state_dict(load_file(path / f"{PROJECTION}.safetensors"))
            model.add_module(PROJECTION, projection)
