"""Train a tokenizer, byte-level BPE or SentencePiece, and save a directory that transformers' AutoTokenizer opens too.

    python train_tokenizer.py --data_path data.jsonl,chats.jsonl --vocab_size 6400

Read it from top to bottom: arguments, texts, train, report, save. The report measures text that was held out.
"""

import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from minillm.cli.arguments import TokenizerArguments
from minillm.cli.command_line import parse, script
from minillm.data import read_records
from minillm.errors import UserError
from minillm.tokenizer import Tokenizer, bytes_per_token, load_tokenizer, record_texts, train_bpe, train_sentencepiece
from minillm.tokenizer.sentencepiece_bpe import check_sentencepiece
from minillm.tokenizer.train import check_vocab_size

TRAINERS = {"bpe": train_bpe, "bpe_by_hand": partial(train_bpe, by_hand=True), "sentencepiece": train_sentencepiece}
CHECKS = {"bpe": check_vocab_size, "bpe_by_hand": check_vocab_size, "sentencepiece": check_sentencepiece}
HOLD_OUT_EVERY = 20  # records
HOLD_OUT_BYTES = 2_000_000  # enough for exact figures


@script
def main(argv: list[str] | None = None):
    args = parse(TokenizerArguments, argv)
    directory = Path(args.save_dir) / "tokenizer"
    CHECKS[args.tokenizer_type](args.vocab_size)  # report invalid settings before reading the files
    check_writable(directory)

    # Texts: equally from all files; without --valid_path every 20th record is held out
    held_out: list[str] = []
    n_bytes = 0
    reading = {"strict": args.strict, "columns": args.columns}

    def training_texts() -> Iterator[str]:
        nonlocal n_bytes
        for n, (texts, roles) in enumerate(balanced_records(args.data_files, **reading), start=1):
            if not args.valid_files and n % HOLD_OUT_EVERY == 0 and count_bytes(held_out) < HOLD_OUT_BYTES:
                held_out.extend(texts)
            else:
                n_bytes += count_bytes(texts)
                yield from texts
                yield from roles  # the chat template writes them before every turn
            if n == args.max_records or n_bytes >= args.max_bytes > 0:
                return

    # Train
    files = ", ".join(map(str, args.data_files))
    print(f"training a tokenizer of {args.vocab_size:,} tokens on {files} ...", flush=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limits = {"vocab_size": args.vocab_size, "max_token_length": args.max_token_length or None}
        tokenizer = TRAINERS[args.tokenizer_type](training_texts(), **limits, split_han=args.split_han)
    print(f"trained {tokenizer.vocab_size:,} tokens on {n_bytes / 1e6:.3g} MB of text")
    for warning in caught:
        print(f"warning: {warning.message}")

    # Report: bytes per token, for Chinese and English separately
    for texts, _ in balanced_records(args.valid_files, **reading):
        if count_bytes(held_out) >= HOLD_OUT_BYTES:
            break
        held_out.extend(texts)
    report(tokenizer, held_out)

    # Save
    warn_if_replaced(directory, tokenizer)
    tokenizer.save(directory)
    print(f"saved {directory}")
    return tokenizer


def balanced_records(files: list[str], *, strict: bool, columns: str = "") -> Iterator[tuple[list[str], list[str]]]:
    """Yield the texts and the role names of each record; the next one is from the file with the fewest bytes so far.

    So a limit on the total cuts all files equally: a large English file does not crowd out a small Chinese one.
    """
    settings = {"strict": strict, "columns": columns}
    readers = {path: iter(read_records(path, **settings)) for path in files}  # reports missing files
    bytes_of_file = dict.fromkeys(readers, 0)
    while readers:
        path = min(readers, key=bytes_of_file.__getitem__)
        record = next(readers[path], None)
        if record is None:
            del readers[path]
            continue
        fields = ("text", "messages", "chosen", "rejected")
        texts = list(record_texts({name: getattr(record, name) for name in fields}))
        bytes_of_file[path] += count_bytes(texts)
        yield texts, [message["role"] for message in record.messages or []]


def count_bytes(texts: list[str]) -> int:
    """Return the number of bytes of the texts in UTF-8."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def report(tokenizer: Tokenizer, held_out: list[str]) -> None:
    """Print bytes and characters per token of the held-out lines of each language."""
    table = bytes_per_token(tokenizer, held_out)
    if not table:
        print(f"no held-out text to measure (fewer than {HOLD_OUT_EVERY} records): give --valid_path")
    for language, row in table.items():
        print(
            f"{language}: {row['bytes_per_token']:.3f} bytes per token, {row['characters_per_token']:.3f} "
            f"characters per token  (held out: {row['bytes']:,} bytes, {row['tokens']:,} tokens)"
        )


def check_writable(directory: Path) -> None:
    """Raise UserError if ``directory`` cannot be made or written, before minutes of training are lost."""
    existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to '{directory}': '{existing}' is not a writable directory; change --save_dir")


def warn_if_replaced(directory: Path, tokenizer: Tokenizer) -> None:
    """Warn if a different tokenizer is about to be replaced: models trained with it would read nonsense."""
    try:
        if load_tokenizer(directory).content_hash != tokenizer.content_hash:
            print(f"warning: {directory} held another tokenizer; models trained with it need their own copy")
    except UserError:
        pass  # no earlier tokenizer


if __name__ == "__main__":
    main()
