"""Gradients of three steps of 16 rows, the last step a single one, in every stage, on this many ranks.

Started by ``test_partition.py`` under torchrun: ``-m tests.contracts.partitions OUT``, where OUT/teacher is a model.
"""

import sys
from pathlib import Path

import torch

from tests.contracts import distill_runs, pair_runs
from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, train

ROWS = 16
SAME_WEIGHTS = {"global_batch_size": ROWS, "learning_rate": 1e-30, "weight_decay": 0.0}  # at every step


def token_stage(**options):
    """Pretraining, fine-tuning, adapters, reasoning: the loss of tokens, perhaps weighted."""

    def run(directory: Path, keep, *, batch_size: int, double: bool, **_) -> None:
        args = arguments(directory, batch_size=batch_size, **SAME_WEIGHTS)
        train(args, double=double, before_update=keep, **options)

    return run


def preference_stage(config=CONFIG, **flags):
    """Preference tuning: the loss counts pairs, or replies against a baseline of the whole step."""

    def run(directory: Path, keep, *, batch_size: int, double: bool, **_) -> None:
        args = pair_runs.arguments(directory, batch_size=batch_size, **SAME_WEIGHTS, **flags)
        pair_runs.train(args, double=double, before_update=lambda run, _: keep(run), n_rows=33, config=config)

    return run


def distill_stage(**flags):
    """Distillation from whole logits, hidden states too, or from a teacher's best tokens on disk."""

    def run(directory: Path, keep, *, batch_size: int, double: bool, teacher: Path) -> None:
        more = flags | ({"teacher_cache": str(directory / "cache")} if "top_k" in flags else {})
        args = distill_runs.arguments(directory, teacher, batch_size=batch_size, **SAME_WEIGHTS, **more)
        distill_runs.train(args, distill_runs.make_tokenizer(), double=double, before_update=keep)

    return run


KINDS = {
    "tokens": token_stage(),
    "experts": token_stage(config=MOE_CONFIG),
    "adapter": token_stage(lora=True),
    "weighted": token_stage(weighted=True),
    "pairs": preference_stage(sft_weight=0.3),
    "pairs_adapter": preference_stage(lora_name="a", lora_rank=3, lora_init="gaussian"),
    "pairs_experts": preference_stage(config=MOE_CONFIG),
    "judged": preference_stage(loss_type="kto"),
    "distilled": distill_stage(alpha=0.4, hidden_weight=0.5),
    "distilled_best": distill_stage(alpha=0.4, top_k=5),
}
IN_FLOAT32 = {"tokens", "pairs", "distilled"}
CASES = [(kind, double) for kind in KINDS for double in (True, False) if double or kind in IN_FLOAT32]
BATCH_SIZES = {1: 1, 2: 2, 4: 2}  # of a micro-batch, by number of ranks: 16, 4 and 2 of them are a step
ON_FOUR_RANKS = ("experts", "pairs", "judged", "distilled_best")  # each way to count, once


def cases(n_ranks: int) -> list[tuple[str, bool]]:
    """Return which (kind, in float64) this many ranks try."""
    return CASES if n_ranks < 4 else [(kind, True) for kind in ON_FOUR_RANKS]


def gradients(kind: str, double: bool, out: Path, *, teacher: Path, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of every step, all at the first weights."""
    kept = []

    def keep(run) -> None:
        named = run.model.named_parameters()
        kept.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})

    KINDS[kind](out / f"{kind}-{double}-{batch_size}", keep, batch_size=batch_size, double=double, teacher=teacher)
    return kept


def main(out: Path) -> None:
    torch.distributed.init_process_group("gloo")  # one group for all: every Run finds it and leaves it alone
    n_ranks = torch.distributed.get_world_size()
    found = {}
    for kind, double in cases(n_ranks):
        directory = out / f"runs{n_ranks}"
        found[kind, double] = gradients(
            kind, double, directory, teacher=out / "teacher", batch_size=BATCH_SIZES[n_ranks]
        )
    if torch.distributed.get_rank() == 0:
        torch.save(found, out / f"ranks{n_ranks}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
