"""Train with SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) and convert to a plain tokenizer.json.

The model is BPE over characters: a character seen often is one id, and the others fall back to their UTF-8
bytes, so nothing is unknown. Nothing is normalised, no blank is added or removed. Pieces stay within one word
(with the one blank before it), one script, one run of blanks; every digit and every newline stands alone.

SentencePiece writes a blank as U+2581 and so cannot tell the two apart; the converted vocabulary holds true
blanks, which makes every text come back exactly and gives the same ids for every text without U+2581.
"""

import io
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minillm.errors import UserError, missing_package
from minillm.tokenizer.base import Tokenizer
from minillm.tokenizer.train import CountedTexts, directory_files, special_tokens, texts_of

MAX_LINE = 4000  # characters handed over at once: beyond 65,535 in one word SentencePiece ends the process
MAX_PIECE = 512  # characters: SentencePiece's own limit

_CUT = "\x01"  # tells SentencePiece's trainer that no piece may reach over this place
# Lines are what pieces may not leave. U+2581 and U+2585 are SentencePiece's own marks.
_ENDS = re.compile("[\r\n\0\x01\u2581\u2585]+")
_HAN = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_AROUND_HAN = re.compile(f"(?<={_HAN})|(?={_HAN})")
# Where no piece reaches over: tokenizers can then work, and remember, word by word.
_PIECES = r"\n| *[^ \n]+| +"


def train_sentencepiece(
    files: str | Path | list[str | Path] | Iterator[str],
    *,
    vocab_size: int = 6400,
    max_token_length: int | None = 15,
    split_han: bool = False,
    character_coverage: float = 0.9995,
) -> Tokenizer:
    """Train on text and return the Tokenizer, which is used and saved as one of ``train_bpe`` is.

    files: as for ``train_bpe``: .txt, .jsonl or .jsonl.gz, or an iterator of texts.
    vocab_size: all ids: 32 special tokens first, then the 256 bytes, then merges and characters. Below 512 the
        spare special tokens are left out (11 remain), so the smallest vocabulary is 268.
    max_token_length: longest token in *characters* (``train_bpe`` counts bytes). None: 512, its own limit.
    split_han: never merge neighbouring Chinese characters.
    character_coverage: share of the text whose characters, the most frequent first, get ids of their own; they
        take at most half the room behind bytes and special tokens, the other half is for merges.

    Warns when the text is too small for ``vocab_size`` pieces: then ``tokenizer.vocab_size`` is smaller.
    Raises UserError without the package sentencepiece, for a vocabulary without room, or for no text at all.
    """
    model = sentencepiece_model(
        files,
        vocab_size=vocab_size,
        max_token_length=max_token_length,
        split_han=split_han,
        character_coverage=character_coverage,
    )
    tokenizer = convert_sentencepiece(model)
    if tokenizer.vocab_size != vocab_size:
        warnings.warn(
            f"the text gave only {tokenizer.vocab_size} of {vocab_size} tokens: no other pair occurs in it; "
            "give more text or a smaller vocab_size",
            stacklevel=2,
        )
    return tokenizer


def check_sentencepiece(vocab_size: int) -> None:
    """Raise UserError unless sentencepiece is installed and bytes, special tokens and a character fit."""
    _package()
    n_special = len(special_tokens(vocab_size))
    least = 256 + n_special + 1
    if vocab_size < least:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes + {n_special} special tokens + a character are {least}"
        )


def sentencepiece_model(
    files,
    *,
    vocab_size: int,
    max_token_length: int | None = 15,
    split_han: bool = False,
    character_coverage: float = 0.9995,
) -> bytes:
    """Return SentencePiece's own model file (``tokenizer.model``); arguments as for ``train_sentencepiece``."""
    check_sentencepiece(vocab_size)
    longest = MAX_PIECE if max_token_length is None else max_token_length
    if not 1 <= longest <= MAX_PIECE:
        raise UserError(f"max_token_length is {longest}; give 1 to {MAX_PIECE} characters, or None for the most")
    if not 0 < character_coverage <= 1:
        raise UserError(f"character_coverage is {character_coverage}; it must lie above 0 and be at most 1")
    specials = special_tokens(vocab_size)
    written = io.BytesIO()
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as lines:
        counts = _write_lines(CountedTexts(texts_of(files)), lines)
        kept = _frequent(counts, character_coverage, room=vocab_size - 256 - len(specials))
        _package().SentencePieceTrainer.train(
            sentence_iterator=_read_lines(lines, kept, counts, split_han),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            # SentencePiece insists on an unknown token; with all bytes in the vocabulary it never occurs.
            unk_id=0,
            unk_piece=specials[0],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=specials[1:],  # control symbols are never found in a text
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pretokenization_delimiter=_CUT,
            character_coverage=1.0,  # rare characters are gone already
            max_sentencepiece_length=longest,
            max_sentence_length=8 * MAX_LINE,  # bytes; with a cut behind each character
            minloglevel=2,
        )
    return written.getvalue()


def convert_sentencepiece(model: bytes) -> Tokenizer:
    """Return the Tokenizer with the ids of a model that ``sentencepiece_model`` made.

    SentencePiece merges the neighbours whose *union* comes first in the vocabulary; tokenizers merges the
    *pair* that comes first in a list. So every pair that makes a piece is listed, in the order of the pieces.
    """
    pieces = _package().SentencePieceProcessor(model_proto=model)
    ids = range(len(pieces))
    names = [pieces.id_to_piece(i) for i in ids]
    n_special = sum(pieces.is_unknown(i) or pieces.is_control(i) for i in ids)
    first_text = n_special + sum(pieces.is_byte(i) for i in ids)
    texts = {name.replace("\u2581", " "): i for i, name in enumerate(names) if i >= first_text}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names[:first_text])} | texts,
            merges=[
                (text[:cut], text[cut:])
                for text in texts
                for cut in range(1, len(text))
                if text[:cut] in texts and text[cut:] in texts
            ],
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(names[:n_special])
    return Tokenizer(directory_files(backend, names[:n_special]), origin="the trained tokenizer")


def _write_lines(texts: CountedTexts, file) -> Counter:
    """Write the lines of all texts; return how often each character occurs in them."""
    counts: Counter = Counter()
    for text in texts:
        for line in _ENDS.split(text):
            for start in range(0, len(line), MAX_LINE):
                part = line[start : start + MAX_LINE]
                counts.update(part)
                file.write(part + "\n")
    if not counts:
        raise UserError("there is no text to train on: every file or record is empty")
    return counts


def _frequent(counts: Counter, coverage: float, *, room: int) -> set[str]:
    """The characters that get an id: the blank, and the most frequent ones up to ``coverage`` or half the room."""
    kept, n_covered = {" "}, counts[" "]
    for character, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if n_covered >= coverage * counts.total() or len(kept) >= room // 2:
            break
        if character != " ":
            kept.add(character)
            n_covered += n
    return kept


def _read_lines(file, kept: set[str], counts: Counter, split_han: bool) -> Iterator[str]:
    """The lines of ``file``, cut at characters that are not in ``kept``."""
    yield " "  # so that the blank has an id whatever the text
    rare = "".join(map(re.escape, counts.keys() - kept))
    rare_run = re.compile(f"[{rare}]+") if rare else None
    file.seek(0)
    for line in file:
        line = line.rstrip("\n")
        for part in rare_run.split(line) if rare_run else [line]:
            if part:
                yield _AROUND_HAN.sub(_CUT, part) if split_han else part


def _package():
    try:
        import sentencepiece
    except ImportError:
        raise missing_package("sentencepiece", purpose="a SentencePiece tokenizer", extra="tokenizer") from None
    return sentencepiece
