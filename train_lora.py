"""LoRA: teach a model something new with a few percent of new parameters, on conversations.

    python train_lora.py --lora_name cooking --data_path cooking.jsonl
    torchrun --nproc_per_node 2 train_lora.py --lora_name cooking --data_path cooking.jsonl --from_weight full_sft
    python eval_model.py --lora_name cooking

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

import torch

from minillm.checkpoints.outputs import AdapterAlone
from minillm.cli.arguments import LoRAArguments
from minillm.cli.command_line import parse, script
from minillm.data import ChatRows, DataFiles
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference.samples import sample_answers
from minillm.lora import apply_lora
from minillm.lora.more.balance import balance_gradients
from minillm.losses import causal_lm_loss
from minillm.reports.watch import Watch
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(LoRAArguments, argv)
    with Run(args, stage="lora", output=AdapterAlone(args)) as run:
        # Model: what --from_weight names, frozen, with an adapter
        tokenizer = open_tokenizer(args)
        base_dtype = args.choose_base_dtype(run.device, run.dtype)
        model = create_model(args, tokenizer, dtype=base_dtype)
        apply_lora(model, args.lora_config, generator=torch.Generator().manual_seed(args.seed))

        # Data: conversations with their answers as targets, packed into rows of max_seq_len
        def rows(files: DataFiles | list[str]) -> ChatRows:
            return ChatRows(files, tokenizer, **args.row_settings)

        loader, valid_loader = run.loaders(rows, replay_rows=rows)

        # Optimizer: of the adapter alone
        module = run.wrap(model)
        if args.dry_run:
            return run.dry_run(loader, tokenizer, causal_lm_loss)
        watch = None
        if interval := args.monitor_interval or (5 if args.monitor else 0):
            replays = bool(args.replay_path)
            watch = Watch(
                model, run.directory, tokenizer, loader.rows, interval=interval, replays=replays, engine=run.engine
            )
        model = run.start(
            run.adamw(module),
            loader,
            valid_loader,
            tokenizer=tokenizer,
            loss=causal_lm_loss,
            watch=watch,
            metrics=ValidationMetrics(args, tokenizer, run.engine),
        )

        # The loop: one step = one optimizer update
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = causal_lm_loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            if args.balance_gradients:
                balance_gradients(run.model, run.engine)
            run.update(step)

        # Save
        return run.finish(samples=lambda: sample_answers(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
