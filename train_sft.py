"""Supervised fine-tuning: teach a pretrained model to answer, on conversations.

    python train_sft.py --data_path chats.jsonl --valid_path chats_valid.jsonl
    torchrun --nproc_per_node 2 train_sft.py --data_path chats.jsonl --from_weight pretrain

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import SFTArguments
from minillm.cli.command_line import parse, script
from minillm.data import ChatRows, DataFiles, StepBatches
from minillm.hub.weights import create_model, find_tokenizer
from minillm.inference.samples import sample_answers
from minillm.losses import causal_lm_loss
from minillm.reports.dry_run import dry_run
from minillm.tokenizer import load_tokenizer
from minillm.training.optim import adamw
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(SFTArguments, argv)
    with Run(args, stage="full_sft") as run:
        # Model: the pretrained one, or what --from_weight names
        tokenizer = load_tokenizer(find_tokenizer(args))
        model = create_model(args, tokenizer)

        # Data: conversations with their answers as targets, packed into rows of max_seq_len
        def rows(files: DataFiles) -> ChatRows:
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
        loader = StepBatches(train_rows, **run.batching())
        valid_loader = None
        if args.valid_data:
            valid_rows = run.ranks.main_first(lambda: rows(args.valid_data))
            valid_loader = StepBatches(valid_rows, **run.batching(), shuffle=False)

        # Optimizer
        module = run.wrap(model)
        if args.dry_run:
            return dry_run(run, loader, tokenizer, causal_lm_loss)
        optimizer = adamw(
            module,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
        )
        model = run.start(
            optimizer,
            loader,
            valid_loader=valid_loader,
            tokenizer=tokenizer,
            loss=causal_lm_loss,
            from_scratch=not args.from_weight,
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
