"""A tiny run of the real loop: ragged rows, some without any target, several documents per row.

Equal lengths and full masks hide the classic mistakes (mean of means, lost remainders), so nothing here is even.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minillm.checkpoints.outputs import AdapterAlone, WholeModel
from minillm.checkpoints.saving import copied
from minillm.cli.arguments import PretrainArguments
from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.distributed.engine import Engine
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.reports.tracking import CLOCK, read_metrics
from minillm.training.optim import adamw
from minillm.training.run import Run

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    rope_theta=1e4,
)
# Sigmoid routing with its bias; one dense block before a sparse one. Widths that no kernel's alignment suits.
MOE_CONFIG = dataclasses.replace(
    CONFIG,
    num_hidden_layers=3,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
    n_shared_experts=1,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
)

LORA = {"rank": 3, "alpha": 5, "use_dora": True, "init": "gaussian"}


class RaggedRows:
    """``n_rows`` rows of 1 to ``max_len`` tokens in 1 to 3 documents; every fifth row has no target at all.

    Args:
        weighted: targets weigh 1 or 10, as those of reasoning do.
    """

    fixed_len = None
    data_hash = "ragged"
    summary: dict = {}  # noqa: RUF012
    target_bytes = 0
    log_prob = None

    def __init__(self, n_rows: int = 33, max_len: int = 19, seed: int = 0, *, weighted: bool = False):
        rng = np.random.default_rng(seed)
        self.rows = []
        for index in range(n_rows):
            length = int(rng.integers(1, max_len + 1))
            n_cuts = min(int(rng.integers(0, 3)), length - 1)
            cuts = np.sort(rng.choice(np.arange(1, length), size=n_cuts, replace=False))
            documents = np.searchsorted(cuts, np.arange(length), side="right")
            starts = np.concatenate([[0], cuts]).astype(int)
            targets = rng.integers(0, CONFIG.vocab_size, length)
            targets[rng.random(length) < 0.4] = -100
            if index % 5 == 0:
                targets[:] = -100
            self.rows.append(
                {
                    "input_ids": rng.integers(0, CONFIG.vocab_size, length),
                    "targets": targets,
                    "position_ids": np.arange(length) - starts[documents],
                    "document_ids": documents,
                }
            )
            if weighted and index % 2:  # the others are replayed rows, which have no weights
                self.rows[-1]["weights"] = np.where(rng.random(length) < 0.2, 10, 1).astype(np.float32)
        self.lengths = np.array([len(row["targets"]) for row in self.rows])
        self.n_targets = float(sum((row["targets"] != -100).sum() for row in self.rows))
        targets = np.concatenate([row["targets"] for row in self.rows])
        self.target_counts = np.bincount(targets[targets >= 0], minlength=CONFIG.vocab_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[index]


def tiny_model(*, double: bool = False, dropout: float = 0.0, config: ModelConfig = CONFIG) -> Transformer:
    """Return the model of ``config`` with weights of seed 0, large enough that every part matters."""
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    if dropout:
        for block in model.model.layers:
            block.mlp.register_forward_hook(lambda module, _, out: F.dropout(out, dropout, module.training))
    return model.double() if double else model


def arguments(directory: Path, **changes) -> PretrainArguments:
    """Return arguments of a short run without validation, whose clipping is at work."""
    defaults = {
        "data_path": "-", "save_dir": str(directory), "dtype": "float32", "device": "cpu", "max_steps": 3,
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "grad_clip": 0.5, "save_interval": 0, "log_interval": 1,
    }  # fmt: skip
    return PretrainArguments(**(defaults | changes))


class TinyAdapter(AdapterAlone):
    """Written as an adapter, in the directory of a run that has none of its flags."""

    directory, settings, is_adapter = WholeModel.directory, WholeModel.settings, False

    def __init__(self):
        pass


def train(
    args: PretrainArguments,
    *,
    engine: type[Engine] | None = None,
    double: bool = False,
    dropout: float = 0.0,
    n_rows: int = 33,
    config: ModelConfig = CONFIG,
    lora: bool | dict = False,
    watch: Callable[[Run, Transformer, StepBatches], object] = lambda run, model, loader: None,
    weighted: bool = False,
    loss: Callable = causal_lm_loss,
    prepare: Callable[[Run], None] = lambda run: None,
    before_update: Callable[[Run], None] = lambda run: None,
    finish: bool = False,
    validate: bool = False,
    metrics=None,
) -> dict:
    """Run the loop of the stage scripts; return its ``metrics`` rows, final ``weights`` and ``optimizer`` state.

    Args:
        lora: train an adapter alone, of the settings ``LORA`` or others. watch: returns what watches it.
        weighted: see ``RaggedRows``. loss: of tokens.
        prepare: called with the run before the loop. before_update: called before every ``run.update(step)``.
        finish: save a checkpoint and the model at the end, as the scripts do. validate: every ``eval_interval`` steps.
        metrics: of the validations.
    """
    with Run(args, stage="pretrain", engine=engine, output=TinyAdapter() if lora else None) as run:
        model = tiny_model(double=double, dropout=dropout, config=config)
        if lora:
            apply_lora(model, generator=torch.Generator().manual_seed(1), **(LORA if lora is True else lora))
        loader = StepBatches(RaggedRows(n_rows, weighted=weighted), **run.batching())
        optimizer = adamw(run.wrap(model), learning_rate=args.learning_rate, weight_decay=args.weight_decay)
        valid_loader = StepBatches(RaggedRows(7, seed=1), **run.batching(), shuffle=False) if validate else None
        watcher = watch(run, model, loader)
        model = run.start(optimizer, loader, valid_loader, tokenizer=None, loss=loss, metrics=metrics, watch=watcher)
        prepare(run)
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            before_update(run)
            run.update(step)
        if finish:
            run.finish()
        return {
            "metrics": [
                {key: value for key, value in row.items() if key not in ("split", *CLOCK)}
                for row in read_metrics(run.directory / "metrics.jsonl")
                if row["split"] == "train"
            ],
            "validations": [
                row["loss"] for row in read_metrics(run.directory / "metrics.jsonl") if row["split"] == "valid"
            ],
            "weights": weights_of(run),
            "optimizer": copied(run.engine.optimizer_state()),
            "skipped_steps": run.progress.skipped_steps,
        }


def weights_of(run: Run) -> dict[str, torch.Tensor] | None:
    """Return all weights of a run, whole, on the main rank; None elsewhere."""
    model = run.saver.whole_model()
    return copied(model.state_dict()) if run.ranks.is_main else None


def gradients_of_steps(args: PretrainArguments, **options) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of every step, unclipped, all at the first weights (the learning rate is nothing)."""
    gradients = []

    def keep(run: Run) -> None:
        gradients.append({name: p.grad.detach().clone() for name, p in run.model.named_parameters()})

    train(args, before_update=keep, **options)
    return gradients


def largest_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Return the largest ‖a − b‖ / ‖b‖ over all parameters; 0 where both are zero."""
    assert ours.keys() == reference.keys()
    return max(
        float((ours[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
        for name, wanted in reference.items()
    )
