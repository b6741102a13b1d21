"""How many parameters a model has, and what a training step of it costs."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: parameters (all, those that one token goes through, as text), FLOPs per training token."""

    n_parameters: int
    n_active: int
    text: str
    flops_per_token: float


def size_of(model: nn.Module, seq_len: int) -> ModelSize:
    """Return the size of ``model`` for rows of ``seq_len`` tokens; call it while the model is whole."""
    return ModelSize(*active_parameters(model), describe_parameters(model), flops_per_token(model, seq_len))


def active_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of parameters, number of those that one token goes through)."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - (model.config.num_parameters() - model.config.num_parameters(active=True))


def describe_parameters(model: nn.Module) -> str:
    """Return the number of parameters as text, with the active share where there are experts, and the trained one."""
    total, active = active_parameters(model)
    trained = trained_parameters(model)
    text = f"{total:,}" if active == total else f"{total:,} ({active:,} active per token, {active / total:.0%})"
    return text if trained in (0, total) else f"{text}, {trained:,} of them trained ({trained / total:.2%})"


def trained_parameters(model: nn.Module) -> int:
    """Return the number of parameters that have gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Return the operations of a training step per token; frozen weights save a third, their own gradient."""
    whole, trained = model.config.flops_per_token(seq_len), trained_parameters(model)
    return whole if trained == active_parameters(model)[0] else whole * 2 / 3 + 6 * trained
