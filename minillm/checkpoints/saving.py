"""When and how a run is saved: from a copy, in a thread of its own, while training goes on.

What a checkpoint promises does not depend on that: it gets its name when all of it is on the disk (``checkpoint.py``).
Two are never written at once, an error ends the run at its next step, and no run ends before its checkpoint is whole.
"""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.checkpoints import checkpoint, resume
from minillm.distributed.engine import changing_state, map_tensors
from minillm.errors import UserError
from minillm.lora.core import adapted_layers


class ModelCopy:
    """A second copy of a model on the CPU, refilled for every checkpoint.

    It is made while the model is whole. Frozen parameters never change: they are shared where they lie on the CPU.
    """

    def __init__(self, model: nn.Module):
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", copy=True))
            else:
                memo[id(parameter)] = nn.Parameter(parameter.detach().cpu(), requires_grad=False)
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
        for layer in adapted_layers(model).values():
            if layer.lora.base_weight is not None:
                memo[id(layer.lora.base_weight)] = layer.lora.base_weight
        self.model = copy.deepcopy(model, memo).to("cpu")  # an adapter's start is not a parameter

    @torch.no_grad()
    def fill(self, weights: dict[str, Tensor]) -> nn.Module:
        """Take over ``weights``, of ``changing_state``'s names; return the model."""
        for name, tensor in changing_state(self.model).items():
            tensor.copy_(weights[name])
        return self.model


class Saver:
    """Writes the checkpoints of a run, one at a time; made while the model is whole, before the engine takes it."""

    def __init__(self, run):
        self.run, args = run, run.args
        holds_all = run.ranks.is_main or resume.may_resume(run)  # to go on, each rank reads all and takes its part
        is_needed = args.async_save and run.ranks.is_main if run.engine.trains_model else holds_all
        self.copy = ModelCopy(run.model) if is_needed else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._last = time.monotonic()  # not the clock on the wall, which may be set back

    def whole_model(self) -> nn.Module | None:
        """Return the model with all its weights on the main rank, None elsewhere. All ranks call it together."""
        if self.run.engine.trains_model:
            return self.run.model
        self.wait()  # what is being written reads the copy
        weights = self.run.engine.weights(self.run.model)
        return self.copy.fill(weights) if weights is not None else None

    def is_due(self) -> bool:
        """Return whether ``--save_minutes`` have passed since the last checkpoint."""
        minutes = self.run.args.save_minutes
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes

    def save(self) -> None:
        """Take what a checkpoint holds and begin to write it; with ``--async_save 0`` wait until it is written."""
        run = self.run
        self.wait()
        self._last = time.monotonic()
        directory = run.directory / "checkpoints"
        rng_states, measures = zip(*run.ranks.gather((checkpoint.rng_state(), run.measures.state())), strict=True)
        shards = None
        if run.engine.is_sharded and hasattr(run.engine, "save_shards") and run.output.is_large:
            path = checkpoint.temporary_path(directory, run.step)
            n_bytes = 12 * run.n_parameters[0]  # weights and two moments, float32
            run.ranks.main_alone(lambda: checkpoint.make_room(directory, run.step, n_bytes=n_bytes))
            shards = run.engine.save_shards(path / resume.SHARDS)
            optimizer = {"param_groups": run.optimizer.state_dict()["param_groups"]} if run.ranks.is_main else None
            model = None
        else:
            model, optimizer = self._copied(run.engine.weights(run.model)), run.engine.optimizer_state()
        if not run.ranks.is_main:
            self._writing = shards
        else:
            state = resume.state_of(run, list(rng_states), list(measures), optimizer)
            if run.args.async_save:
                state = copied(state)
            self._writing = self._thread.submit(self._write, directory, run.step, model, state, shards)
        if not run.args.async_save:
            self.wait()
            run.ranks.barrier()

    def check(self) -> None:
        """Raise what went wrong in the thread, if it has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:  # of some rank's part; the main rank hears of it from ``save_checkpoint``
            raise UserError(
                f"a rank cannot write its part of the checkpoint: {error.strerror or error}; older checkpoints are "
                f"untouched, free some space and resume with --from_resume"
            ) from error

    def close(self) -> None:
        """End the thread, when it has written what it is writing."""
        self._thread.shutdown()

    def _copied(self, weights: dict[str, Tensor] | None) -> nn.Module | None:
        if weights is None:
            return None
        return self.run.model if self.copy is None else self.copy.fill(weights)

    def _write(self, directory: Path, step: int, model: nn.Module | None, state: dict, shards: Future | None) -> None:
        def write_model(path: Path) -> None:
            if shards is not None:
                shards.result()
            else:
                self.run.output.write_checkpoint(model, path, tokenizer=self.run.tokenizer)

        is_begun = shards is not None
        n_bytes = 12 * self.run.n_parameters[0] if is_begun else n_bytes_of(state) + n_bytes_of(changing_state(model))
        checkpoint.save_checkpoint(
            directory, step, write_model, state, keep_last=self.run.args.keep_last, n_bytes=n_bytes, is_begun=is_begun
        )


def copied(tree):
    """Return a copy of nested containers, tensors on the CPU; nothing that training changes is shared."""
    return map_tensors(tree, lambda tensor: tensor.detach().to("cpu", copy=True))


def n_bytes_of(tree) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(n_bytes_of, tree.values()))
    return sum(map(n_bytes_of, tree)) if isinstance(tree, list | tuple) else 0
