"""Rejection sampling: makes training data of a reasoning model's own correct answers.

    python -m minillm.evaluation.sample_answers --from_weight reason --data_path problems.jsonl --output new.jsonl
    python train_reason.py --from_weight full_sft --data_path new.jsonl

Several answers are sampled for each problem. Those that have the right form and the right answer are kept, without
duplicates, because different ways to an answer teach more than the same way twice (Yuan et al., Scaling Relationship on
Learning Mathematical Reasoning, 2023, section 3.3: rejection sampling fine-tuning; DeepSeek-R1, 2025, section 2.3.3).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillm.cli.command_line import parse, require, script
from minillm.cli.eval_arguments import OpenArguments
from minillm.data.records import read_records
from minillm.data.schema import Record
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import expand_paths
from minillm.errors import UserError
from minillm.evaluation.exact_match import read_task
from minillm.evaluation.reasoning import evaluate_reasoning, final_answer
from minillm.hub.open import open_from_arguments
from minillm.inference import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class SampleArguments(OpenArguments):
    """Sample answers to problems and keep the correct ones as training data."""

    data_path: str
    """Problems: conversations with the right answer under the key final, or in the last turn."""
    columns: str = ""
    """The file's names for our keys, as ours=theirs: prompt=question,completion=answer."""
    output: str
    """The new training file, .jsonl; an existing file is replaced."""
    n_samples: int = 8
    """Sampled answers per problem."""
    keep: int = 4
    """Largest number of answers to keep per problem, the first ones (0: all)."""
    from_weight: str = "reason"
    """The model that answers: a stage name, a model directory or a .pth file."""
    temperature: float = 0.8
    """Divide the logits by this; 0 is greedy, only with --n_samples 1."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens with this total probability (1: all)."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    batch_size: int = 64
    """Answers per batch."""
    seed: int = 42
    """Seed of the sampling: the same seed gives the same file."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a file that cannot be read or written."""
        super().check()
        at_least = {"n_samples": 1, "keep": 0, "num_threads": 0, "max_new_tokens": 1, "batch_size": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        is_greedy = SamplingOptions(temperature=self.temperature, top_p=self.top_p).greedy
        flags = f"--n_samples {self.n_samples} at --temperature {self.temperature}"
        require(self.n_samples == 1 or not is_greedy, f"{flags}: all would be equal; use e.g. --temperature 0.8")
        require(bool(self.from_weight), "--from_weight is empty: name the model that answers")
        files = expand_paths(self.data_path)
        require(bool(files), "--data_path names no file: give at least one")
        for path in files:
            require(path.is_file(), f"--data_path {path}: no such file")
        parse_columns(self.columns)
        output_dir = os.path.dirname(os.path.abspath(self.output))
        is_writable = os.path.isdir(output_dir) and os.access(output_dir, os.W_OK) and not os.path.isdir(self.output)
        is_other_file = os.path.realpath(self.output) not in map(os.path.realpath, files)
        is_usable = is_writable and is_other_file and self.output.endswith(".jsonl")
        advice = "name another .jsonl file than the problems', in a folder with write permission"
        require(is_usable, f"--output {self.output}: cannot be written; {advice}")


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(SampleArguments, argv)
    problems = read_problems(args.data_path, columns=args.columns)  # first, to report errors before loading the weights
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, tokenizer, _ = open_from_arguments(args)
    rows, counts = sample_answers(
        model,
        tokenizer,
        problems,
        n_samples=args.n_samples,
        keep=args.keep,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
        generator=torch.Generator().manual_seed(args.seed),
        report=report_tenths(),
    )
    print("\n".join(f"{name.replace('_', ' '):<20} {value:>9,}" for name, value in counts.items()))
    print(f"{'mean accuracy':<20} {counts['correct'] / counts['answers']:>9.1%}")
    if not rows:
        raise UserError(
            f"none of {counts['answers']} answers to {args.data_path} is right and has the form, so {args.output} is "
            "not written: sample more (--n_samples), or train the model further first"
        )
    write_whole(Path(args.output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_problems(path: str, *, columns: str = "") -> list[Record]:
    """Return the problems of a file, with ``final`` taken from the last turn where the key is missing.

    Raises:
        UserError: a record is not a conversation or has no right answer (the message gives its line); no record is
            usable.
    """
    problems = []
    for number, record in enumerate(read_records(path, columns=columns)):
        try:
            task = read_task(number, record)
            final = final_answer(task.turns[-1]["content"], task.extra)
            problems.append(replace(record, extra=task.extra | {"final": final}))
        except UserError as error:
            raise UserError(f"{path}, line {record.line}: no right answer ({error}); add it as final") from None
    return problems


def sample_answers(
    model, tokenizer, problems: Sequence[Record], *, n_samples: int, keep: int = 0, **settings
) -> tuple[list[dict], dict[str, int]]:
    """Return the records to train on, in the order of the problems, and a few counts.

    A record has the problem's turns with a sampled answer as the last one (``conversations``), its tools and other
    keys, and ``n_samples``, ``n_correct`` and ``n_well_formed``, which tell how hard the problem was.

    Args:
        problems: as from ``read_problems``.
        n_samples: answers per problem.
        keep: largest number of answers to keep per problem, the first ones; 0: all.
        settings: of ``evaluate_reasoning``.

    Raises:
        UserError: as ``evaluate_reasoning``.
    """
    score = evaluate_reasoning(model, tokenizer, problems, n_samples=n_samples, **settings)
    rows, n_solved, n_good, n_distinct = [], 0, 0, 0
    for problem, answer in zip(problems, score.answers, strict=True):
        judged_texts = zip(answer.texts, answer.correct, answer.well_formed, strict=True)
        good_texts = [text.strip() for text, correct, well_formed in judged_texts if correct and well_formed]
        distinct_texts = list(dict.fromkeys(good_texts))
        n_solved += bool(good_texts)
        n_good += len(good_texts)
        n_distinct += len(distinct_texts)
        difficulty = {
            "n_samples": n_samples, "n_correct": sum(answer.correct), "n_well_formed": sum(answer.well_formed),
        }  # fmt: skip
        for text in distinct_texts[: keep or None]:
            turns = [*problem.messages[:-1], {"role": "assistant", "content": text}]
            tools = {"tools": problem.tools} if problem.tools else {}
            rows.append(problem.extra | {"conversations": turns} | tools | difficulty)
    counts = {
        "problems": len(problems),
        "solved": n_solved,
        "answers": len(problems) * n_samples,
        "well_formed": sum(sum(answer.well_formed) for answer in score.answers),
        "correct": sum(sum(answer.correct) for answer in score.answers),
        "duplicates": n_good - n_distinct,
        "kept": len(rows),
    }
    return rows, counts


def report_tenths() -> Callable[[int, int], None]:
    """Return a function of (answers so far, all answers) that prints a line after every tenth of the answers."""
    printed = 0

    def report(n_done: int, n: int) -> None:
        nonlocal printed
        if 10 * n_done // n > printed:
            printed = 10 * n_done // n
            print(f"[{n_done:,} of {n:,} answers]", flush=True)

    return report


def write_whole(path: Path, text: str, *, announce: bool = True) -> None:
    """Write ``text`` atomically: under a temporary name, which is then renamed; with ``announce`` print its path."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    if announce:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
