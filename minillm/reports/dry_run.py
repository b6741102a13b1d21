"""``--dry_run``: what the run would see and cost, before it starts."""

import time

from minillm import hardware
from minillm.data.report import colour_targets, data_report, format_report
from minillm.model.sizes import describe_parameters, trained_parameters
from minillm.terminal import use_colour


def dry_run(run, loader, tokenizer, loss, *, prepare=lambda micro_batches, training: micro_batches) -> None:
    """Print the data report, the first batch with its targets coloured, and the memory and time expected.

    The cost is measured: the first update's micro-batches run forward and backward twice, the second time
    counts. Optimizer state (8 bytes per trainable parameter) is added to the memory, as it is not built here.

    Args:
        loss: the stage's, which is called as in its loop, with what the routers of experts need.
        prepare: the stage's, as for ``Run.start``.
    """
    micro_batches = loader.step(0, 0)
    if run.ranks.is_main:
        print(format_report(data_report(loader.rows, tokenizer)))
        how = "coloured" if use_colour() else "in [[ ]]"
        print(f"\nfirst row, targets {how}:\n" + colour_targets(micro_batches[0], tokenizer))
    n_tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in micro_batches)
    module = run.model.train()
    for _ in range(2):
        began = time.perf_counter()
        for batch in prepare(micro_batches, True):
            batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
            with run.autocast():
                loss_sum, _ = loss(module, batch, run.router_stats)
            loss_sum.backward()
        float(loss_sum.detach())  # waits for the device
        seconds = time.perf_counter() - began
        module.zero_grad(set_to_none=True)
    n_parameters = trained_parameters(run.model)
    total_steps = run.args.max_steps or run.args.epochs * loader.steps_per_epoch
    memory = hardware.memory_bytes(run.device) + 8 * n_parameters
    if not run.ranks.is_main:  # the others have helped: some engines and losses need all of them
        return
    print(
        f"\nparameters: {describe_parameters(run.model)}"
        f"\nsteps: {loader.steps_per_epoch:,} per epoch, {total_steps:,} in all"
        f"\nmemory: about {memory / 2**30:.2f} GiB on {run.device} at the peak"
        f"\ntime: about {seconds:.3f} s per step ({n_tokens / seconds:,.0f} tokens/s and rank), "
        f"{total_steps * seconds / 60:.1f} minutes in all, validation and saving not counted"
    )
