"""Pretraining: teach a fresh model to predict the next token of plain text.

    python train_pretrain.py --data_path data.jsonl --valid_path valid.jsonl
    torchrun --nproc_per_node 2 train_pretrain.py --data_path data.jsonl --preset base

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse, script
from minillm.data import DataFiles, StepBatches, TextRows
from minillm.hub.weights import create_model, find_tokenizer
from minillm.inference.samples import sample_completions
from minillm.losses import causal_lm_loss
from minillm.reports.dry_run import dry_run
from minillm.tokenizer import load_tokenizer
from minillm.training.optim import adamw
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(PretrainArguments, argv)
    with Run(args, stage="pretrain") as run:
        # Model: new, or from --from_weight
        tokenizer = load_tokenizer(find_tokenizer(args))
        model = create_model(args, tokenizer)

        # Data: tokenised once (rank 0 first), packed into rows of max_seq_len
        def rows(files: DataFiles) -> TextRows:
            return TextRows(
                files,
                tokenizer,
                max_seq_len=args.max_seq_len,
                packing=args.packing,
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
        return run.finish(samples=lambda: sample_completions(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
