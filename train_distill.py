"""White-box distillation: a student learns a teacher's whole distribution over the next token.

    python train_distill.py --teacher out/full_sft_768 --data_path chats.jsonl --hidden_size 512
    python train_distill.py --teacher out/full_sft_768 --data_path chats.jsonl --top_k 64      # teacher's best on disk
    python train_distill.py --teacher out/full_sft_768 --data_path chats.jsonl --on_policy 0.5   # GKD
    torchrun --nproc_per_node 2 train_distill.py --teacher out/full_sft_768 --data_path chats.jsonl

Texts ({"text"}) and conversations are both learnt from. Without the teacher's weights, or with another tokenizer, let
it write answers and train on them with train_sft.py: black-box distillation.
Reads top to bottom: arguments, run, models, data, optimizer, the loop, save.
"""

from minillm.cli.arguments import DistillArguments
from minillm.cli.command_line import parse, script
from minillm.data import ChatRows, DataFiles, TextRows
from minillm.data.report import open_rows
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference import generate
from minillm.inference.samples import sample_answers, sample_completions
from minillm.objectives.distill import DistillLoss, StudentAlone, add_projection
from minillm.objectives.on_policy import OnPolicy
from minillm.objectives.teacher import Teacher, find_teacher
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(DistillArguments, argv)
    with Run(args, stage="distill", output=StudentAlone()) as run:
        # Models: the student, and the teacher, which is frozen
        tokenizer = open_tokenizer(args, teacher=find_teacher(args))
        teacher = Teacher(args, run.engine, tokenizer)
        model = create_model(args, tokenizer)
        if args.hidden_weight:
            add_projection(model, teacher.model.config.hidden_size, seed=args.seed)

        # Data: texts or conversations, packed into rows of max_seq_len
        def rows(files: DataFiles) -> TextRows | ChatRows:
            return open_rows(files, tokenizer, **args.row_settings)

        def add_teacher(rows: TextRows | ChatRows, *, training: bool):  # its best tokens, kept on disk
            return teacher.add_to(rows, vocab_size=model.config.vocab_size) if training and args.top_k else rows

        loader, valid_loader = run.loaders(rows, add_columns=add_teacher)
        if args.top_k:
            teacher.model = None  # its best tokens are on disk

        # Optimizer: of the student
        module = run.wrap(model)
        on_policy = OnPolicy(model, tokenizer, args, run.engine, generate) if args.on_policy else None
        distill_loss = DistillLoss(model, teacher, args, on_policy=on_policy)
        if args.dry_run:
            return run.dry_run(loader, tokenizer, distill_loss)
        model = run.start(
            run.adamw(module),
            loader,
            valid_loader,
            tokenizer=tokenizer,
            loss=distill_loss,
            metrics=ValidationMetrics(args, tokenizer, run.engine),
        )

        # The loop: one step = one optimizer update
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = distill_loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            run.update(step)

        # Save
        sample = sample_answers if loader.rows.store.has_mask else sample_completions
        return run.finish(samples=lambda: sample(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
