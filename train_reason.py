"""Reasoning distillation: teach a model that answers to think first, on a larger model's written thoughts.

    python train_reason.py --data_path thoughts.jsonl --replay_path chats.jsonl
    python train_reason.py --data_path thoughts.jsonl --from_weight full_sft
    python eval_model.py --model_mode 3

Every record's last answer has the form <think>…</think><answer>…</answer>, and those tags weigh more than other
tokens (DeepSeek-R1, 2025, section 4.1: small models learn more from thoughts of a large one than by finding their own).
Plain answers of a larger model need no stage of their own: learning from them is train_sft.py on a file of them, which
is called black-box distillation (Kim and Rush, Sequence-level knowledge distillation, 2016, section 3.2).

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import ReasonArguments
from minillm.cli.command_line import parse, script
from minillm.data import ChatRows, DataFiles, ReasonRows
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference.samples import sample_answers
from minillm.losses import causal_lm_loss
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(ReasonArguments, argv)
    with Run(args, stage="reason") as run:
        # Model: the one that --from_weight names
        tokenizer = open_tokenizer(args)
        model = create_model(args, tokenizer)

        # Data: conversations with their answers as targets, packed into rows of max_seq_len
        def rows(files: DataFiles) -> ReasonRows:
            return ReasonRows(files, tokenizer, **args.row_settings, tag_weight=args.tag_weight)

        def valid_rows(files: DataFiles) -> ReasonRows:  # all tokens weigh the same: nats per token, as in every stage
            return ReasonRows(files, tokenizer, **args.row_settings, tag_weight=1.0)

        def replay_rows(files: DataFiles) -> ChatRows:
            return ChatRows(files, tokenizer, **args.row_settings)

        loader, valid_loader = run.loaders(rows, valid_rows=valid_rows, replay_rows=replay_rows)

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
