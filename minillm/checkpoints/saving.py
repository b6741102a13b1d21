"""Saving and restoring a run: from a copy of the model, in a thread, while training continues.

A checkpoint gets its name when all of it is on the disk (``checkpoint.py``). Two are never written at once, an error
ends the run at its next step, and no run ends before its checkpoint is complete.
"""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.checkpoints import checkpoint
from minillm.checkpoints.outputs import WholeModel
from minillm.distributed.engine import Engine, changing_state, map_tensors
from minillm.errors import UserError
from minillm.lora.core import adapted_layers

SHARDS = "shards"  # folder of a checkpoint that all ranks have written together


class ModelCopy:
    """A second copy of a model on the CPU, refilled for every checkpoint.

    Create it while the model is whole. Frozen parameters never change: those on the CPU are shared, not copied.
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
        """Copy ``weights``, named as by ``changing_state``, into the model; return it."""
        for name, tensor in changing_state(self.model).items():
            tensor.copy_(weights[name])
        return self.model


class Saver:
    """Writes the checkpoints of a run, one at a time. Create it while the model is whole, before the engine takes it.

    Args:
        directory: of the checkpoints. output: how the model is written and read.
        is_async: write in a thread, from a copy. keep_last: how many checkpoints stay.
        minutes: between checkpoints, see ``is_due`` (0: never due). may_resume: whether ``load`` may be called.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        output: WholeModel,
        directory: Path,
        *,
        is_async: bool = True,
        keep_last: int = 2,
        minutes: float = 0.0,
        may_resume: bool = False,
    ):
        self.model, self.engine, self.output, self.directory = model, engine, output, directory
        self.is_async, self.keep_last, self.minutes = is_async, keep_last, minutes
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        holds_all = engine.ranks.is_main or may_resume  # to resume, each rank reads everything and takes its part
        is_needed = is_async and engine.ranks.is_main if engine.holds_master_weights else holds_all
        self.copy = ModelCopy(model) if is_needed else None
        self._thread: ThreadPoolExecutor | None = None  # of the last checkpoint
        self._writing: Future | None = None
        self._last_time = time.monotonic()  # the wall clock may be set back
        self.last_step = -1

    def whole_model(self) -> nn.Module | None:
        """Return the model with all its weights on the main rank, None elsewhere. All ranks call it together."""
        if self.engine.holds_master_weights:
            return self.model
        self.wait()  # what is being written reads the copy
        weights = self.engine.weights(self.model)
        return self.copy.fill(weights) if weights is not None else None

    def is_due(self) -> bool:
        """Return whether ``minutes`` have passed since the last checkpoint."""
        return bool(self.minutes) and time.monotonic() - self._last_time >= 60 * self.minutes

    def save(self, step: int, state: dict | None, *, tokenizer) -> None:
        """Copy the weights and begin to write a checkpoint; return when it is written unless ``is_async``.

        Args:
            state: the training state without the optimizer's, on the main rank. All ranks call this together.
        """
        self.wait()
        self._last_time, self.last_step = time.monotonic(), step
        ranks, shards = self.engine.ranks, None
        if self.engine.is_sharded and hasattr(self.engine, "save_shards") and self.output.is_large:
            n_bytes = self._sharded_bytes()
            ranks.on_main_rank(lambda: checkpoint.prepare_directory(self.directory, step, n_bytes=n_bytes))
            shards = self.engine.save_shards(checkpoint.temporary_path(self.directory, step) / SHARDS)
            optimizer = {"param_groups": self.engine.optimizer.state_dict()["param_groups"]} if ranks.is_main else None
            model = None
        else:
            model, optimizer = self._copied(self.engine.weights(self.model)), self.engine.optimizer_state()
        if ranks.is_main:
            state = state | {"optimizer": optimizer}
            if self.is_async:
                state = copied(state)
            # The thread ends with its work. If it lived on, so would the OpenMP threads that it computed with: with
            # more of them than cores, OpenMP no longer waits actively, and later steps on a CPU take twice as long.
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self._writing = self._thread.submit(self._write, step, model, state, shards, tokenizer)
            self._thread.shutdown(wait=False)
        else:
            self._writing = shards
        if not self.is_async:
            self.wait()
            ranks.barrier()

    def load(self, path: Path, optimizer: dict) -> None:
        """Restore weights and optimizer of the checkpoint ``path``.

        Args:
            optimizer: its state in ``training_state.pt``; of sharded ones the parameter groups alone.
        """
        target = self.model if self.engine.holds_master_weights else self.copy.model
        if not (path / SHARDS).is_dir():
            self.output.read_checkpoint(target, path)
        elif hasattr(self.engine, "load_shards"):
            self.engine.load_shards(path / SHARDS, optimizer["param_groups"])
            return
        else:
            from minillm.distributed.fsdp import read_shards

            optimizer = read_shards(path / SHARDS, target, self.engine.shapes(), optimizer["param_groups"])
        self.engine.load(target, optimizer)

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
        """Return when nothing is being written, whatever went wrong."""
        if self._thread is not None:
            self._thread.shutdown()

    def _copied(self, weights: dict[str, Tensor] | None) -> nn.Module | None:
        if weights is None:
            return None
        return self.model if self.copy is None else self.copy.fill(weights)

    def _sharded_bytes(self) -> int:
        return 12 * self.n_parameters  # weights and two moments, float32

    def _write(self, step: int, model: nn.Module | None, state: dict, shards: Future | None, tokenizer) -> None:
        def write_model(path: Path) -> None:
            if shards is not None:
                shards.result()
            else:
                self.output.write_checkpoint(model, path, tokenizer=tokenizer)

        is_begun = shards is not None
        n_bytes = self._sharded_bytes() if is_begun else n_bytes_of(state) + n_bytes_of(changing_state(model))
        checkpoint.save_checkpoint(
            self.directory, step, write_model, state, keep_last=self.keep_last, n_bytes=n_bytes, is_begun=is_begun
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
