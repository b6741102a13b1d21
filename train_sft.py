"""Supervised fine-tuning: teach a pretrained model to answer, on conversations.

    python train_sft.py --data_path chats.jsonl --valid_path chats_valid.jsonl
    torchrun --nproc_per_node 2 train_sft.py --data_path chats.jsonl --from_weight pretrain

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import SFTArguments
from minillm.cli.command_line import parse, script
from minillm.data import ChatRows, DataFiles
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference.samples import sample_answers
from minillm.losses import causal_lm_loss
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(SFTArguments, argv)
    with Run(args, stage="full_sft") as run:
        # Model: the pretrained one, or what --from_weight names
        tokenizer = open_tokenizer(args)
        model = create_model(args, tokenizer)

        # Data: conversations with their answers as targets, packed into rows of max_seq_len
        def rows(files: DataFiles) -> ChatRows:
            return ChatRows(files, tokenizer, **args.row_settings)

        loader, valid_loader = run.loaders(rows)

        # Optimizer
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
        return run.finish(samples=lambda: sample_answers(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
