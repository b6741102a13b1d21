"""How this process was started: alone, by torchrun, or by deepspeed."""

import os
import shlex
import sys


def on_first_rank() -> bool:
    """Return whether this process is the first of its job, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def resume_command() -> str:
    """Return the command line of this process with ``--from_resume`` added."""
    words, is_value = [], False
    for word in sys.argv:
        is_value = is_value and not word.startswith("-")  # --from_resume 1
        if not is_value and not word.startswith("--from_resume"):
            words.append(word)
        is_value = word == "--from_resume"
    n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    n_here, n_all = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")  # set by torchrun; by all
    launcher = ["torchrun", "--nproc_per_node", n_here] if n_here else ["python"]
    if n_all and not n_here:
        launcher = ["deepspeed", "--num_gpus", n_all]
    if n_nodes > 1:
        launcher = ["torchrun", "--nnodes", str(n_nodes), "...", "--nproc_per_node", n_here]
    return shlex.join([*launcher, *(word for word in words if not word.startswith("--local_rank=")), "--from_resume"])
