"""A run of the real loop on every engine; started by ``test_engines.py`` under torchrun.

-m tests.contracts.engines OUT zero2off ddp_moe fsdp@3 fsdp_bf16@6 zero3:fsdp

    ddp_moe      three steps, of a model with experts
    fsdp_bf16@6  six steps, in bfloat16
    fsdp@3       six steps, but a signal comes in the third
    zero3:fsdp   the other three, on zero3, from what fsdp@3 has left in OUT or in the directory of --from
"""

import argparse
import contextlib
import shutil
import signal
from pathlib import Path

import torch

from minillm.checkpoints.interrupt import Interrupted
from minillm.distributed.engine import Engine
from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, train

SETTINGS = Path(__file__).parents[2] / "configs" / "deepspeed"


class BypassedDDP(Engine):
    """A classic bug: DDP is made, but the loop calls the module inside it, so nothing is averaged."""

    def attach(self, optimizer):
        super().attach(optimizer)
        return self.module.module


def flags_of(engine: str) -> dict:
    """Return the flags that choose an engine."""
    if engine.startswith("zero"):
        return {
            "parallel": "deepspeed",
            "deepspeed_config": str(SETTINGS / f"{engine.replace('off', '_offload')}.json"),
        }
    return {"parallel": "fsdp" if engine == "fsdp" else "ddp"}


def run_one(name: str, directory: Path, *, stops: bool, max_steps: int, resume: bool) -> dict | None:
    """Train on the engine that ``name`` begins with; return the result, or None where a signal ended it."""
    engine, _, kind = name.partition("_")

    def send_signal(run) -> None:
        if stops and run.step == 2 and run.ranks.rank == run.ranks.world_size - 1:
            signal.raise_signal(signal.SIGTERM)  # to one rank alone: all must stop

    n_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    args = arguments(
        directory,
        batch_size=4 // n_ranks,
        global_batch_size=12,
        max_steps=max_steps,
        from_resume=resume,
        eval_interval=2,
        dtype="bfloat16" if kind == "bf16" else "float32",
        **flags_of(engine),
    )
    try:
        return train(
            args,
            engine=BypassedDDP if engine == "bypassed" else None,
            config=MOE_CONFIG if kind == "moe" else CONFIG,
            lora=kind == "lora",
            validate=True,
            before_update=send_signal,
        )
    except Interrupted:
        return None


def spare_the_build() -> None:
    """Let DeepSpeed's ranks speak through gloo alone, as they do between machines.

    On one machine without a GPU it compiles a shared-memory all-reduce at first, which takes a minute.
    """
    with contextlib.suppress(ImportError):
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    spare_the_build()
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--from", dest="source", type=Path)
    said = parser.parse_args()
    torch.distributed.init_process_group("gloo")  # one group for all: every Run finds it and leaves it alone
    is_main = torch.distributed.get_rank() == 0
    for word in said.names:
        rest, _, before = word.partition(":")
        name, _, n_steps = rest.partition("@")
        directory = said.out / word.replace(":", "-after-")
        if before and is_main:
            shutil.copytree((said.source or said.out) / f"{before}@3", directory)
        torch.distributed.barrier()
        max_steps = 6 if before or n_steps else 3
        result = run_one(name, directory, stops=n_steps == "3", max_steps=max_steps, resume=bool(before))
        if is_main and result:
            kept = {key: result[key] for key in ("metrics", "validations", "weights", "optimizer")}
            torch.save(kept, said.out / f"{directory.name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
