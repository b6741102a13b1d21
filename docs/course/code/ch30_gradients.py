"""Chapter 30: a gradient that is zero, one that is too long by the number of targets, and what the monitor says."""

import sys

import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.lora import LoRAConfig, apply_lora
from minillm.lora.more.monitor import Monitor
from minillm.losses import causal_lm_loss
from minillm.model import Transformer

torch.set_num_threads(1)  # the model is small
V, N_STEPS = 320, 60
SHAPE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def new_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset("demo", **SHAPE))


def batch_of(n_rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(V, (n_rows, 33), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}


def zero(*, is_broken: bool) -> None:
    """Train an adapter; where it is broken, A begins at zero, as B does."""
    model = new_model()
    apply_lora(model, LoRAConfig(rank=4, target_modules="attention"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if is_broken and ".A." in name:
            nn.init.zeros_(parameter)
    optimizer, monitor = torch.optim.AdamW(trained.values(), lr=1e-4), Monitor(model, interval=5)
    for step in range(1, N_STEPS + 1):
        loss_sum, n_targets = causal_lm_loss(model, batch_of(4))
        (loss_sum / n_targets).backward()
        monitor.before_update(step)
        if step in (1, N_STEPS):
            norm = torch.stack([parameter.grad.norm() for parameter in trained.values()]).norm()
            print(f"step {step}, gradient norm: {norm:.4f}, loss: {loss_sum / n_targets:.4f}")
        optimizer.step()
        row = monitor.after_update(step, optimizer)
        for warning in row["warnings"] if row else ():
            print(f"warning, step {step}: {warning}")
        optimizer.zero_grad()


def huge(*, divides: bool) -> None:
    """Print the gradient norm of batches of 4 and of 32 rows; the loss is a sum (the fault) or a mean (the cure)."""
    for n_rows in (4, 32):
        model = new_model()
        loss_sum, n_targets = causal_lm_loss(model, batch_of(n_rows))
        (loss_sum / n_targets if divides else loss_sum).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        print(f"gradient norm, {n_rows} rows: {norm:.3f}")


if __name__ == "__main__":
    what = sys.argv[1]
    {"zero": lambda: zero(is_broken=True), "zero_cured": lambda: zero(is_broken=False),
     "huge": lambda: huge(divides=False), "huge_cured": lambda: huge(divides=True)}[what]()  # fmt: skip
