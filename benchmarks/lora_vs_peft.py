"""LoRA training compared with peft: speed, memory, and the distance to what a frozen model must compute.

    python benchmarks/lora_vs_peft.py
    python benchmarks/lora_vs_peft.py --families qwen3 --dropouts 0.1 --dtypes float32

The sides take turns in one process, on one batch: *peft* on a transformers model; *minillm* on the same transformers
model; *ours* on our own Transformer with the same weights; *limit* is the frozen transformers model with only the
gradient of its input, which every adapter has to compute. A step is forward, loss, backward and AdamW. First, all
losses are checked to be equal, while B is zero. Memory is the peak of the tensors of one step, above those before it:
from the allocator, or on a CPU from torch's profiler.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import Side, format_table, median_ratio, peak_bytes, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.errors import UserError, missing_package
from minillm.hardware import keep_freed_memory
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.precision import choose_device

SHAPES = {"small": ("small", 512, 4), "demo": ("demo", 256, 8)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES = ("llama", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how often."""

    families: str = "llama,qwen3"
    """Comma list of: llama, qwen3."""
    shapes: str = "small,demo"
    """Comma list of: small (512x8, 26M parameters, T 512, 4 rows), demo (128x4, 0.9M, T 256, 8 rows)."""
    dtypes: str = "float32,bfloat16"
    """Comma list of: float32, bfloat16 (autocast)."""
    dropouts: str = "0,0.1"
    """Comma list of LoRA's dropouts."""
    rank: int = 8
    """R of all linear layers but the output layer."""
    rounds: int = 0
    """Measured steps per side (0: 9 for small, 40 for demo)."""
    num_threads: int = 0
    """Threads of torch (0: torch's default)."""
    device: str = "cpu"
    """cpu or cuda."""
    output: str = "out/benchmarks/lora_vs_peft.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name, known in (("families", FAMILIES), ("shapes", SHAPES), ("dtypes", DTYPES)):
            for value in getattr(self, name).split(","):
                require(value in known, f"--{name} {value}: choose from {', '.join(known)}")
        require(self.rank >= 1, f"--rank {self.rank}: must be at least 1")
        for name in ("rounds", "num_threads"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")


# ---- the sides: each returns (model, loss) -----------------------------------------------------------------------


def theirs(model: nn.Module) -> tuple[nn.Module, Callable]:
    """Return a transformers model, adapted or not, with the loss of its own forward."""

    def loss(batch):
        return model(input_ids=batch["input_ids"], labels=batch["targets"], shift_labels=batch["targets"]).loss

    return model, loss


def limit(model: nn.Module) -> tuple[nn.Module, Callable]:
    """Return the frozen model, with gradients that go down to its input and nowhere else."""
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    start = nn.Parameter(torch.zeros(embed.weight.shape[1]))  # something to train, so that there is a way back
    model.register_parameter("start", start)

    def loss(batch):
        inputs = embed(batch["input_ids"]) + model.start
        return model(inputs_embeds=inputs, labels=batch["targets"], shift_labels=batch["targets"]).loss

    return model, loss


def ours(model: Transformer) -> tuple[nn.Module, Callable]:
    """Return our model with its mean loss, as ``Run`` divides it."""

    def loss(batch):
        loss_sum, n_targets = causal_lm_loss(model, batch)
        return loss_sum / n_targets

    return model, loss


def make_sides(family: str, shape: str, dropout: float, args: Arguments) -> tuple[dict, dict[str, Tensor]]:
    """Return name → (model, loss) of equal weights and equal A, and a batch."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise missing_package(error.name or "peft", purpose="this comparison", extra="bench") from None
    preset, seq_len, n_rows = SHAPES[shape]
    config = ModelConfig.preset(preset, use_qk_norm=family == "qwen3")
    torch.manual_seed(0)
    own = Transformer(config)
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config.to_hf() | {"use_cache": False}), attn_implementation="sdpa"
    )
    reference.load_state_dict(own.state_dict())
    settings = {"rank": args.rank, "alpha": 2 * args.rank, "dropout": dropout}
    adapted = copy.deepcopy(reference)
    names = apply_lora(adapted, **settings)
    apply_lora(own, **settings)
    wrapped = peft.get_peft_model(
        copy.deepcopy(reference),
        peft.LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
        ),
    )
    with torch.no_grad():
        for name in names:
            a = adapted.get_submodule(name).lora.A.weight
            own.get_submodule(name).lora.A.weight.copy_(a)
            wrapped.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(a)
    tokens = torch.randint(config.vocab_size, (n_rows, seq_len + 1), generator=torch.Generator().manual_seed(1))
    batch = {
        "input_ids": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "document_ids": torch.zeros(n_rows, seq_len, dtype=torch.long),
    }
    sides = {"peft": theirs(wrapped), "minillm": theirs(adapted), "ours": ours(own), "limit": limit(reference)}
    return sides, batch


# ---- measuring ---------------------------------------------------------------------------------------------------


def compare(family: str, shape: str, dtype_name: str, dropout: float, args: Arguments) -> dict:
    """Measure one case; return seconds, bytes and ratios by side."""
    device, dtype = choose_device(args.device), DTYPES[dtype_name]
    built, batch = make_sides(family, shape, dropout, args)
    sides = {name: Side(*side, device=device, dtype=dtype) for name, side in built.items()}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    losses = {name: side.step(batch) for name, side in sides.items()}  # B is zero: dropout changes nothing yet
    if max(losses.values()) - min(losses.values()) > 1e-2:
        raise UserError(f"the sides do not compute the same: losses {losses}")
    memory = {name: peak_bytes(lambda side=side: side.step(batch), device) for name, side in sides.items()}
    for turn in range(args.rounds or (9 if shape == "small" else 40)):
        for name in turns(list(sides), turn):
            sides[name].timed_step(batch)
    seconds = {name: side.seconds for name, side in sides.items()}
    return {
        "family": family, "shape": shape, "dtype": dtype_name, "dropout": dropout,
        "losses": losses,
        "bytes": memory,
        "seconds": {name: median(each) for name, each in seconds.items()},
        "speed": {name: median_ratio(seconds["peft"], seconds[name]) for name in sides},
        "memory": {name: memory[name] / memory["peft"] for name in sides},
        "of_limit": {name: median_ratio(seconds["limit"], seconds[name]) for name in sides},
    }  # fmt: skip


def table(results: list[dict]) -> str:
    """Return a line for each case."""
    rows = [["family", "shape", "dtype", "dropout", "speed on theirs", "on ours", "memory on theirs", "on ours",
             "limit: peft", "minillm", "memory of limit"]]  # fmt: skip
    for case in results:
        speed, memory, near = case["speed"], case["memory"], case["of_limit"]
        rows.append([
            case["family"], case["shape"], case["dtype"], f"{case['dropout']:g}", f"{speed['minillm']:.2f}x",
            f"{speed['ours']:.2f}x", f"{memory['minillm']:.2f}x", f"{memory['ours']:.2f}x", f"{near['peft']:.0%}",
            f"{near['minillm']:.0%}", f"{memory['limit']:.2f}x",
        ])  # fmt: skip
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure, print the table, write the JSON; return the rows."""
    args = parse(Arguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()  # as our trainer does; it applies to all sides, which share the process
    results = [
        compare(family, shape, dtype, float(dropout), args)
        for family in args.families.split(",")
        for shape in args.shapes.split(",")
        for dtype in args.dtypes.split(",")
        for dropout in args.dropouts.split(",")
    ]
    print(f"speed and memory as multiples of peft {_version('peft')}, on transformers {_version('transformers')}")
    print(table(results))
    write_json(args.output, {"arguments": dataclasses.asdict(args), "results": results})
    return results


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
