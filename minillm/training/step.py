"""The micro-batches of one update."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.distributed.engine import Engine


class StepBatchesOnDevice:
    """The micro-batches of one update: iterating moves each to the device and tells the engine which is the last."""

    def __init__(self, micro_batches: list[dict[str, Tensor]], device: torch.device, engine: Engine):
        self.micro_batches, self.device, self.engine = micro_batches, device, engine

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(self.micro_batches):
            self.engine.set_last(index == len(self.micro_batches) - 1)
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
