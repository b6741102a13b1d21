"""How many bytes does a token have in Chinese, English and code, and how long do training and encoding take?

    python benchmarks/tokenizer_table.py --zh chinese.jsonl --en english.jsonl

Each vocabulary is trained on the same number of bytes of all three, and measured on held-out text. Byte-level BPE is
trained twice, by the library and by minillm/tokenizer/bpe.py: both must give the same file and the same ids, otherwise
this ends with an error. The sides take turns in one process; a ratio is the median of the ratios of each round.
"""

import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.data import read_records
from minillm.errors import UserError
from minillm.tokenizer import Tokenizer, record_texts, train_bpe, train_sentencepiece
from minillm.tokenizer.bpe import BytePairEncoding

HOLD_OUT_EVERY = 20  # texts
TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "bpe": train_bpe,
    "by hand": lambda texts, **settings: train_bpe(texts, by_hand=True, **settings),
    "sentencepiece": train_sentencepiece,
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is learned from, and how often."""

    zh: str
    """Chinese texts: .jsonl, .jsonl.gz, .parquet or .txt; several files with commas."""
    en: str
    """English texts, likewise."""
    code: str = sysconfig.get_paths()["stdlib"]
    """Program texts, likewise, or a folder whose *.py are read (default: Python's own library)."""
    vocab_sizes: str = "2000,4000,8000,16000,32000"
    """Vocabularies, with commas."""
    bytes_per_kind: int = 4_000_000
    """Text of each kind that is learned from; about a nineteenth as much is measured on."""
    gpt2: str = ""
    """GPT-2's published encoder.json and vocab.bpe, with a comma: measured as they are."""
    rounds: int = 3
    """Rounds, in which every side learns and encodes once."""
    output: str = "out/benchmarks/tokenizer_table.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range or a missing file."""
        for name in ("rounds", "bytes_per_kind"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("zh", "en", "code", "gpt2"):
            for path in filter(None, getattr(self, name).split(",")):
                require(Path(path).exists(), f"--{name} {path}: does not exist; name another file")
        require(len(self.gpt2.split(",")) in (1 if not self.gpt2 else 2,), f"--gpt2 {self.gpt2}: two files are needed")
        sizes = self.vocab_sizes.split(",")
        whole = all(size.strip().isdecimal() for size in sizes)
        require(whole, f"--vocab_sizes {self.vocab_sizes}: must be whole numbers with commas, e.g. 2000,32000")


def texts_at(paths: str) -> Iterator[str]:
    """Yield the texts of files with commas between them, or of all ``*.py`` under a folder, in their order."""
    for path in paths.split(","):
        if Path(path).is_dir():
            skipped = {"site-packages", "test", "tests"}
            for file in sorted(Path(path).rglob("*.py")):
                if not skipped & set(file.parts):
                    yield file.read_text(encoding="utf-8", errors="replace")
        else:
            for record in read_records(path):
                yield from record_texts(
                    {name: getattr(record, name) for name in ("text", "messages", "chosen", "rejected")}
                )


def split(paths: str, n_bytes: int) -> tuple[list[str], list[str]]:
    """Return training texts of at least ``n_bytes`` bytes, and held-out texts."""
    training, held_out, n = [], [], 0
    for number, text in enumerate(texts_at(paths), start=1):
        if number % HOLD_OUT_EVERY == 0:
            held_out.append(text)
            continue
        training.append(text)
        n += len(text.encode("utf-8", "replace"))
        if n >= n_bytes and held_out:
            return training, held_out
    raise UserError(
        f"{paths}: {len(training) + len(held_out)} texts with {n:,} bytes for training, --bytes_per_kind {n_bytes:,}: "
        f"give more text, in {HOLD_OUT_EVERY} records at least, or ask for less"
    )


def measure(args: Arguments, vocab_size: int, learn: list[str], held_out: dict[str, list[str]]) -> dict:
    """Let every side learn and encode ``rounds`` times; return bytes per token and seconds by side."""
    all_held_out = [text for texts in held_out.values() for text in texts]
    learning: dict[str, list[float]] = {name: [] for name in TRAINERS}
    encoding: dict[str, list[float]] = {name: [] for name in TRAINERS}
    made: dict[str, Tokenizer] = {}
    for round_index in range(args.rounds):
        ids = {}
        for name in turns(list(TRAINERS), round_index):
            began = time.perf_counter()
            made[name] = TRAINERS[name](iter(learn), vocab_size=vocab_size)
            learning[name].append(time.perf_counter() - began)
            # All sides cache what they have encoded: each starts with an empty cache.
            encoder = BytePairEncoding.from_tokenizer(made[name]) if name == "by hand" else made[name]
            began = time.perf_counter()
            ids[name] = [encoder.encode(text) for text in all_held_out]
            encoding[name].append(time.perf_counter() - began)
        if made["by hand"].files != made["bpe"].files or ids["by hand"] != ids["bpe"]:
            raise UserError(f"vocabulary {vocab_size}: the library and bpe.py do not agree")
    reach = {name: bytes_per_token(made[name], held_out) for name in ("bpe", "sentencepiece")}
    return {"bytes_per_token": reach, "seconds_learning": learning, "seconds_encoding": encoding}


def bytes_per_token(encoder, held_out: dict[str, list[str]]) -> dict[str, float]:
    """Return how many bytes of UTF-8 a token stands for, by kind of text."""
    return {
        kind: sum(len(text.encode("utf-8")) for text in texts) / sum(len(encoder.encode(text)) for text in texts)
        for kind, texts in held_out.items()
    }


def table_of_reach(results: dict[str, dict], kinds: list[str]) -> str:
    """Return a line for each vocabulary and bytes per token for each kind of text and side."""
    rows = [["vocabulary", *(f"{kind} {name}" for kind in kinds for name in ("bpe", "sentencepiece"))]]
    for vocab_size, result in results.items():
        reach = result["bytes_per_token"]
        cells = (reach.get(name, {}).get(kind) for kind in kinds for name in ("bpe", "sentencepiece"))
        rows.append([vocab_size, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    return format_table(rows)


def table_of_time(results: dict[str, dict]) -> str:
    """Return a line for each vocabulary and the time of the other sides as a multiple of the library's BPE."""
    others = [name for name in TRAINERS if name != "bpe"]
    rows = [["vocabulary", *(f"{what} {name}" for what in ("learn", "encode") for name in others)]]
    for vocab_size, result in results.items():
        ratios = [
            median_ratio(result[f"seconds_{what}"][name], result[f"seconds_{what}"]["bpe"])
            for what in ("learning", "encoding")
            for name in others
        ]
        rows.append([vocab_size, *(f"{ratio:.2f}x" for ratio in ratios)])
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    parts = {kind: split(getattr(args, kind), args.bytes_per_kind) for kind in ("zh", "en", "code")}
    learn = [text for training, _ in parts.values() for text in training]
    held_out = {kind: texts for kind, (_, texts) in parts.items()}

    results = {}
    for vocab_size in args.vocab_sizes.split(","):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a smaller vocabulary than asked for would not be compared with its like
            try:
                results[vocab_size.strip()] = measure(args, int(vocab_size), learn, held_out)
            except UserWarning as warning:
                raise UserError(str(warning)) from None
    timed = dict(results)
    if args.gpt2:
        reach = bytes_per_token(BytePairEncoding.from_gpt2(*args.gpt2.split(",")), held_out)
        results["GPT-2, 50257"] = {"bytes_per_token": {"bpe": reach}}

    n_learned = sum(len(text.encode("utf-8", "replace")) for text in learn)
    print(f"learned from {n_learned / 1e6:.1f} MB; bytes per token of held-out text")
    print(table_of_reach(results, list(held_out)))
    print(f"\ntime as a multiple of the library's byte-level BPE, medians of {args.rounds}\n{table_of_time(timed)}")
    write_json(args.output, {"arguments": vars(args), "results": results})


if __name__ == "__main__":
    main()
