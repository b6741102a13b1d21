"""Does the planner predict the memory of training? Its estimate compared with the peak of real steps.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --allocator kept --cases small,lora

Each case has a new process. It imports everything, makes one step of a tiny model (which loads the kernels), and
records its resident memory. Then it builds the model, trains for two updates with our loss, clipping and optimizer, and
records the largest increase of its resident memory. The estimate is the largest moment of ``minillm.plan.memory``,
including weights and optimizer. Documents fill their rows.

The comparison is about tensors, so each block of memory is mapped separately and returned when it is freed
(``MALLOC_MMAP_THRESHOLD_``). A run on a CPU instead keeps freed memory, in a heap with gaps between blocks of different
sizes: ``--allocator kept`` measures that, and the ratio shows the cost of the gaps.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch

from benchmarks.common import MAPPED, format_table, resident, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.hardware import keep_freed_memory
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import RouterStats, Transformer
from minillm.plan.activations import Step
from minillm.plan.engines import layout
from minillm.plan.memory import peak
from minillm.plan.parameters import count_parameters, meta_model
from minillm.precision import autocast
from minillm.training.optim import adamw

MIB = 2**20
# oneDNN compiles a kernel for each shape of a bfloat16 product, and keeps 1,024 of them; experts, whose numbers of rows
# never repeat, would fill that with some 100 MB that no tensor has.
ALLOCATORS: dict[str, dict[str, str]] = {"mapped": MAPPED | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}, "kept": {}}
BF16, CHECKPOINTING = {"dtype": "bfloat16"}, {"gradient_checkpointing": True}
DEEP = {"hidden_size": 256, "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
MIXTRAL = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "intermediate_size": 1024}
# name: (preset, changes of its shape, the step)
CASES: dict[str, tuple[str, dict, dict]] = {
    "small": ("small", {}, {"batch_size": 4, "seq_len": 512}),
    "small_bf16": ("small", {}, {"batch_size": 8, "seq_len": 512} | BF16),
    "small_checkpointing": ("small", {}, {"batch_size": 8, "seq_len": 512} | CHECKPOINTING),
    "small_bf16_checkpointing": ("small", {}, {"batch_size": 16, "seq_len": 512} | BF16 | CHECKPOINTING),
    "small_1024": ("small", {}, {"batch_size": 2, "seq_len": 1024}),
    "small_2048_bf16": ("small", {}, {"batch_size": 2, "seq_len": 2048} | BF16),
    "small_accumulation": ("small", {}, {"batch_size": 4, "seq_len": 256, "accumulation_steps": 3}),
    "base": ("base", {}, {"batch_size": 2, "seq_len": 256}),
    "base_bf16": ("base", {}, {"batch_size": 4, "seq_len": 256} | BF16),
    "deep": ("small", DEEP, {"batch_size": 4, "seq_len": 256}),
    "wide_few_tokens": ("small", WIDE, {"batch_size": 1, "seq_len": 128}),
    "vocabulary_32k": ("small", {"vocab_size": 32000, "tie_word_embeddings": False}, {"batch_size": 4, "seq_len": 512}),
    "qk_norm_bf16": ("small", {"use_qk_norm": True}, {"batch_size": 8, "seq_len": 256} | BF16),
    "moe": ("moe", {}, {"batch_size": 2, "seq_len": 256}),
    "moe_bf16_checkpointing": ("moe", {}, {"batch_size": 8, "seq_len": 256} | BF16 | CHECKPOINTING),
    "mixtral_bf16": ("small", MIXTRAL, {"batch_size": 8, "seq_len": 256} | BF16),
    "lora": ("base", {}, {"batch_size": 4, "seq_len": 256, "lora_rank": 16}),
    "lora_bf16": ("base", {}, {"batch_size": 8, "seq_len": 512, "lora_rank": 16, "base_dtype": "bfloat16"} | BF16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured."""

    cases: str = "all"
    """Comma list of cases, or all."""
    allocator: Literal["mapped", "kept"] = "mapped"
    """mapped: only tensors are resident; kept: as in a run on a CPU, with the gaps of the heap."""
    updates: int = 2
    """Updates per process; the optimizer's state exists from the second on."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""
    output: str = "out/benchmarks/plan_memory.json"
    """JSON file for the figures (empty: none)."""
    measure: str = ""
    """Used by the processes this one starts: a case; prints its figures."""

    @property
    def names(self) -> list[str]:
        """Return the cases asked for."""
        return list(CASES) if self.cases == "all" else self.cases.split(",")

    def check(self) -> None:
        """Raise UserError for an unknown case or a number out of range."""
        for name in self.names:
            require(name in CASES, f"--cases {name}: choose from {', '.join(CASES)}")
        require(self.updates >= 2, f"--updates {self.updates}: must be at least 2")
        require(self.num_threads >= 0, f"--num_threads {self.num_threads}: must be at least 0")


def step_of(name: str) -> Step:
    """Return the step of a case."""
    preset, shape, step = CASES[name]
    return Step(config=ModelConfig.preset(preset, **shape), **step)


def train(step: Step, updates: int) -> None:
    """Build the model of ``step`` and make some updates, as a run does."""
    device, config = torch.device("cpu"), step.config
    torch.manual_seed(0)
    model = Transformer(config).to(getattr(torch, step.base_dtype)).train()
    model.gradient_checkpointing = step.gradient_checkpointing
    if step.lora_rank:
        apply_lora(model, rank=step.lora_rank)
    stats = None
    if config.num_experts and not step.lora_rank:
        stats = RouterStats(config, aux_loss_coef=1e-3, z_loss_coef=1e-4)
    dtype = getattr(torch, step.dtype)
    engine = Engine(Ranks(), device, dtype)
    engine.wrap(model)
    engine.attach(adamw(model, learning_rate=1e-4))
    shape = (step.batch_size, step.seq_len)
    for _ in range(updates):
        for _ in range(step.accumulation_steps):
            batch = {name: torch.randint(config.vocab_size, shape) for name in ("input_ids", "targets")}
            batch["document_ids"] = torch.zeros(shape, dtype=torch.int64)
            batch["position_ids"] = torch.arange(step.seq_len).expand(shape).contiguous()
            with autocast(device, dtype):
                loss_sum, n_targets = causal_lm_loss(model, batch, stats)
            engine.backward(loss_sum / n_targets)
        engine.clip(1.0)
        engine.step()


def measure(name: str, updates: int, allocator: str) -> dict[str, float]:
    """Return the rise of the resident memory's peak over that after the imports, in bytes, and the seconds."""
    step = step_of(name)
    if allocator == "kept":
        keep_freed_memory()  # as every run on a CPU does
    tiny = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "intermediate_size": 64}  # fmt: skip
    train(Step(config=ModelConfig(**tiny), batch_size=1, seq_len=64, dtype=step.dtype), 2)
    before, began = resident("VmRSS"), time.perf_counter()
    train(step, updates)
    return {"measured": resident("VmHWM") - before, "seconds": time.perf_counter() - began}


@script
def main(argv: list[str] | None = None) -> dict | None:
    """Measure each case in its own process, print the table, write the figures; return them."""
    args = parse(Arguments, argv)
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    if args.measure:
        print(json.dumps(measure(args.measure, args.updates, args.allocator)))
        return None
    table, cases = [["case", "parameters", "trained", "peak at", "estimate, MiB", "measured, MiB", "ratio"]], []
    for name in args.names:
        step = step_of(name)
        parameters = count_parameters(meta_model(step.config, lora_rank=step.lora_rank))
        moment = peak(step, parameters, layout("ddp", step, parameters))
        flags = {"measure": name, "updates": args.updates, "num_threads": torch.get_num_threads()}
        flags["allocator"] = args.allocator
        command = [sys.executable, __file__, *(f"--{flag}={value}" for flag, value in flags.items())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATORS[args.allocator])
        if done.returncode:
            raise UserError(f"case {name} ended with code {done.returncode}; its message stands above")
        case = {"name": name, "parameters": parameters.total, "peak": asdict(moment), "estimate": moment.total}
        case |= json.loads(done.stdout.splitlines()[-1])
        case["ratio"] = case["estimate"] / case["measured"]
        cases.append(case)
        sizes = [f"{case[key] / MIB:,.0f}" for key in ("estimate", "measured")]
        table.append(
            [name, f"{parameters.total:,}", f"{parameters.trained:,}", moment.name, *sizes, f"{case['ratio']:.3f}"]
        )
        print(f"{name}: {case['ratio']:.3f} ({case['seconds']:.0f} s)", file=sys.stderr)
    print(format_table(table))
    ratios = [case["ratio"] for case in cases]
    print(f"estimate / measured: {min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} cases")
    result = {"arguments": vars(args), "cases": cases}
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
