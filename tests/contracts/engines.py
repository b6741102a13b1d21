"""A run of the real loop on every engine; started by ``test_engines.py`` under torchrun.

-m tests.contracts.engines OUT ddp fsdp zero2 zero3off ddp_moe ddp_lora      three steps
-m tests.contracts.engines OUT --stop 3 fsdp zero3                               of six steps, then a signal
-m tests.contracts.engines OUT --from SAVED fsdp:zero3 ddp:fsdp                  the others: engine:engine before
    -m tests.contracts.engines OUT --from SAVED fsdp_bf16                            all six: no engine before
"""

import argparse
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


def run_one(name: str, directory: Path, *, stop: int, max_steps: int, resume: bool) -> dict | None:
    """Train on the engine that ``name`` begins with; return the result, or None where a signal ended it."""
    engine, _, kind = name.partition("_")

    def send_signal(run) -> None:
        if stop and run.step == stop - 1 and run.ranks.rank == run.ranks.world_size - 1:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--from", dest="source", type=Path)
    said = parser.parse_args()
    torch.distributed.init_process_group("gloo")  # one group for all: every Run finds it and leaves it alone
    is_main = torch.distributed.get_rank() == 0
    for name in said.names:
        engine, _, before = name.partition(":")
        directory = said.out / name.replace(":", "-after-")
        if before and is_main:
            shutil.copytree(said.source / before, directory)
        torch.distributed.barrier()
        max_steps = 6 if said.stop or said.source else 3
        result = run_one(engine, directory, stop=said.stop, max_steps=max_steps, resume=bool(before))
        if is_main and result:
            kept = {key: result[key] for key in ("metrics", "validations", "weights", "optimizer")}
            torch.save(kept, said.out / f"{directory.name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
