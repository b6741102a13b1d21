"""``--compile``: what is compiled, when, and how often.

Each block is compiled by itself, which takes a fraction of the time of compiling the whole model, and blocks that are
alike share the result. Where the compiler is at work, norms, rotations and SwiGLU are their plain expressions, which it
fuses. Decoding runs uncompiled (``inference.generate``), and so do the losses.
"""

import importlib.util
import os
import shutil

import torch
from torch import nn

BACKEND = "inductor"  # torch's own; tests count graphs with another one
# Graphs that one block may need: trained and validated, with its adapter on and off, each for rows of one length, of
# any length, and of a single position.
GRAPHS_PER_BLOCK = 16


def is_wanted(setting: str, device: torch.device, *, parallel: str = "ddp") -> bool:
    """Return what ``--compile`` means on this device.

    ``auto`` compiles on CUDA, where a block is otherwise some 140 short kernels, if the compiler's own compilers are
    there; not next to DeepSpeed, whose hooks break the graphs. On a CPU our own kernels are faster.
    """
    if setting != "auto":
        return setting == "1"
    has_compilers = importlib.util.find_spec("triton") is not None and (
        "CC" in os.environ or any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    )
    return device.type == "cuda" and parallel != "deepspeed" and has_compilers


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of ``model`` in place.

    Lengths that vary from batch to batch (rows that are not packed) become one graph for all lengths at the second
    length that comes. torch stops compiling, with a warning, at a number of graphs that all blocks share (8): adapted
    blocks do not share graphs, so it is raised to what the model's blocks need.
    """
    import torch._dynamo  # takes a second, which nobody else should wait for

    model.block_attention = False  # the compiler has its own way with torch's attention
    blocks = model.model.layers
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK * len(blocks))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * config.recompile_limit)
    for block in blocks:
        block.compile(backend=BACKEND)
