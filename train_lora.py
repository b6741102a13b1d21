"""LoRA: teach a model something new with a few percent of new parameters, on conversations.

    python train_lora.py --lora_name cooking --data_path cooking.jsonl
    torchrun --nproc_per_node 2 train_lora.py --lora_name cooking --data_path cooking.jsonl --from_weight full_sft
    python eval_model.py --lora_name cooking

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

import torch

from minillm.checkpoints.outputs import AdapterAlone
from minillm.cli.command_line import parse, script
from minillm.cli.lora_arguments import LoRAArguments
from minillm.data import ChatRows, DataFiles, ReplayRows, StepBatches
from minillm.hub.weights import create_model, find_tokenizer
from minillm.inference.samples import sample_answers
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.reports.dry_run import dry_run
from minillm.reports.watch import Watch
from minillm.tokenizer import load_tokenizer
from minillm.training.optim import adamw
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(LoRAArguments, argv)
    with Run(args, stage="lora", output=AdapterAlone(args)) as run:
        # Model: what --from_weight names, frozen, with an adapter
        tokenizer = load_tokenizer(find_tokenizer(args))
        base_dtype = args.choose_base_dtype(run.device, run.dtype)
        model = create_model(args, tokenizer, dtype=base_dtype)
        apply_lora(model, args.lora_config, generator=torch.Generator().manual_seed(args.seed))

        # Data: conversations with their answers as targets, packed into rows of max_seq_len
        def rows(files: DataFiles | list[str]) -> ChatRows:
            return ChatRows(
                files,
                tokenizer,
                max_seq_len=args.max_seq_len,
                packing=args.packing,
                train_on=args.train_on,
                seed=args.seed,
                cache_dir=args.token_cache,
                strict=args.strict,
            )

        train_rows = run.ranks.main_first(lambda: rows(args.train_data))
        if args.replay_path:
            old_rows = run.ranks.main_first(lambda: rows(args.replay_data))
            train_rows = ReplayRows(train_rows, old_rows, share=args.replay_ratio)
        loader = StepBatches(train_rows, **run.batching())
        valid_loader = None
        if args.valid_data:
            valid_rows = run.ranks.main_first(lambda: rows(args.valid_data))
            valid_loader = StepBatches(valid_rows, **run.batching(), shuffle=False)

        # Optimizer: of the adapter alone
        module = run.wrap(model)
        if args.dry_run:
            return dry_run(run, loader, tokenizer, causal_lm_loss)
        optimizer = adamw(
            module,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            loraplus_ratio=args.loraplus_ratio,
        )
        looks_every = args.monitor_interval or (5 if args.monitor else 0)
        watch = Watch(run, tokenizer, train_rows, interval=looks_every) if looks_every else None
        model = run.start(
            optimizer,
            loader,
            valid_loader=valid_loader,
            tokenizer=tokenizer,
            loss=causal_lm_loss,
            watch=watch,
        )

        # The loop: one step = one optimizer update
        for micro_batches in run.steps(loader):
            for batch in micro_batches:
                with run.autocast():
                    loss_sum, n_targets = causal_lm_loss(model, batch, run.router_stats)
                run.backward(loss_sum)
            run.update()

        # Save
        return run.finish(samples=lambda: sample_answers(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
