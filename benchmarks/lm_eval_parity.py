"""Measures suites with minillm and with lm-evaluation-harness: are log-likelihoods and choices the same?

    python benchmarks/lm_eval_parity.py --model_path out/demo/full_sft_128 --suite_dir dataset/eval

Three ways to the same numbers: ``run_suite``, the harness with our model (``minillm``), and the harness with its own
HF model on the same directory, in transformers. The harness reads the prompts from the YAML files of configs/lm_eval.
It prints the largest differences and exits with 1 if one exceeds the bound or a choice differs.
"""

import logging
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import write_json
from minillm.cli.command_line import parse, require, script
from minillm.evaluation.harness import register, write_tasks
from minillm.evaluation.suites import SUITES, choose_suites, run_suite
from minillm.hub.open import open_model

BOUND = 1e-4  # nats, of an answer's log-likelihood in float32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is compared."""

    model_path: str = "out/demo/full_sft_128"
    """A run directory. The default exists after `make demo`."""
    suite_dir: str = "dataset/eval"
    """Directory with the files of the suites."""
    suite: str = "mmlu,arc_easy,winogrande,cmmlu"
    """Names of suites with choices, with commas between them."""
    suite_limit: int = 200
    """Questions of each suite, evenly spaced (0: all)."""
    n_shot: int = 0
    """Answered examples before each question; only for suites with one subject."""
    batch_size: int = 16
    """Questions per forward pass."""
    output: str = "out/benchmarks/lm_eval_parity.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        require(Path(self.model_path).is_dir(), f"--model_path {self.model_path}: does not exist; run make demo first")
        require(self.suite_limit >= 0, f"--suite_limit {self.suite_limit}: must be at least 0")
        for suite in choose_suites(self.suite):
            require(suite.style != "number", f"--suite {suite.name}: has no choices to compare")


def compare(args: Arguments) -> dict[str, dict]:
    """Return for each suite and each of the harness's models the differences from ``run_suite``."""
    register()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = open_model(args.model_path, device="cpu")
    limit, names = args.suite_limit, [suite.name for suite in choose_suites(args.suite)]
    models = {
        "minillm": ("minillm", {"path": args.model_path, "device": "cpu"}),
        # A document begins with a bos here; the harness adds one only if it is told to.
        "hf": ("hf", {"pretrained": args.model_path, "dtype": "float32", "device": "cpu", "add_bos_token": True}),
    }
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks([SUITES[name] for name in names], data_dir=args.suite_dir, output=folder, limit=limit)
        manager = TaskManager(include_path=folder, include_defaults=False)
        options = {"num_fewshot": args.n_shot, "batch_size": args.batch_size, "bootstrap_iters": 0}
        harness = {
            label: simple_evaluate(kind, model_args, tasks, task_manager=manager, **options)["samples"]
            for label, (kind, model_args) in models.items()
        }
        for name, task in zip(names, tasks, strict=True):
            options = {"n_shot": args.n_shot, "limit": limit, "batch_size": args.batch_size}
            score = run_suite(name, model, tokenizer, data_dir=args.suite_dir, **options)
            results[name] = {"n": len(score.questions), "accuracy": score.accuracy}
            results[name] |= {label: _differences(score, samples[task]) for label, samples in harness.items()}
    return results


def _differences(score, samples: list[dict]) -> dict:
    """Return the largest difference of a log-likelihood, and how many choices differ: plain, and per byte."""
    theirs = {sample["doc"]["id"]: [answer[0] for answer in sample["filtered_resps"]] for sample in samples}
    assert theirs.keys() == {question.id for question in score.questions}
    largest, n_other, n_other_per_byte = 0.0, 0, 0
    for question in score.questions:
        values = theirs[question.id]
        pairs = zip(values, question.log_likelihoods, strict=True)
        largest = max(largest, *(abs(value - ours) for value, ours in pairs))
        n_other += values.index(max(values)) != question.choice
        per_byte = [value / n for value, n in zip(values, question.n_bytes, strict=True)]
        n_other_per_byte += per_byte.index(max(per_byte)) != question.choice_per_byte
    return {"largest_difference": largest, "other_choices": n_other, "other_choices_per_byte": n_other_per_byte}


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    results = compare(args)
    print("differences from run_suite, in nats, and the number of other choices")
    print(
        f"{'suite':<16} {'questions':>9} {'accuracy':>9} {'model':>9} {'largest difference':>19} {'other choices':>14}"
    )
    broken = False
    for name, result in results.items():
        for label in ("minillm", "hf"):
            values = result[label]
            broken |= values["largest_difference"] > BOUND or values["other_choices"] > 0
            line = f"{name:<16} {result['n']:>9,} {result['accuracy']:>9.1%} {label:>9}"
            print(f"{line} {values['largest_difference']:>19.2e} {values['other_choices']:>9}")
    if args.output:
        write_json(args.output, {"arguments": asdict(args), "suites": results})
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
