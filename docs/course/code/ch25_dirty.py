"""Chapter 25: a dirty file whose faults are known, through the real command. Give it a folder to keep the files."""

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

from minillm.data.prepare.__main__ import main as prepare_command
from minillm.data.prepare.run import prepare
from minillm.data.prepare.settings import PrepareSettings

rng = random.Random(0)
WORDS = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5000)]
QUESTIONS = [" ".join(rng.choices(WORDS, k=20)) for _ in range(2)]


def lines_of(words: list[str]) -> str:
    """Return words as text, ten in a line."""
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, len(words), 10))


def dirty_lines() -> list[str]:
    """Return 210 good records and 78 faulty ones as lines of a file, in random order."""
    good = [rng.choices(WORDS, k=200) for _ in range(200)]
    alike = [words[:133] + rng.choices(WORDS, k=67) for words in good[40:50]]  # half of the shingles are the same
    texts = [lines_of(words) for words in good + alike]
    texts[50:57] = [text.replace("\n", "\r\n") for text in texts[50:57]]  # Windows line ends: changed, not dropped
    texts += [text.upper() for text in texts[:20]]  # exact duplicates, apart from upper case
    texts += [lines_of([*words[:100], "changed", *words[101:]]) for words in good[20:40]]  # near duplicates: one word
    texts += [" ".join(rng.choices(WORDS, k=3)) for _ in range(15)]  # too short
    texts += [lines_of(rng.choices(WORDS, k=80) + 120 * ["again"]) for _ in range(10)]  # 11 of 20 lines repeat a line
    for number in range(8):  # a question of an evaluation in the middle
        texts.append(lines_of([*rng.choices(WORDS, k=90), *QUESTIONS[number % 2].split(), *rng.choices(WORDS, k=90)]))
    lines = [json.dumps({"text": text}) for text in texts] + 5 * ['{"text": "cut off in the mid']
    rng.shuffle(lines)
    return lines


def write_records(path: Path, n_records: int) -> str:
    """Write records of exactly 97 characters; return the path."""
    records = [{"text": " ".join(rng.choices(WORDS, k=14))} for _ in range(n_records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Clean, deduplicate, decontaminate, split.
    dirty = dirty_lines()
    (folder / "raw.jsonl").write_text("\n".join(dirty) + "\n", encoding="utf-8")
    questions = [json.dumps({"question": text}) for text in (*QUESTIONS, "too short to find")]
    (folder / "eval.jsonl").write_text("\n".join(questions) + "\n", encoding="utf-8")
    files = [
        "--data_path",
        folder / "raw.jsonl",
        "--output",
        folder / "clean.jsonl",
        "--eval_files",
        folder / "eval.jsonl",
    ]
    rules = "--min_characters 100 --max_duplicate_lines 0.3 --near_duplicates drop"
    split = "--valid_ratio 0.1 --valid_overlap drop"
    report = prepare_command([*map(str, files), *rules.split(), *split.split(), "--overwrite"])
    with gzip.open(folder / "clean.dropped.jsonl.gz", "rt", encoding="utf-8") as file:
        dropped = [json.loads(line) for line in file]
    n_written = sum(output["records"] for output in report["outputs"].values())
    print(f"\nneither written nor explained: {len(dirty) - n_written - len(dropped)}")
    near = next(entry for entry in dropped if entry["rule"] == "near_duplicate")
    print(f"line {near['line']} {near['reason']}: line {near['duplicate_of']['line']}, {near['similarity']:.2f} alike")

    # 2. Mix two sources in shares of 70 % and 30 %.
    books, code = write_records(folder / "books.jsonl", 300), write_records(folder / "code.jsonl", 100)
    for size in ("smallest", "largest"):
        mixed = prepare(
            PrepareSettings(
                data_path=f"{books}:0.7,{code}:0.3", output=f"{folder}/{size}.jsonl", mix_size=size, overwrite=True
            )
        )
        for source in mixed["mixture"]:
            name, written, available = Path(source["source"]).stem, source["written"] // 97, source["available"] // 97
            print(f"{size}, {name}: {written} records of {available}, share {source['written_share']:.4f}")
