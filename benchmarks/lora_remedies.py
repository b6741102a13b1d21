"""Four remedies for a LoRA that "does not learn", each at its own best learning rate.

    python benchmarks/lora_remedies.py
    python benchmarks/lora_remedies.py --base out/full_sft_512 --data_path train.jsonl --valid_path valid.jsonl

The diagnosis: B starts at zero, so A's gradient is small. The remedies: an A that starts smaller (`small`), balanced
gradients (`balanced`), an orthogonal B (`orthogonal`), a larger learning rate for B (`loraplus`). Plain LoRA and each
remedy climb to their own best learning rate with the first seed: from --learning_rate by a factor of two, up or down,
until the validation loss rises again. All seeds are then trained at that rate. Compared are the validation loss, BLEU
and ROUGE-L of greedy answers to held-out questions, and how long B's gradient is compared with A's.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch

from benchmarks.common import format_table, over_seeds, shown, write_json
from benchmarks.lora_init import answer_scores, gradient_norms
from benchmarks.lora_trials import TrialArguments, run_trial
from minillm.cli.command_line import parse, require, script
from minillm.hardware import keep_freed_memory

REMEDIES: dict[str, dict[str, object]] = {  # flags of train_lora.py
    "plain": {},
    "small": {"lora_init": "gaussian", "lora_init_std": 0.01},
    "balanced": {"balance_gradients": True},
    "orthogonal": {"lora_init": "orthogonal"},
    "loraplus": {"loraplus_ratio": 16},
}
MAX_STEPS_OF_RATE = 6  # up or down from where the climb begins


@dataclass(frozen=True, kw_only=True)
class Arguments(TrialArguments):
    """What is trained, how often, and what it is compared on."""

    remedies: str = ",".join(REMEDIES)
    """Which to compare, with commas."""
    learning_rate: float = 4e-3
    """Where the search for the best rate begins."""
    steps: int = 300
    """Optimizer updates of each run."""
    output: str = "out/benchmarks/lora_remedies.json"
    """Where the figures go as JSON."""

    def check(self) -> None:
        """Raise UserError for an unknown remedy, a seed that is not a number, a missing file."""
        for name in self.remedies.split(","):
            require(name in REMEDIES, f"--remedies {name}: choose from {', '.join(REMEDIES)}")
        whole = all(seed.strip().isdecimal() for seed in self.seeds.split(","))
        require(whole, f"--seeds {self.seeds}: must be whole numbers with commas, e.g. 1,2,3")
        self.check_files()
        require(self.learning_rate > 0, f"--learning_rate {self.learning_rate}: must be positive")


def climb(loss_of: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """Return the rate with the lowest loss among ``start`` times powers of two, and the loss of each rate tried.

    It goes on in the direction that helps until the loss rises again, so the best rate has a worse one on either side.

    Args:
        loss_of: the loss at a rate; inf: it diverged.
    """
    losses: dict[int, float] = {}  # by power of two

    def loss_at(power: int) -> float:
        if power not in losses:
            losses[power] = loss_of(start * 2.0**power)
        return losses[power]

    best = 0
    while abs(best) < MAX_STEPS_OF_RATE:
        better = min((best - 1, best, best + 1), key=loss_at)
        if better == best:
            break
        best = better
    return start * 2.0**best, {start * 2.0**power: losses[power] for power in sorted(losses)}


def measure(args: Arguments) -> dict:
    """Tune the rate of every remedy, then train all seeds at it; written after each remedy."""
    seeds = args.seed_numbers
    result: dict = {"arguments": vars(args), "remedies": {}}
    for name in args.remedies.split(","):
        trials: dict[tuple[float, int], dict] = {}

        def train(rate: float, seed: int, name=name, trials=trials) -> dict:
            if (rate, seed) not in trials:
                flags = args.flags | REMEDIES[name] | {"learning_rate": rate, "seed": seed}
                trial = run_trial(args.base, flags, tests={}, evaluate=answer_scores(args))
                trial.pop("rows", None)
                trial["gradients"] = gradient_norms(trial.pop("monitor", []))
                trials[rate, seed] = trial
                print(f"{name}, rate {rate:g}, seed {seed}: loss {trial.get('loss', float('nan')):.4f}", flush=True)
            return trials[rate, seed]

        def loss_of(rate: float, train=train) -> float:
            trial = train(rate, seeds[0])
            return float("inf") if trial["diverged"] else trial["loss"]

        best, losses = climb(loss_of, args.learning_rate)
        runs = [train(best, seed) for seed in seeds]
        result["remedies"][name] = {"learning_rate": best, "tuning": losses, "trials": runs}
        write_json(args.output, result)
    return result


def table(result: dict) -> str:
    """Return the comparison as text."""
    rows = [["remedy", "best rate", "validation loss", "BLEU", "ROUGE-L", "B:A at step 10", "100"]]
    for name, figures in result["remedies"].items():
        trials = figures["trials"]
        scores = [shown(over_seeds(trials, key), ".1f") for key in ("bleu", "rouge_l")]
        ratios = [[trial["gradients"][step]["ratio"] for trial in trials if step in trial.get("gradients", {})]
                  for step in (10, 100)]  # fmt: skip
        cells = [f"{median(each):.3g}" if each else "-" for each in ratios]
        rows.append([name, f"{figures['learning_rate']:g}", shown(over_seeds(trials, "loss")), *scores, *cells])
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> dict:
    """Measure, print the table, write the figures; return them."""
    args = parse(Arguments, argv)
    keep_freed_memory()
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    result = measure(args)
    print("\n" + table(result))
    return result


if __name__ == "__main__":
    main()
