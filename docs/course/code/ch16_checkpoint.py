"""Chapter 16: what a checkpoint must hold, one part left out at a time, and what happens to a damaged one."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minillm.checkpoints import checkpoint
from minillm.training.optim import adamw

N_STEPS, HALF = 40, 20
DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def fresh():
    """Return a model with dropout and its optimizer, always the same."""
    checkpoint.seed_everything(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8))
    return model, adamw(model, learning_rate=0.01)


def train(model, optimizer, start, end):
    """Make the updates ``start`` to ``end``; the order of the data is a function of the epoch alone."""
    for step in range(start, end):
        order = np.random.default_rng([0, step // 8]).permutation(64)
        rows = DATA[order[8 * (step % 8) : 8 * (step % 8) + 8]]
        optimizer.zero_grad()
        (model(rows) - rows).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def resumed(saved, left_out=""):
    """Return the weights of a run that resumes from ``saved`` without one of its parts."""
    model, optimizer = fresh()
    model.load_state_dict(saved["weights"])
    if left_out != "optimizer":
        optimizer.load_state_dict(saved["optimizer"])
    if left_out != "random state":
        checkpoint.set_rng_state(saved["rng"])
    start = 0 if left_out == "position" else saved["step"]
    return train(model, optimizer, start, start + N_STEPS - HALF)


whole = train(*fresh(), 0, N_STEPS)

with tempfile.TemporaryDirectory() as folder:
    directory = Path(folder)
    model, optimizer = fresh()
    for end in (HALF - 10, HALF):
        train(model, optimizer, end - 10, end)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {"weights": weights, "optimizer": optimizer.state_dict(), "rng": checkpoint.rng_state(), "step": end}
        checkpoint.save_checkpoint(directory, end, lambda path: None, state, keep_last=2)

    saved = checkpoint.load_state(checkpoint.newest_checkpoint(directory))
    print(f"saved at step: {saved['step']}")
    print(f"largest difference, all restored: {(resumed(saved) - whole).abs().max():.1e}")
    for part in ("optimizer", "random state", "position"):
        difference = (resumed(saved, part) - whole).abs().max()
        print(f"largest difference in learning rates, without {part}: {difference / 0.01:.2f}")

    file = directory / f"step-{HALF:08d}" / checkpoint.STATE_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    file.write_bytes(content)
    print(f"newest intact checkpoint after one flipped bit: {checkpoint.newest_checkpoint(directory).name}")
