"""``--dry_run``: what the run would see and cost, before it starts."""

import time

from torch import nn

from minillm import hardware
from minillm.data.report import colour_targets, data_report, format_report
from minillm.model.sizes import describe_parameters, trained_parameters
from minillm.terminal import use_colour


def dry_run(model: nn.Module, loader, tokenizer, objective, engine, *, router_stats=None, total_steps: int) -> None:
    """Print the data report, the first batch with its targets coloured, and the memory and time expected.

    The cost is measured: the micro-batches of the first update run forward and backward twice, the second time
    counts. Optimizer state (8 bytes per trainable parameter) is added to the memory, as it is not built here.

    Args:
        objective: the stage's. engine: for device, dtype and ranks. router_stats: what a mixture of experts needs.
    """
    micro_batches = loader.step(0, 0)
    if engine.ranks.is_main:
        print(format_report(data_report(loader.rows, tokenizer)))
        how = "coloured" if use_colour() else "in [[ ]]"
        print(f"\nfirst row, targets {how}:\n" + colour_targets(micro_batches[0], tokenizer))
    n_tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in micro_batches)
    model.train()
    for _ in range(2):
        began = time.perf_counter()
        for batch in objective.prepare(micro_batches, training=True, step=0):
            with engine.autocast():
                loss_sum, _ = objective(model, engine.to_device(batch), router_stats)
            loss_sum.backward()
        float(loss_sum.detach())  # waits for the device
        seconds = time.perf_counter() - began
        model.zero_grad(set_to_none=True)
    memory = hardware.memory_bytes(engine.device) + 8 * trained_parameters(model)
    if not engine.ranks.is_main:  # the others have helped: some engines and losses need all of them
        return
    print(
        f"\nparameters: {describe_parameters(model)}"
        f"\nsteps: {loader.steps_per_epoch:,} per epoch, {total_steps:,} in all"
        f"\nmemory: about {memory / 2**30:.2f} GiB on {engine.device} at the peak"
        f"\ntime: about {seconds:.3f} s per step ({n_tokens / seconds:,.0f} tokens/s and rank), "
        f"{total_steps * seconds / 60:.1f} minutes in all, validation and saving not counted"
    )
