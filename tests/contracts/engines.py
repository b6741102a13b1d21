"""Three bodies behind the engine's face, and a run of the real loop on each; started by ``test_engines.py``.

    torchrun --nproc_per_node 2 -m tests.contracts.engines OUT ddp fsdp zero2 ddp_moe ddp_lora
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from minillm.training.parallel import Engine
from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, train


class BypassedDDP(Engine):
    """A classic bug: DDP is made, but the loop calls the module inside it, so nothing is averaged."""

    def attach(self, optimizer):
        super().attach(optimizer)
        return self.module.module


class FSDP2(Engine):
    """Parameters, gradients and optimizer state sharded over the ranks, gathered block by block."""

    def wrap(self, model, device):
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block)
        self.module = fully_shard(model)
        return self.module

    def set_last(self, is_last):
        self.module.set_requires_gradient_sync(is_last)

    def clip(self, max_norm):
        norm = super().clip(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class ZeRO2(Engine):
    """DeepSpeed: gradients and optimizer state sharded over the ranks."""

    def wrap(self, model, device):
        self.module = model
        return model

    def attach(self, optimizer):
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 1,  # not used: the loop feeds the batches
            "gradient_clipping": 0.0,  # set per step by clip()
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return self.module

    def set_last(self, is_last):
        self.module.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss):
        self.module.backward(loss)

    def clip(self, max_norm):
        self.module.optimizer.clip_grad = max_norm  # DeepSpeed clips inside its step
        return torch.as_tensor(self.module.optimizer.scaled_global_norm())

    def step(self):
        self.module.step()
        return True


ENGINES = {"ddp": Engine, "bypassed": BypassedDDP, "fsdp": FSDP2, "zero2": ZeRO2}


def main(out: str, *names: str) -> None:
    torch.distributed.init_process_group("gloo")  # one group for all: every Run finds it and leaves it alone
    for name in names:
        args = arguments(Path(out) / name, batch_size=2, global_batch_size=12)
        engine, _, kind = name.partition("_")
        config = MOE_CONFIG if kind == "moe" else CONFIG
        result = train(args, engine=ENGINES[engine], config=config, lora=kind == "lora")
        if torch.distributed.get_rank() == 0:
            torch.save({"metrics": result["metrics"], "weights": result["weights"]}, Path(out) / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
