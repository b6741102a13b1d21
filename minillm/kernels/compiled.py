"""``--compile``: what is compiled, and how often.

Each block is compiled by itself, which takes a fraction of the time of compiling the whole model, and blocks that are
alike share the result. Decoding runs uncompiled (``inference.generate``), and so do the losses.
"""

from torch import nn

BACKEND = "inductor"  # torch's own; tests count graphs with another one
# Graphs that one block may need: trained and validated, with its adapter on and off, each for rows of one length, of
# any length, and of a single position.
GRAPHS_PER_BLOCK = 16


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
