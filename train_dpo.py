"""Preference tuning (DPO and its relatives): teach a model which of two replies people prefer.

    python train_dpo.py --data_path pairs.jsonl --valid_path pairs_valid.jsonl
    python train_dpo.py --data_path pairs.jsonl --lora_name polite            # LoRA-DPO: one model in memory
    python train_dpo.py --data_path judged.jsonl --loss_type kto
    torchrun --nproc_per_node 2 train_dpo.py --data_path pairs.jsonl --from_weight full_sft

Reads top to bottom: arguments, run, model, data, optimizer, the loop, save.
"""

import torch

from minillm.checkpoints.outputs import AdapterAlone
from minillm.cli.arguments import PreferenceArguments
from minillm.cli.command_line import parse, script
from minillm.data import DataFiles, JudgedRows, PairRows
from minillm.evaluation import ValidationMetrics
from minillm.hub.weights import create_model, open_tokenizer
from minillm.inference.samples import sample_answers
from minillm.lora import apply_lora
from minillm.objectives.preference import PreferenceLoss
from minillm.objectives.reference import Reference
from minillm.training.run import Run


@script
def main(argv: list[str] | None = None):
    args = parse(PreferenceArguments, argv)
    with Run(args, stage="rlhf", output=AdapterAlone(args) if args.lora_name else None) as run:
        # Model: the fine-tuned one, and the reference: the model before tuning
        tokenizer = open_tokenizer(args)
        base_dtype = args.choose_base_dtype(run.device, run.dtype) if args.lora_name else torch.float32
        model = create_model(args, tokenizer, dtype=base_dtype)
        reference = Reference(args.reference_kind, model, args, run.engine) if args.reference_kind else None

        # Data: two replies to each prompt, side by side in a row (KTO: single replies)
        def rows(files: DataFiles) -> PairRows | JudgedRows:
            kind = JudgedRows if args.loss_type == "kto" else PairRows
            return kind(files, tokenizer, **args.row_settings)

        loader, valid_loader = run.loaders(rows, add_columns=reference.add_to if reference else None)

        # Optimizer: of the model, or of an adapter alone
        if args.lora_name:
            apply_lora(model, args.lora_config, generator=torch.Generator().manual_seed(args.seed))
        module = run.wrap(model)
        preference_loss = PreferenceLoss(model, reference, args, run.engine)
        if args.dry_run:
            return run.dry_run(loader, tokenizer, preference_loss)
        model = run.start(
            run.adamw(module),
            loader,
            valid_loader,
            tokenizer=tokenizer,
            loss=preference_loss,
            metrics=ValidationMetrics(args, tokenizer, run.engine),
        )

        # The loop: one step = one optimizer update
        for step in run.steps(loader):
            for batch in step:
                with run.autocast():
                    loss_sum, n_targets = preference_loss(model, batch, run.router_stats)
                step.backward(loss_sum, n_targets)
            run.update(step)

        # Save
        return run.finish(samples=lambda: sample_answers(run.model, tokenizer, args.valid_data or args.train_data))


if __name__ == "__main__":
    main()
