"""Several LoRA adapters in one batch: the weights are multiplied once for all tokens, A and B for those of a request.

The tokens of a step are sorted by adapter, so each adapter's tokens are one stretch of the row. (Chen et al., Punica,
2024, and Sheng et al., S-LoRA, 2024, have a kernel where this has a loop over the stretches.)

Legend: N tokens of one step, R rank.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minillm.errors import UserError
from minillm.lora.more.files import read_fitting_adapter


class LowRank(NamedTuple):
    """One layer's part of an adapter: it adds ``scaling`` · x Aᵀ Bᵀ."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    scaling: float


class ServedAdapters:
    """The adapters that requests can name. The model's weights stay as they are.

    Attributes:
        layers: of each adapter by name, its part of each layer.
        spans: adapter, start and end of each stretch of the row in the current step.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers: dict[str, dict[str, LowRank]] = {}
        self.spans: list[tuple[str, int, int]] = []
        self._n_added = 0
        self._numbers: dict[str, int] = {}  # of each adapter; another one of the same name has another number
        self._hooks: dict[str, RemovableHandle] = {}  # of each layer that an adapter changes

    def add(self, name: str, path: str | Path) -> None:
        """Load an adapter (a directory of ours or peft's, or a flat ``.pth``).

        Raises:
            UserError: the name is taken; the adapter does not fit the model, or is more than A and B of linear layers.
        """
        if not name or name in self.layers:
            raise UserError(f"adapter name {name!r}: give each adapter a name of its own; there are {self.known}")
        adapter = read_fitting_adapter(self.model, Path(path))
        modules = {layer: self.model.get_submodule(layer) for layer in adapter.names}
        others = [layer for layer, module in modules.items() if type(module) is not nn.Linear or layer == "lm_head"]
        others += [name for name in adapter.tensors if not name.endswith((".A", ".B"))]
        if others:
            raise UserError(
                f"the adapter {path} is more than A and B of linear layers inside the blocks ({others[0]}), so it "
                f"cannot run with others in one batch: merge it (python -m minillm.lora merge) and serve the result"
            )
        device = next(self.model.parameters()).device
        factors = {layer: [adapter.tensors[f"{layer}.{key}"].to(device) for key in "AB"] for layer in modules}
        self.layers[name] = {layer: LowRank(*ab, adapter.config.scaling_of(layer)) for layer, ab in factors.items()}
        self._n_added += 1
        self._numbers[name] = self._n_added
        for layer, module in modules.items():
            if layer not in self._hooks:  # a hook, since a second engine on the same model adds its own
                self._hooks[layer] = module.register_forward_hook(functools.partial(_add_parts, self, layer))

    def remove(self, name: str) -> None:
        """Forget an adapter; layers that no other adapter changes are as before."""
        self.check_known(name)
        mine = self.layers.pop(name)
        for layer in mine.keys() - {layer for other in self.layers.values() for layer in other}:
            self._hooks.pop(layer).remove()

    def check_known(self, name: str) -> None:
        """Raise UserError unless there is an adapter of this name."""
        if name not in self.layers:
            raise UserError(f"no adapter {name!r}: there are {self.known}")

    @property
    def known(self) -> str:
        """Return the names, for messages."""
        return ", ".join(self.layers) or "none"

    def root(self, name: str | None) -> tuple:
        """Return what keys and values depend on besides the tokens: which adapter."""
        return (None if name is None else self._numbers[name],)

    @contextlib.contextmanager
    def active(self, lengths: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """Inside, the model's tokens belong to adapters: (name or None, number of tokens) one behind the other."""
        start = 0
        for name, group in itertools.groupby(lengths, key=lambda part: part[0]):
            end = start + sum(length for _, length in group)
            if name is not None:
                self.spans.append((name, start, end))
            start = end
        try:
            yield
        finally:
            self.spans.clear()


def _add_parts(adapters: ServedAdapters, name: str, layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> None:
    """Add the adapters' parts to what a layer makes, y (1, N, out), of its inputs, (1, N, in)."""
    (x,) = inputs
    for adapter, start, end in adapters.spans:
        if low_rank := adapters.layers[adapter].get(name):
            part = F.linear(F.linear(x[:, start:end], low_rank.a.to(x.dtype)), low_rank.b.to(x.dtype))
            y[:, start:end] += (low_rank.scaling * part.to(torch.promote_types(part.dtype, torch.float32))).to(y.dtype)
