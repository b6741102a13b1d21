"""Chapter 30: a run that is resumed, one that goes on from its weights alone, and one that is refused."""

import shutil
from pathlib import Path

from ch30_run import train, world
from safetensors.torch import load_file

HALF, WHOLE = ("--max_steps", "20"), ("--max_steps", "40")
KEPT = ("--lr_scheduler", "constant", "--save_interval", "20", "--keep_last", "2")


def largest_difference(one: str, two: str) -> float:
    """Return the largest difference of two runs' weights."""
    first, second = (load_file(Path("out", name, "model.safetensors")) for name in (one, two))
    return max((first[name] - second[name]).abs().max().item() for name in first)


with world():
    train("pretrain", *WHOLE, *KEPT, "--run_name", "whole", quiet=True)

    # The fault: the second half starts from the weights of the first; optimizer, warm-up and data begin again.
    train("pretrain", *HALF, *KEPT, "--run_name", "half", quiet=True)
    train("pretrain", *HALF, *KEPT, "--run_name", "again", "--from_weight", "out/half", quiet=True)
    print(f"from the weights alone, largest difference: {largest_difference('whole', 'again'):.4f}")

    # The cure: the same run goes on, with all that a checkpoint holds.
    shutil.copytree("out/whole", "out/resumed")
    shutil.rmtree("out/resumed/checkpoints/step-00000040")
    train("pretrain", *WHOLE, *KEPT, "--run_name", "resumed", "--from_resume", quiet=True)
    print(f"resumed, largest difference: {largest_difference('whole', 'resumed'):.4f}")

    # With another setting it would be another run.
    flags = ("--run_name", "whole", "--from_resume", "--batch_size", "8")
    print(f"resumed with other rows, exit code {train('pretrain', *WHOLE, *KEPT, *flags, quiet=True)}")
