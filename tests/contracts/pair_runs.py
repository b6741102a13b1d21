"""A run of preference tuning without a script: ragged pairs, some rows full of them, a tiny model."""

from pathlib import Path

import numpy as np
import torch

from minillm.checkpoints.outputs import AdapterAlone
from minillm.cli.arguments import PreferenceArguments
from minillm.data import StepBatches
from minillm.lora import apply_lora
from minillm.objectives.preference import PreferenceLoss
from minillm.objectives.reference import Reference
from minillm.training.optim import adamw
from minillm.training.run import Run
from tests.contracts.harness import CONFIG, tiny_model


def reply(rng: np.random.Generator, n_prompt: int, n_reply: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, targets) of one conversation; the reply alone is target."""
    ids = rng.integers(0, CONFIG.vocab_size, n_prompt + n_reply)
    return ids[:-1], np.where(np.arange(1, len(ids)) >= n_prompt, ids[1:], -100)


class RaggedPairs:
    """Rows of one to three pairs, or judged replies with others beside them, of 1 to 9 tokens."""

    fixed_len, data_hash, summary, target_bytes, log_prob = None, "pairs", {}, 0, None

    def __init__(self, n_rows: int = 11, seed: int = 0, judged: bool = False):
        rng = np.random.default_rng(seed)
        self.rows = []
        for _ in range(n_rows):
            n = int(rng.integers(1, 4)) * (1 if judged else 2)
            row = self._row([reply(rng, *rng.integers(1, [5, 10])) for _ in range(n)])
            if judged:
                labels = rng.integers(0, 2, n)
                row["labels"] = labels[row["document_ids"]]
                others = self._row([reply(rng, *rng.integers(1, [5, 10])) for _ in range(n)])
                row |= {f"other_{name}": column for name, column in others.items()}
            self.rows.append(row)
        self.lengths = np.array([len(row["targets"]) for row in self.rows])

    @staticmethod
    def _row(documents) -> dict[str, np.ndarray]:
        lengths = [len(ids) for ids, _ in documents]
        return {
            "input_ids": np.concatenate([ids for ids, _ in documents]),
            "targets": np.concatenate([targets for _, targets in documents]),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "document_ids": np.repeat(np.arange(len(documents)), lengths),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[index]


def arguments(directory: Path, **changes) -> PreferenceArguments:
    """Return arguments of a short run."""
    defaults = {
        "data_path": "-", "save_dir": str(directory), "dtype": "float32", "device": "cpu", "max_steps": 3,
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "grad_clip": 0.0, "save_interval": 0, "log_interval": 1,
        "beta": 0.3,
    }  # fmt: skip
    return PreferenceArguments(**(defaults | changes))


def train(
    args: PreferenceArguments,
    *,
    double: bool = False,
    before_update=lambda run, reference: None,
    config=CONFIG,
    n_rows: int = 11,
):
    """Run the loop of ``train_dpo.py`` on ragged pairs; return the run and its reference."""
    with Run(args, stage="rlhf", output=AdapterAlone(args) if args.lora_name else None) as run:
        model = tiny_model(double=double, config=config)
        reference = Reference(args.reference_kind, model, args, run.engine) if args.reference_kind else None
        rows = RaggedPairs(n_rows, judged=args.loss_type == "kto")
        rows = rows if reference is None else reference.add_to(rows)
        if args.lora_name:
            apply_lora(model, args.lora_config, generator=torch.Generator().manual_seed(1))
        loader = StepBatches(rows, **run.batching())
        module = run.wrap(model)
        loss = PreferenceLoss(model, reference, args, run.engine)
        optimizer = adamw(module, learning_rate=args.learning_rate, weight_decay=args.weight_decay)
        model = run.start(optimizer, loader, tokenizer=None, loss=loss)
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            before_update(run, reference)
            run.update(step)
        return run, reference
