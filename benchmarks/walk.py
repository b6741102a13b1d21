"""How much code does a reader meet who follows one training step, or a whole run?

    python benchmarks/walk.py
    python benchmarks/walk.py --show_functions    # in the order in which they are first called

A profiler notes every function of the repository that runs in the second update of a tiny run, from the fetch of its
batches to the end of ``run.update`` (no row of metrics, no checkpoint), for pretraining, LoRA and DPO; and every file
of the whole run. Prints files, functions, and the lines of the functions and of their files.
"""

import ast
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any directory

from minillm.cli.command_line import parse, script

ROOT = Path(__file__).resolve().parents[1]

TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a fox."}]
RECORDS = {
    "pretrain": {"text": "the quick fox sees the lazy dog and runs away from it again"},
    "lora": {"conversations": TALK},
    "dpo": {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "no"}]},
}
SHAPE = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--num_key_value_heads", "1"]


class Walk:
    """The functions of the repository that are called while it is ``on``, in the order of their first call."""

    def __init__(self):
        self.on, self.in_step, self.in_run = False, {}, {}

    def see(self, frame, event: str, argument) -> None:
        """Note a call; for ``sys.setprofile``."""
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and "/.venv/" not in file and "/benchmarks/" not in file:
            key = (file, frame.f_code.co_firstlineno, frame.f_code.co_qualname)
            self.in_run.setdefault(key, None)
            if self.on:
                self.in_step.setdefault(key, None)


def walk_through(stage: str, folder: Path) -> Walk:
    """Run three steps of a stage in ``folder`` and return what was called."""
    import importlib

    from minillm.training.run import Run

    walk = Walk()
    data = folder / f"{stage}.jsonl"
    data.write_text("".join(json.dumps(RECORDS[stage]) + "\n" for _ in range(40)))
    flags = [
        "--data_path",
        data,
        "--save_dir",
        folder / "out",
        "--tokenizer_path",
        folder / "tokenizer",
        "--device",
        "cpu",
    ]
    flags += ["--max_steps", 3, "--log_interval", 10, "--save_interval", 0, "--batch_size", 4, "--max_seq_len", 64]
    flags += ["--device", "cpu", "--dtype", "float32", "--num_threads", 1]
    flags += SHAPE if stage == "pretrain" else ["--from_weight", folder / "out" / "pretrain_32"]
    update = Run.update

    def noted_update(run, step):
        update(run, step)
        walk.on = run.step == 1

    Run.update = noted_update
    main = importlib.import_module(f"train_{stage}").main
    sys.setprofile(walk.see)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main([str(flag) for flag in flags])
    finally:
        sys.setprofile(None)
        Run.update = update
    return walk


def lines_of(file: str) -> dict[int, int]:
    """Return, for every function of a file, its length by its first line."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    starts = {min([node.lineno, *(d.lineno for d in node.decorator_list)]): node for node in functions}
    return {start: node.end_lineno - start + 1 for start, node in starts.items()}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """How much code a training step runs through."""

    show_functions: bool = False
    """Print the files and functions of each step too, in the order of their first call."""


@script
def main(argv: list[str] | None = None) -> None:
    """Print the table, and the lists if asked."""
    args = parse(Arguments, argv)
    with tempfile.TemporaryDirectory() as folder:
        from minillm.tokenizer import train_bpe

        folder = Path(folder)
        train_bpe(iter([json.dumps(record) for record in RECORDS.values()] * 9), vocab_size=300).save(
            folder / "tokenizer"
        )
        walks = {stage: walk_through(stage, folder) for stage in RECORDS}
    print(
        f"{'':<10}{'a step: files':>15}{'functions':>11}{'their lines':>13}{'lines of files':>16}{'a run: files':>14}"
    )
    for stage, walk in walks.items():
        files = list(dict.fromkeys(file for file, _, _ in walk.in_step))
        lengths = {file: lines_of(file) for file in files}
        in_functions = sum(lengths[file].get(line, 0) for file, line, _ in walk.in_step)
        in_files = sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files)
        n_run = len({file for file, _, _ in walk.in_run})
        numbers = (len(files), len(walk.in_step), in_functions, in_files, n_run)
        print(f"{stage:<10}" + "".join(f"{number:>20,}" for number in numbers))
    if args.show_functions:
        for stage, walk in walks.items():
            print(f"\n{stage}")
            for file in dict.fromkeys(file for file, _, _ in walk.in_step):
                names = [name.replace(".<locals>", "") for other, _, name in walk.in_step if other == file]
                print(f"  {Path(file).relative_to(ROOT)}: {', '.join(names)}")


if __name__ == "__main__":
    main()
