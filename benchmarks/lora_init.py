"""Does B = 0 prevent A from learning, and does an orthogonal initialisation help?

    python benchmarks/lora_init.py
    python benchmarks/lora_init.py --base out/full_sft_512 --data_path train.jsonl --valid_path valid.jsonl

A frequent claim: LoRA's B starts at zero, so A gets no gradient ("200 times less than B"), learning stalls, and an
orthogonal B with a small gain helps, with much better BLEU and ROUGE. Measured here: the norms of both gradients at
steps 1, 10, 100 and 1,000, and the quality of the adapters at the end, by validation loss, BLEU and ROUGE-L of greedy
answers to held-out questions. Each initialisation has its best learning rate, found with one seed and the same number
of steps; the figures are those of all seeds at that rate. `kaiming` is LoRA's own initialisation, with B = 0.
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch

from benchmarks.common import format_table, over_seeds, shown, write_json
from benchmarks.lora_trials import TrialArguments, run_trial
from minillm.cli.command_line import parse, require, script
from minillm.data import read_records
from minillm.evaluation import bleu, exact_match, rouge
from minillm.hardware import keep_freed_memory
from minillm.lora.more.init import Init

STEPS_SHOWN = (1, 10, 100, 1000)


@dataclass(frozen=True, kw_only=True)
class Arguments(TrialArguments):
    """What is trained, how often, and what it is compared on."""

    inits: str = "kaiming,orthogonal,pissa"
    """Initialisations to compare, with commas."""
    learning_rates: str = "5e-4,2e-3,5e-3,1e-2"
    """Rates to choose from, with commas."""
    output: str = "out/benchmarks/lora_init.json"
    """Where the figures go as JSON."""

    def check(self) -> None:
        """Raise UserError for an unknown initialisation, a rate or seed that is not a number, a missing file."""
        for name in self.inits.split(","):
            require(name in get_args(Init), f"--inits {name}: choose from {', '.join(get_args(Init))}")
        self.check_files()
        try:
            positive = all(rate > 0 for rate in self.rates) and len(self.seed_numbers) > 0
        except ValueError:
            positive = False
        message = "must be numbers with commas"
        require(positive, f"--learning_rates {self.learning_rates} or --seeds {self.seeds}: {message}")

    @property
    def rates(self) -> list[float]:
        """Return the learning rates."""
        return [float(rate) for rate in self.learning_rates.split(",")]


def answer_scores(args: Arguments):
    """Return a function (model, tokenizer) → BLEU and ROUGE-L, in percent, of greedy answers to held-out questions."""
    records = list(islice(read_records(args.valid_path), args.n_answers))

    def scores(model, tokenizer) -> dict[str, float]:
        results = exact_match(model, tokenizer, records, max_new_tokens=args.max_new_tokens, batch_size=32).answers
        answers, expected = [each.answer for each in results], [each.expected for each in results]
        return {"bleu": bleu(answers, expected).bleu, "rouge_l": 100 * rouge(answers, expected).rouge_l}

    return scores


def gradient_norms(rows: list[dict]) -> dict[int, dict[str, float]]:
    """Return, for the steps shown, the medians over layers of ‖∇A‖, ‖∇B‖ and their ratio B:A (inf: A got nothing)."""
    norms_of_step = {}
    for row in rows:
        if row["step"] in STEPS_SHOWN:
            a = [layer["grad_norm_A"] for layer in row["layers"].values()]
            b = [layer["grad_norm_B"] for layer in row["layers"].values()]
            ratios = [there / here if here else float("inf") for here, there in zip(a, b, strict=True)]
            norms_of_step[row["step"]] = {"A": median(a), "B": median(b), "ratio": median(ratios)}
    return norms_of_step


def measure(args: Arguments) -> dict:
    """Tune the rate of every initialisation, then train all seeds at it; written after each run."""
    result: dict = {"arguments": vars(args), "tuning": {}, "runs": {}}
    for init in args.inits.split(","):
        trials = {}
        for rate in args.rates:
            flags = args.flags | {"lora_init": init, "learning_rate": rate, "seed": args.seed_numbers[0]}
            trials[rate] = run_trial(args.base, flags, tests={}, evaluate=answer_scores(args))
            print(f"{init}, rate {rate:g}: loss {trials[rate].get('loss', float('nan')):.4f}", flush=True)
        losses = {rate: float("inf") if trial["diverged"] else trial["loss"] for rate, trial in trials.items()}
        result["tuning"][init] = losses
        best = min(losses, key=losses.get)
        runs = [trials[best]]
        for seed in args.seed_numbers[1:]:
            flags = args.flags | {"lora_init": init, "learning_rate": best, "seed": seed}
            runs.append(run_trial(args.base, flags, tests={}, evaluate=answer_scores(args)))
        norms = [gradient_norms(run.pop("monitor", [])) for run in runs]
        for run in runs:
            run.pop("rows", None)
        result["runs"][init] = {"learning_rate": best, "trials": runs, "gradients": norms}
        write_json(args.output, result)
    return result


def tables(result: dict) -> str:
    """Return both tables as text."""
    worth = [["init", "best rate", "validation loss", "BLEU", "ROUGE-L"]]
    norms = [["init", *(f"step {step}: A, B, B:A" for step in STEPS_SHOWN)]]
    for init, figures in result["runs"].items():
        trials = figures["trials"]
        scores = [shown(over_seeds(trials, key), ".1f") for key in ("bleu", "rouge_l")]
        worth.append([init, f"{figures['learning_rate']:g}", shown(over_seeds(trials, "loss")), *scores])
        cells = []
        for step in STEPS_SHOWN:
            at = [norm[step] for norm in figures["gradients"] if step in norm]
            middle = {key: median(each[key] for each in at) for key in ("A", "B", "ratio")} if at else None
            cells.append("-" if middle is None else f"{middle['A']:.1e}, {middle['B']:.1e}, {middle['ratio']:.3g}")
        norms.append([init, *cells])
    return format_table(worth) + "\n\ngradient norms, medians over layers and seeds\n" + format_table(norms)


@script
def main(argv: list[str] | None = None) -> dict:
    """Measure, print the tables, write the figures; return them."""
    args = parse(Arguments, argv)
    keep_freed_memory()
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    result = measure(args)
    print("\n" + tables(result))
    return result


if __name__ == "__main__":
    main()
