"""Peak memory of a training step: distillation in chunks compared with full logits, and DPO with fine-tuning.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --shapes wide --rounds 5

Distillation: one step (forward and backward) of a student with the loss as its output head, compared with the same
step with the full logits of both models and ordinary autograd. DPO: one step on pairs with given reference
log-probabilities, as from a cache, compared with a step of fine-tuning on the same rows. Memory is the peak of the
tensors of a step, without the weights. Times are medians of rounds in which both sides take turns.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import format_table, median_ratio, peak_bytes, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.hardware import keep_freed_memory
from minillm.losses import causal_lm_loss, dpo_loss, linear_distill_loss, linear_log_probs, sequence_log_probs
from minillm.model import Transformer
from minillm.precision import autocast, choose_device

# name: (student's width, blocks, teacher's width, B rows, T positions)
SHAPES = {"narrow": (128, 4, 256, 4, 256), "wide": (256, 6, 512, 4, 512), "demo": (64, 4, 128, 8, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured."""

    shapes: str = "narrow,wide"
    """Comma list of: narrow (128x4 from 256, T 256), wide (256x6 from 512, T 512), demo (64x4 from 128, T 128)."""
    vocab_size: int = 32768
    """V, of both models."""
    dtypes: str = "float32,bfloat16"
    """Comma list of: float32, bfloat16 (autocast)."""
    rounds: int = 3
    """Timed steps per side."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    output: str = "out/benchmarks/loss_memory.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for an unknown shape or dtype, or a number out of range."""
        for name, known in (("shapes", SHAPES), ("dtypes", DTYPES)):
            for part in getattr(self, name).split(","):
                require(part in known, f"--{name} {part}: choose from {', '.join(known)}")
        for name in ("vocab_size", "rounds"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")


def make_model(width: int, n_blocks: int, vocab_size: int, device: torch.device) -> Transformer:
    """Return a model with heads of 32."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": max(1, width // 64)}
    return Transformer(
        ModelConfig(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=n_blocks, **heads)
    ).to(device).train()  # fmt: skip


def make_batch(n_rows: int, seq_len: int, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return rows of four documents, two pairs; the second half of each document is its answer."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (n_rows, seq_len + 1), generator=generator)
    document_ids = torch.arange(seq_len).mul(4).div(seq_len, rounding_mode="floor").expand(n_rows, seq_len).contiguous()
    is_answer = torch.arange(seq_len) % (seq_len // 4) >= seq_len // 8
    targets = torch.where(is_answer, ids[:, 1:], -100)
    reference = -10 * torch.rand(n_rows, seq_len, generator=generator) * is_answer
    batch = {"input_ids": ids[:, :-1].contiguous(), "targets": targets, "document_ids": document_ids}
    return {name: value.to(device) for name, value in (batch | {"reference_log_probs": reference}).items()}


def whole_distill_loss(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Return forward KL plus cross-entropy of whole logits, as textbooks write it."""
    student, teacher = student.float(), teacher.float()
    p, q = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
    ce = F.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return ((kl + ce) / 2)[targets != -100].sum()


def distillation(shape: str, args: Arguments, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Return the steps to compare: by chunks and whole; every position is a target, as in pretraining."""
    width, n_blocks, teacher_width, n_rows, seq_len = SHAPES[shape]
    student = make_model(width, n_blocks, args.vocab_size, device)
    teacher = make_model(teacher_width, n_blocks, args.vocab_size, device).requires_grad_(False)
    batch = make_batch(n_rows, seq_len, args.vocab_size, device)
    ids, targets = batch["input_ids"], batch["input_ids"].roll(-1, dims=1)

    def chunked() -> None:
        with autocast(device, dtype):
            with torch.no_grad():
                hidden, weight = teacher(ids, head=lambda hidden, weight: (hidden, weight))
            head = partial(
                linear_distill_loss, teacher_hidden=hidden, teacher_weight=weight, targets=targets, alpha=0.5
            )
            loss, _ = student(ids, head=head)
        loss.backward()
        student.zero_grad(set_to_none=True)

    def whole() -> None:
        with autocast(device, dtype):
            with torch.no_grad():
                theirs = teacher(ids)
            loss = whole_distill_loss(student(ids), theirs, targets)
        loss.backward()
        student.zero_grad(set_to_none=True)

    return {"chunked": chunked, "whole": whole}


def preference(shape: str, args: Arguments, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Return the steps to compare: DPO with given reference log-probabilities, and fine-tuning, on the same rows."""
    width, n_blocks, _, n_rows, seq_len = SHAPES[shape]
    model = make_model(width, n_blocks, args.vocab_size, device)
    batch = make_batch(n_rows, seq_len, args.vocab_size, device)
    where = batch["targets"], batch["document_ids"]

    def dpo() -> None:
        with autocast(device, dtype):
            head = partial(linear_log_probs, targets=batch["targets"])
            log_probs = model(batch["input_ids"], document_ids=batch["document_ids"], head=head)
            sums, reference = (sequence_log_probs(t, *where)[0] for t in (log_probs, batch["reference_log_probs"]))
            sides = (t[:, side::2].flatten() for t in (sums, reference) for side in (0, 1))
            loss, _ = dpo_loss(*sides)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def sft() -> None:
        with autocast(device, dtype):
            loss, _ = causal_lm_loss(model, batch)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return {"dpo": dpo, "sft": sft}


def measure(sides: dict[str, Callable], rounds: int, device: torch.device) -> dict:
    """Return the peak bytes of each side, and the seconds of its steps."""
    for step in sides.values():
        step()  # allocates what is allocated only once
    peaks = {name: peak_bytes(step, device) for name, step in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_index in range(rounds):
        for name in turns(list(sides), round_index):
            began = time.perf_counter()
            sides[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {"peaks": peaks, "seconds": seconds}


@script
def main(argv: list[str] | None = None) -> dict:
    """Measure, print the table, write the figures; return them."""
    args = parse(Arguments, argv)
    keep_freed_memory()
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    device, cases = choose_device(args.device), []
    table = [["what", "shape", "dtype", "peak, MiB", "against", "peak, MiB", "memory", "time"]]
    for compared in (distillation, preference):
        for shape in args.shapes.split(","):
            for dtype in args.dtypes.split(","):
                sides = compared(shape, args, device, DTYPES[dtype])
                one, other = sides
                result = measure(sides, args.rounds, device)
                memory = result["peaks"][one] / result["peaks"][other]
                speed = median_ratio(result["seconds"][one], result["seconds"][other])
                cases.append({"what": one, "shape": shape, "dtype": dtype, "memory": memory, "time": speed} | result)
                cells = [f"{result['peaks'][one] / MIB:.0f}", other, f"{result['peaks'][other] / MIB:.0f}"]
                table.append([one, shape, dtype, *cells, f"{memory:.2f}x", f"{speed:.2f}x"])
    print(format_table(table))
    result = {"arguments": vars(args), "cases": cases}
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
