"""Preference tuning, distillation and reasoning in the demo world, over several seeds, with tag weights 10 and 1.

    python benchmarks/stages.py
    python benchmarks/stages.py --parts reason --seeds 1,2,3,4,5

Run `make demo` first; its fine-tuned model and data are used. Each seed draws a new order of the rows (and new weights
of a student) and runs the stages with the demo's configurations: DPO from the fine-tuned model; a student with the
teacher's distributions and the same student with only the texts, for the same number of steps; and reasoning from that
seed's DPO model, with two weights of the tags, and the same model trained to answer without thinking. The figures are
those of the demo's table, as mean ± standard deviation.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import torch

import train_distill
import train_dpo
import train_pretrain
import train_reason
import train_sft
from benchmarks.common import call_script, format_table, over_seeds, shown, write_json
from minillm.cli.command_line import parse, require, script
from minillm.data import read_records
from minillm.evaluation import evaluate_reasoning, exact_match, like_chosen, preference_accuracy
from minillm.hardware import keep_freed_memory
from minillm.hub.huggingface import load_model
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import load_tokenizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
PARTS = ("dpo", "distill", "reason")
STUDENT = {"hidden_size": 64, "num_hidden_layers": 5, "max_steps": 400, "learning_rate": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run, and on which data."""

    demo: str = "out/demo"
    """Directory of the demo's runs: pretrain_128 and full_sft_128."""
    data: str = "dataset/demo"
    """Directory of the demo's data."""
    parts: str = "dpo,distill,reason"
    """Comma list of: dpo, distill, reason (which starts from dpo's model, or full_sft where dpo is left out)."""
    seeds: str = "1,2,3"
    """Comma list of seeds."""
    tag_weights: str = "10,1"
    """reason: comma list of weights of the tags."""
    max_steps: int = 0
    """Steps of every training (0: the demo's own)."""
    n_test: int = 0
    """Records of every test file that are used (0: all)."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""
    output: str = "out/benchmarks/stages.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for an unknown part or a missing folder."""
        for part in self.parts.split(","):
            require(part in PARTS, f"--parts {part}: choose from {', '.join(PARTS)}")
        for path in (f"{self.demo}/full_sft_128", f"{self.demo}/pretrain_128", self.data):
            require(Path(path).is_dir(), f"{path} does not exist: run make demo first, or set --demo and --data")
        numbers = all(seed.strip().isdecimal() for seed in self.seeds.split(","))
        require(numbers, f"--seeds {self.seeds}: must be numbers with commas")


class Bench:
    """The runs of one seed, in a temporary directory."""

    def __init__(self, args: Arguments, seed: int, directory: str):
        self.args, self.seed, self.out = args, seed, Path(directory)

    def train(self, main, config: str, data: str, valid: str, **flags) -> Path:
        """Run a stage with the demo's configuration; return its directory."""
        folder = self.out / f"{config}{len(list(self.out.iterdir()))}"
        usual = {
            "config": CONFIGS / f"{config}.yaml", "save_dir": folder, "tokenizer_path": f"{self.args.demo}/tokenizer",
            "data_path": f"{self.args.data}/{data}.jsonl", "valid_path": valid and f"{self.args.data}/{valid}.jsonl",
            "seed": self.seed, "save_interval": 0, "save_minutes": 0, "num_threads": self.args.num_threads,
            "cache_dir": self.out.parent / "minillm_stages_cache",
        }  # fmt: skip
        call_script(main, usual | flags | ({"max_steps": self.args.max_steps} if self.args.max_steps else {}))
        return next(path.parent for path in folder.glob("*/config.json"))

    def records(self, name: str) -> list:
        """Return the records of a test file."""
        return list(read_records(f"{self.args.data}/{name}.jsonl"))[: self.args.n_test or None]

    def tasks(self, path: str | Path) -> float:
        """Return the mean of the tasks' exact match."""
        model, tokenizer = load_model(path).eval(), load_tokenizer(path)
        return exact_match(model, tokenizer, self.records("sft_test"), max_new_tokens=48).task_average

    def preference(self, path: str | Path) -> dict[str, float]:
        """Return how often the chosen reply is more probable, how often free answers are like it, and the tasks."""
        model, tokenizer, pairs = load_model(path).eval(), load_tokenizer(path), self.records("dpo_test")
        answers = like_chosen(model, tokenizer, pairs, max_new_tokens=48)
        accuracy = {"pairs": preference_accuracy(model, tokenizer, pairs).accuracy}
        return accuracy | {"free": sum(each.like_chosen for each in answers) / len(answers), "tasks": self.tasks(path)}

    def reasoning(self, path: str | Path) -> dict[str, float]:
        """Return exact match and adherence to the form of the model's first answers."""
        model, tokenizer = load_model(path).eval(), load_tokenizer(path)
        problems = self.records("reason_test")
        score = evaluate_reasoning(model, tokenizer, problems, max_new_tokens=96, batch_size=64)
        return {"exact": score.accuracy, "format": score.format_adherence}

    def gap(self, path: Path) -> dict[str, float]:
        """Return how far the validation loss stays above the entropy of the texts."""
        last = [row for row in read_metrics(path / "metrics.jsonl") if "floor" in row][-1]
        return {"gap": last["loss"] - last["floor"]}


def run_seed(args: Arguments, seed: int, directory: str) -> dict[str, dict[str, float]]:
    """Return the figures of one seed by what was trained."""
    bench, figures, parts = Bench(args, seed, directory), {}, args.parts.split(",")
    base = Path(args.demo) / "full_sft_128"
    if "dpo" in parts:
        figures["before DPO"] = bench.preference(base)
        base = bench.train(train_dpo.main, "dpo", "dpo_train", "", from_weight=base)
        figures["DPO"] = bench.preference(base)
    if "distill" in parts:
        texts = ("pretrain_train", "pretrain_valid")
        figures["student, hard labels"] = bench.gap(bench.train(train_pretrain.main, "pretrain", *texts, **STUDENT))
        teacher = f"{args.demo}/pretrain_128"
        figures["student, teacher"] = bench.gap(bench.train(train_distill.main, "distill", *texts, teacher=teacher))
    if "reason" in parts:
        direct = bench.train(train_sft.main, "sft", "direct_train", "", from_weight=base, epochs=1)
        figures["answering at once"] = bench.reasoning(direct)
        for weight in args.tag_weights.split(","):
            replay = {"replay_path": f"{args.data}/sft_train.jsonl", "tag_weight": float(weight)}
            path = bench.train(train_reason.main, "reason", "reason_train", "", from_weight=base, **replay)
            figures[f"reasoning, tag weight {weight}"] = bench.reasoning(path) | {"tasks": bench.tasks(path)}
    return figures


def table(results: list[dict]) -> str:
    """Return the figures over all seeds as text."""
    names = ("pairs", "free", "tasks", "gap", "exact", "format")
    rows = [["trained", "chosen more probable", "answers like chosen", "tasks", "above the floor", "exact", "format"]]
    for what in results[0]:
        trials = [result[what] for result in results]
        scale = {name: [{name: 100 * trial[name] if name != "gap" else trial[name]} for trial in trials]
                 for name in names if name in trials[0]}  # fmt: skip
        cells = [shown(over_seeds(scale[name], name), ".4f" if name == "gap" else ".1f") if name in scale else "-"
                 for name in names]  # fmt: skip
        rows.append([what, *cells])
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> list[dict]:
    """Run all seeds, print the table, write the figures; return them by seed."""
    args = parse(Arguments, argv)
    keep_freed_memory()
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    results = []
    for seed in map(int, args.seeds.split(",")):
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode(False):
            results.append(run_seed(args, seed, directory))
        print(f"seed {seed}: {results[-1]}", flush=True)
        write_json(args.output, {"arguments": vars(args), "results": results})
    print("\n" + table(results))
    return results


if __name__ == "__main__":
    main()
