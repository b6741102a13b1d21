"""A run of distillation without a script: ragged rows, a teacher of another width on disk."""

from pathlib import Path

import torch

from minillm.cli.arguments import DistillArguments
from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.objectives.distill import DistillLoss, StudentAlone, add_projection
from minillm.objectives.teacher import Teacher
from minillm.tokenizer import train_bpe
from minillm.training.optim import adamw
from minillm.training.run import Run
from tests.contracts.harness import RaggedRows

V = 268  # the rows' ids are below 61


def shape(hidden_size: int, **more) -> ModelConfig:
    usual = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    usual |= {"vocab_size": V, "initializer_range": 0.3}
    return ModelConfig(hidden_size=hidden_size, **(usual | more))


def make_tokenizer():
    return train_bpe(iter(["the old fox saw the dog"]), vocab_size=V)


def make_teacher(path: Path, tokenizer, **changes) -> Path:
    torch.manual_seed(3)
    save_model(Transformer(shape(**({"hidden_size": 24} | changes))), path, tokenizer=tokenizer)
    return path


def arguments(directory: Path, teacher: Path, **changes) -> DistillArguments:
    defaults = {
        "data_path": "-", "save_dir": str(directory), "teacher": str(teacher), "dtype": "float32", "device": "cpu",
        "max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0.0, "grad_clip": 0.0, "save_interval": 0,
        "log_interval": 1, "max_seq_len": 24, "batch_size": 4,
    }  # fmt: skip
    return DistillArguments(**(defaults | changes))


def student(*, double: bool = False, seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(shape(**({"hidden_size": 16} | changes)))
    return model.double() if double else model


def train(args, tokenizer, *, double: bool = False, before_update=lambda run: None, finish: bool = False) -> Run:
    """Run the loop of ``train_distill.py`` on ragged rows; return the run."""
    with Run(args, stage="distill", output=StudentAlone()) as run:
        teacher = Teacher(args, run.engine, tokenizer)
        model = student(double=double)
        if double:
            teacher.model.double()
        if args.hidden_weight:
            add_projection(model, teacher.model.config.hidden_size, seed=args.seed)
            model.to(torch.float64 if double else torch.float32)
        rows = RaggedRows()
        if args.top_k:
            rows = teacher.add_to(rows, vocab_size=V)
        loader = StepBatches(rows, **run.batching())
        module = run.wrap(model)
        loss = DistillLoss(model, teacher, args)
        optimizer = adamw(module, learning_rate=args.learning_rate, weight_decay=0.0)
        model = run.start(optimizer, loader, tokenizer=tokenizer, loss=loss)
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            before_update(run)
            run.update(step)
        if finish:
            run.finish()
        return run
