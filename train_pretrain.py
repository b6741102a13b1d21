"""Pretraining: teach a fresh model to predict the next token of plain text.

    python train_pretrain.py --data_path data.jsonl --valid_path valid.jsonl
    torchrun --nproc_per_node 2 train_pretrain.py --data_path data.jsonl --preset base

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse, script
from minillm.data import DataFiles, TextRows
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference.samples import sample_completions
from minillm.losses import causal_lm_loss
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(PretrainArguments, argv)
    with Run(args, stage="pretrain") as run:
        # Model: new, or from --from_weight
        tokenizer = open_tokenizer(args)
        model = create_model(args, tokenizer)

        # Data: tokenised once, packed into rows of max_seq_len; called for the training and the validation files
        def rows(files: DataFiles) -> TextRows:
            return TextRows(files, tokenizer, **args.row_settings)

        loader, valid_loader = run.loaders(rows)

        # Optimizer, and what a checkpoint restores. From here on ``model`` is wrapped for the ranks (DDP, ...)
        module = run.wrap(model)
        if args.dry_run:
            return run.dry_run(loader, tokenizer, causal_lm_loss)
        model = run.start(
            run.adamw(module),
            loader,
            valid_loader,
            tokenizer=tokenizer,
            loss=causal_lm_loss,
            from_scratch=not args.from_weight,
            metrics=ValidationMetrics(args, tokenizer, run.engine),
        )

        # The loop: one step = one optimizer update
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = causal_lm_loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            run.update(step)

        # Save
        return run.finish(samples=lambda: sample_completions(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
