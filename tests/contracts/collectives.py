"""What the ranks send each other in every backward pass of a step; started by ``test_collectives.py`` under torchrun.

-m tests.contracts.collectives OUT ddp fsdp zero1
"""

import json
import sys
from pathlib import Path

import torch

from minillm.training.step import Step
from tests.contracts.engines import flags_of
from tests.contracts.harness import arguments, train

REDUCTIONS = ("allreduce", "all_reduce", "reduce_scatter")


def main(out: Path, *engines: str) -> None:
    torch.distributed.init_process_group("gloo")
    backward, found = Step.backward, {}
    for engine in engines:
        counts: list[int] = []

        def counted(step, loss_sum, n_targets, counts=counts):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                backward(step, loss_sum, n_targets)
            names = [event.name for event in profile.events()]
            counts.append(sum(any(word in name for word in REDUCTIONS) for name in names))

        Step.backward = counted
        args = arguments(out / engine, batch_size=2, global_batch_size=12, max_steps=2, **flags_of(engine))
        train(args)
        found[engine] = counts
    if torch.distributed.get_rank() == 0:
        (out / "counts.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
