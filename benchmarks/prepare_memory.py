"""Is the memory of ``python -m minillm.data.prepare`` bounded? Texts of several sizes, each in a child process.

Most of the texts are new; one in twenty is an exact copy of an earlier one and one in twenty a copy with a few other
words, so that duplicates of both kinds are found. The peak of a size is the largest resident memory of the process that
prepares it. From the two largest sizes the bytes per record follow, and the peak at 10 GB:

    peak(n records) = fixed + n · bytes per record
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import format_table, write_json
from minillm.cli.command_line import parse, script
from minillm.errors import UserError

ROOT = Path(__file__).parents[1]
N_WORDS = 50_000  # of the vocabulary that texts are drawn from
# Runs the program and then prints the peak of its resident memory, in KiB. (ru_maxrss would count its parent too.)
CHILD = """
import sys
from minillm.data.prepare.__main__ import main
main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the memory of data preparation."""

    sizes: str = "100,400"
    """MB of synthetic text, at least two sizes."""
    document_len: int = 1000
    """Mean length of a text in characters; shorter texts make more records, and memory grows with these."""
    near_duplicates: bool = True
    """Also look for near duplicates."""
    extrapolate_gb: float = 10
    """GB of text to extrapolate to."""
    work_dir: str = ""
    """Directory for the texts and outputs (default: the system's temporary directory)."""
    output: str = "out/benchmarks/prepare_memory.json"
    """File for the figures; empty writes none."""


def write_texts(path: Path, n_bytes: int, document_len: int) -> int:
    """Write about so many bytes of records, half of them Chinese; return their number."""
    rng, n_written, n_records, recent = random.Random(n_bytes), 0, 0, []
    english = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 10))) for _ in range(N_WORDS)]
    chinese = ["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(rng.randrange(1, 4))) for _ in range(N_WORDS)]
    with path.open("w", encoding="utf-8") as file:
        while n_written < n_bytes:
            luck = rng.random()
            if luck < 0.1 and recent:
                words, space = rng.choice(recent)
                words = list(words)
                if luck < 0.05:
                    words[rng.randrange(len(words))] = "另外" if not space else "other"
            else:
                words, space = rng.choice([(english, " "), (chinese, "")])
                n_words = round(rng.uniform(0.5, 1.5) * document_len / (6.5 if space else 2))
                words = rng.choices(words, k=max(1, n_words))
                recent = [*recent[-99:], (words, space)]
            line = json.dumps({"text": space.join(words)}, ensure_ascii=False) + "\n"
            file.write(line)
            n_written += len(line.encode())
            n_records += 1
    return n_records


def measure(size_mb: float, args: Arguments, directory: Path) -> dict:
    """Return bytes, records, kept records and peak memory of the preparation of one size."""
    path, output = directory / "texts.jsonl", directory / "prepared.jsonl"
    n_records = write_texts(path, round(size_mb * 1e6), args.document_len)
    flags = ["--data_path", str(path), "--output", str(output), "--overwrite", "--shuffle", "--valid_ratio", "0.01"]
    flags += ["--near_duplicates", "drop" if args.near_duplicates else "keep"]
    command = [sys.executable, "-c", CHILD, *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the preparation failed: {done.stderr[-800:]}")
    report = json.loads(output.with_name("prepared.report.json").read_text(encoding="utf-8"))
    return {
        "bytes": path.stat().st_size,
        "records": n_records,
        "dropped": report["dropped"],
        "peak_bytes": int(done.stdout.split()[-1]) * 1024,
    }


@script
def main(argv: list[str] | None = None) -> dict:
    """Measure all sizes, print the table and the extrapolation; return the figures."""
    args = parse(Arguments, argv)
    sizes = sorted({float(size) for size in args.sizes.split(",")})
    if len(sizes) < 2 or sizes[0] <= 0:
        raise UserError(f"--sizes {args.sizes}: give at least two sizes above 0, such as 100,400")
    with tempfile.TemporaryDirectory(dir=args.work_dir or None) as directory:
        cases = [measure(size, args, Path(directory)) for size in sizes]
    table = [["text, MB", "records", "exact duplicates", "near duplicates", "peak, MB"]]
    for case in cases:
        dropped = [f"{case['dropped'].get(rule, 0):,}" for rule in ("exact_duplicate", "near_duplicate")]
        size, peak = f"{case['bytes'] / 1e6:.0f}", f"{case['peak_bytes'] / 1e6:.0f}"
        table.append([size, f"{case['records']:,}", *dropped, peak])
    print(format_table(table))
    small, large = cases[-2:]
    per_record = (large["peak_bytes"] - small["peak_bytes"]) / (large["records"] - small["records"])
    n_records = args.extrapolate_gb * 1e9 * large["records"] / large["bytes"]
    expected = large["peak_bytes"] + per_record * (n_records - large["records"])
    print(
        f"{per_record:.0f} bytes per record more; {args.extrapolate_gb:g} GB would be {n_records:,.0f} records and "
        f"take {expected / 1e9:.1f} GB"
    )
    figures = {"arguments": vars(args), "cases": cases, "bytes_per_record": per_record, "expected_bytes": expected}
    write_json(args.output, figures)
    return figures


if __name__ == "__main__":
    main()
