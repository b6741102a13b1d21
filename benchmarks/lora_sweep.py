"""Varies one setting of LoRA at a time: its effect on the loss, the gradients, the held-out score and the time.

    python benchmarks/lora_sweep.py
    python benchmarks/lora_sweep.py --base out/full_sft_512 --data_path train.jsonl --valid_path valid.jsonl \
        --tests new=test.jsonl

All other settings keep the values of the first flags. Each point is trained with several seeds. The result is one page
with a picture and a table for each setting, and a JSON file. An existing page is continued: its points are not trained
again.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, over_seeds, shown, write_json
from benchmarks.lora_trials import run_trial
from minillm.cli.command_line import parse, require, script
from minillm.hardware import keep_freed_memory

# name: (flag of train_lora.py, values)
SETTINGS: dict[str, tuple[str, tuple]] = {
    "learning rate": ("learning_rate", (2e-6, 2e-5, 2e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2)),
    "rank": ("lora_rank", (4, 8, 16, 32, 64)),
    "alpha": ("lora_alpha", (4, 8, 16, 32, 64)),
    "dropout": ("lora_dropout", (0.0, 0.05, 0.1, 0.3)),
    "target layers": ("target_modules", ("q_proj,v_proj", "attention", "mlp", "all-linear")),
    "epochs": ("epochs", (1, 2, 5, 10, 20)),
    "batch size": ("batch_size", (2, 4, 8, 16)),
    "accumulation": ("accumulation_steps", (1, 2, 4)),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is trained, and what stays as it is."""

    base: str = "out/demo/full_sft_128"
    """The model directory to adapt. The default exists after `make demo`."""
    data_path: str = "dataset/demo/identity_train.jsonl"
    """Conversations to train on."""
    valid_path: str = "dataset/demo/identity_test.jsonl"
    """Held-out conversations, for the loss."""
    tests: str = "new=dataset/demo/identity_test.jsonl,old=dataset/demo/sft_test.jsonl"
    """Files of conversations with one right answer, scored by exact match: NAME=FILE with commas."""
    settings: str = ",".join(SETTINGS)
    """Which settings to vary, with commas."""
    seeds: str = "1,2,3"
    """Seeds of initialisation and order, with commas."""
    learning_rate: float = 2e-3
    """Where the other settings are varied; likewise the next five."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    batch_size: int = 4
    epochs: int = 10
    max_seq_len: int = 128
    """Tokens per row."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""
    output: str = "out/benchmarks/lora_sweep.json"
    """JSON file for the figures; the page goes next to it as .html."""

    def check(self) -> None:
        """Raise UserError for an unknown setting or a missing file."""
        for name in self.settings.split(","):
            require(name in SETTINGS, f"--settings {name}: choose from {', '.join(SETTINGS)}")
        whole = all(seed.strip().isdecimal() for seed in self.seeds.split(","))
        require(whole, f"--seeds {self.seeds}: must be whole numbers with commas, e.g. 1,2,3")
        for name in ("base", "data_path", "valid_path"):
            path = getattr(self, name)
            require(Path(path).exists(), f"--{name} {path}: does not exist; run make demo first, or name your own")
        for name, path in self.test_files.items():
            require(Path(path).is_file(), f"--tests {name}={path}: no such file")
        require(bool(self.output), "--output is empty: name a .json file")

    @property
    def test_files(self) -> dict[str, str]:
        """Return ``--tests`` as name → file."""
        return dict(part.partition("=")[::2] for part in self.tests.split(",") if part)


def sweep(args: Arguments) -> dict:
    """Train every point with every seed; return the trials by setting and value. Written after each point."""
    path = Path(args.output)
    done: dict[str, dict[str, list[dict]]] = {}
    asked = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("settings", "output")}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = {name: before["arguments"].get(name) for name in asked} == asked
        require(same, f"--output {path} holds a sweep with other flags: name another file, or remove it")
        done = before["results"]
    names = ("learning_rate", "lora_rank", "lora_alpha", "batch_size", "epochs", "max_seq_len", "num_threads")
    usual = {name: getattr(args, name) for name in names}
    usual |= {"data_path": args.data_path, "valid_path": args.valid_path, "log_interval": 5}
    cached: dict[tuple, list[dict]] = {}
    for setting in args.settings.split(","):
        flag, values = SETTINGS[setting]
        points = done.setdefault(setting, {})
        for value in values:
            if str(value) in points:
                continue
            flags = usual | {flag: value}
            key = tuple(flags.items())
            if key not in cached:
                cached[key] = [
                    run_trial(args.base, flags | {"seed": int(seed)}, tests=args.test_files)
                    for seed in args.seeds.split(",")
                ]
            big = ("rows", "monitor")
            points[str(value)] = [{k: v for k, v in trial.items() if k not in big} for trial in cached[key]]
            print(f"{setting} {value}: loss {shown(over_seeds(points[str(value)], 'loss'))}", flush=True)
            write_json(args.output, {"arguments": dataclasses.asdict(args), "results": done})
    return done


def table(setting: str, points: dict[str, list[dict]], tests: list[str]) -> list[list[str]]:
    """Return the rows of one setting's table, the head first."""
    rows = [[setting, "validation loss", "gradient norm", *(f"{name}, exact" for name in tests), "seconds"]]
    for value, trials in points.items():
        scores = [shown(over_seeds(trials, name), ".1%") for name in tests]
        loss, norm = shown(over_seeds(trials, "loss")), shown(over_seeds(trials, "grad_norm"), ".3g")
        rows.append([value, loss, norm, *scores, shown(over_seeds(trials, "seconds"), ".1f")])
    return rows


def write_page(results: dict, tests: list[str], path: Path) -> None:
    """Write all tables, and the pictures where matplotlib is installed, as one page that needs no other file."""
    parts = ["<!doctype html><meta charset='utf-8'><title>LoRA, one setting at a time</title>",
             "<style>body{font:15px sans-serif;max-width:64em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
             "img{max-width:100%}</style><h1>LoRA, one setting at a time</h1>"]  # fmt: skip
    for setting, points in results.items():
        head, *rows = table(setting, points, tests)
        cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{cell}</th>" for cell in head)
        parts.append(f"<h2>{setting}</h2>{picture(setting, points, tests)}<table><tr>{heads}</tr>{cells}</table>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {path}")


def picture(setting: str, points: dict[str, list[dict]], tests: list[str]) -> str:
    """Return an ``<img>`` with loss and scores by value, or nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return ""
    import base64
    import io

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4))
    series = [("loss", "validation loss", axes[0]), *((name, f"{name}, exact match", axes[1]) for name in tests)]
    series.append(("grad_norm", "gradient norm", axes[2]))
    for key, label, axis in series:
        spreads = [(value, over_seeds(trials, key)) for value, trials in points.items()]
        spreads = [(value, spread) for value, spread in spreads if spread is not None]
        x = [list(points).index(value) for value, _ in spreads]
        means, deviations = zip(*(spread for _, spread in spreads), strict=True) if spreads else ((), ())
        axis.errorbar(x, means, deviations, marker="o", label=label)
        axis.set_xticks(range(len(points)), list(points), rotation=30)
        axis.set_xlabel(setting)
        axis.legend()
    axes[2].set_yscale("log")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    plt.close(figure)
    return f"<img src='data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}'>"


@script
def main(argv: list[str] | None = None) -> dict:
    """Train, print the tables, write the page; return the figures."""
    args = parse(Arguments, argv)
    keep_freed_memory()
    results = sweep(args)
    tests = list(args.test_files)
    for setting, points in results.items():
        print(f"\n{format_table(table(setting, points, tests))}")
    write_page(results, tests, Path(args.output).with_suffix(".html"))
    return results


if __name__ == "__main__":
    main()
