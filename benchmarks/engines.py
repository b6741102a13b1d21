"""The demo's stages on every engine with two processes: losses compared with one process, and peak memory per rank.

    python benchmarks/engines.py
    python benchmarks/engines.py --stages pretrain,sft --engines fsdp,zero2 --n_steps 60

Run `make demo` first; its data and models are used. The first table has, for each stage and engine, the largest
relative difference of a training loss from one process over all steps, and that of the exported weights. The second
has the peak memory of a rank during training, above that of the process before the model was made: a wider model on
short rows, so that nearly all of it is weights, gradients and optimizer state. Freed memory is returned to the system
at once, so the process holds only its tensors. Memory for the start (each rank loads the whole model before it is
sharded) and for saving is not included.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch
from safetensors.torch import load_file

from benchmarks.common import MAPPED, format_table, resident, write_json
from minillm.cli.command_line import parse, require, script
from minillm.errors import UserError
from minillm.reports.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "configs" / "deepspeed"
ENGINES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "zero1": {"parallel": "deepspeed", "deepspeed_config": SETTINGS / "zero1.json"},
    "zero2": {"parallel": "deepspeed", "deepspeed_config": SETTINGS / "zero2.json"},
    "zero3": {"parallel": "deepspeed", "deepspeed_config": SETTINGS / "zero3.json"},
    "zero3_offload": {"parallel": "deepspeed", "deepspeed_config": SETTINGS / "zero3_offload.json"},
}
FILES = {  # stage: training data, validation data, further flags
    "pretrain": ("pretrain_train", "pretrain_valid", {}),
    "sft": ("sft_train", "sft_valid", {}),
    "lora": (
        "identity_train",
        "identity_test",
        {"replay_path": "sft_train", "lora_dropout": 0.0, "monitor_interval": 0},
    ),
    "dpo": ("dpo_train", "dpo_test", {}),
    "distill": ("pretrain_train", "pretrain_valid", {}),
    "reason": ("reason_train", "reason_test", {"replay_path": "sft_train"}),
}
STARTS = {"sft": "pretrain_128", "lora": "full_sft_128", "dpo": "full_sft_128", "reason": "rlhf_128"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run, and on which data."""

    demo: str = "out/demo"
    """Directory of the demo's runs."""
    data: str = "dataset/demo"
    """Directory of the demo's data."""
    stages: str = "pretrain,sft,lora,dpo,distill,reason"
    """Comma list of stages (empty: only the memory)."""
    engines: str = "ddp,fsdp,zero1,zero2,zero3,zero3_offload"
    """Comma list of engines."""
    n_steps: int = 40
    """Updates of every run."""
    memory: bool = True
    """Measure the memory per rank too."""
    hidden_size: int = 768
    """Width of the model whose memory is measured; it has 8 layers."""
    dtypes: str = "float32,bfloat16"
    """Comma list of dtypes for the memory."""
    output: str = "out/benchmarks/engines.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise ``UserError`` for an unknown name or a missing demo."""
        for kind, names, known in (("stage", self.stages, FILES), ("engine", self.engines, ENGINES)):
            for name in filter(None, names.split(",")):
                require(name in known, f"--{kind}s {names}: no {kind} {name!r}; there are: {', '.join(known)}")
        missing = not (Path(self.demo) / "rlhf_128" / "config.json").is_file()
        require(not (self.stages and missing), f"--demo {self.demo}: no models there; `make demo` makes them")


def launch(n_ranks: int, program: list[str], variables: dict[str, str] | None = None) -> None:
    """Run a program on ``n_ranks`` ranks, one thread each; ``UserError`` with the end of its output if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
    done = subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        raise UserError(f"{' '.join(program)} ended with {done.returncode}: {' | '.join(lines)[-1500:]}")


def run_stage(args: Arguments, stage: str, engine: str, n_ranks: int, out: Path) -> dict:
    """Train a stage of the demo; return its ``losses`` by row of metrics, and the ``weights`` that were exported."""
    data, demo = Path(args.data).resolve(), Path(args.demo).resolve()
    train, valid, more = FILES[stage]
    more = {key: data / f"{value}.jsonl" if key == "replay_path" else value for key, value in more.items()}
    flags = {
        "config": ROOT / "configs" / "demo" / f"{stage}.yaml", "save_dir": out, "cache_dir": demo / ".token_cache",
        "data_path": data / f"{train}.jsonl", "valid_path": data / f"{valid}.jsonl",
        "tokenizer_path": demo / "tokenizer",
        "batch_size": 8 // n_ranks, "global_batch_size": 8, "max_steps": args.n_steps, "eval_interval": 0,
        "save_interval": args.n_steps // 2, "log_interval": 1, "dtype": "float32", **more, **ENGINES[engine],
    }  # fmt: skip
    if stage in STARTS:
        flags["from_weight"] = demo / STARTS[stage]
    if stage == "distill":
        flags["teacher"] = demo / "pretrain_128"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launch(n_ranks, [str(ROOT / f"train_{stage}.py"), *words])
    directory = next(out.rglob("metrics.jsonl")).parent
    name = "adapter_model.safetensors" if stage == "lora" else "model.safetensors"
    losses = [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]
    return {"losses": losses, "weights": load_file(directory / name)}


def compare(ours: dict, one: dict) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and of a weight as ‖a − b‖ / ‖b‖."""
    loss = max(abs(a / b - 1) for a, b in zip(ours["losses"], one["losses"], strict=True))
    weight = max(
        ((ours["weights"][name] - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
        for name, wanted in one["weights"].items()
    )
    return loss, weight


def memory_of(args: Arguments, engine: str, dtype: str, out: Path) -> list[float]:
    """Return the peak of every rank's memory while it trains, in MiB above that before the model was made."""
    program = [str(Path(__file__).resolve()), "--worker", engine, dtype, str(args.hidden_size), str(out)]
    launch(2, program, MAPPED)
    return [json.loads((out / f"{rank}.json").read_text())["mib"] for rank in range(2)]


def worker(engine: str, dtype: str, hidden_size: str, out: str) -> None:
    """Train three steps on this rank and write down its peak of memory."""
    from minillm import hardware
    from minillm.cli.arguments import PretrainArguments
    from minillm.config import ModelConfig
    from minillm.data import StepBatches
    from minillm.losses import causal_lm_loss
    from minillm.model import Transformer
    from minillm.training.optim import adamw
    from minillm.training.run import Run
    from tests.contracts.harness import RaggedRows

    if "deepspeed" in ENGINES[engine]["parallel"]:
        import deepspeed  # noqa: F401 - its own memory does not belong to the model
    flags = {name: str(value) for name, value in ENGINES[engine].items()}
    args = PretrainArguments(
        data_path="-", save_dir=out, dtype=dtype, device="cpu", max_steps=3, batch_size=1,
        save_interval=0, save_minutes=0,
        async_save=False, **flags,
    )  # fmt: skip
    hardware.keep_freed_memory = lambda: False
    before = resident("VmRSS")
    with Run(args, stage="pretrain") as run:
        config = ModelConfig.preset("base", vocab_size=6400, hidden_size=int(hidden_size), num_hidden_layers=8)
        loader = StepBatches(RaggedRows(), **run.batching())
        optimizer = adamw(run.wrap(Transformer(config)), learning_rate=1e-4)
        model = run.start(optimizer, loader, tokenizer=None, loss=causal_lm_loss)
        for step in run.steps(loader):
            if run.step == 1:  # the optimizer's state exists now
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = causal_lm_loss(model, batch)
                step.backward(loss_sum, n_targets)
            run.update(step)
        mib = (resident("VmHWM") - before) / 2**20
        (Path(out) / f"{run.ranks.rank}.json").write_text(json.dumps({"mib": mib}))


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    torch.set_num_threads(1)
    engines = args.engines.split(",")
    results: dict = {"stages": {}, "memory_mib": {}}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        rows = [["stage", *(f"{engine} loss / weights" for engine in engines)]]
        for stage in filter(None, args.stages.split(",")):
            one = run_stage(args, stage, "ddp", 1, place / stage / "one")
            found = {e: compare(run_stage(args, stage, e, 2, place / stage / e), one) for e in engines}
            results["stages"][stage] = found
            rows.append([stage, *(f"{loss:.1e} / {weight:.1e}" for loss, weight in found.values())])
            print(format_table([rows[0], rows[-1]]), flush=True)
        print(f"\nlargest difference from one process over {args.n_steps} steps, two processes\n{format_table(rows)}")
        if args.memory:
            rows = [["dtype", *engines]]
            for dtype in args.dtypes.split(","):
                peaks = {}
                for engine in engines:
                    out = place / dtype / engine
                    out.mkdir(parents=True)
                    peaks[engine] = memory_of(args, engine, dtype, out)
                results["memory_mib"][dtype] = peaks
                rows.append([dtype, *(" / ".join(f"{mib:,.0f}" for mib in peaks[engine]) for engine in engines)])
            print(f"\npeak memory in MiB, rank 0 / rank 1, {args.hidden_size} x 8\n{format_table(rows)}")
    write_json(args.output, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
