"""Trains with SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) and converts to a plain tokenizer.json.

The model is BPE over characters. A frequent character is one id; the others fall back to their UTF-8 bytes, so every
text can be encoded. There is no normalisation, and no space is added or removed. A token stays within one word (with
one space before it), one script, or one run of spaces. Digits and newlines are always alone.

SentencePiece writes a space as U+2581, so it cannot tell the two apart. The converted vocabulary has real spaces: every
text is decoded exactly, and the ids are the same for every text without U+2581.
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

MAX_LINE = 4000  # characters of a line: a word of more than 65,535 makes SentencePiece end the process
MAX_PIECE = 512  # characters: SentencePiece's own limit

_CUT = "\x01"  # tells SentencePiece's trainer that no token may cross this position
# No token may cross the end of a line. U+2581 and U+2585 are SentencePiece's own marks.
_ENDS = re.compile("[\r\n\0\x01\u2581\u2585]+")
_HAN = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_AROUND_HAN = re.compile(f"(?<={_HAN})|(?={_HAN})")
# Words, which no token crosses: so the library can encode, and cache, word by word.
_PIECES = r"\n| *[^ \n]+| +"


def train_sentencepiece(
    files: str | Path | list[str | Path] | Iterator[str],
    *,
    vocab_size: int = 6400,
    max_token_length: int | None = 15,
    split_han: bool = False,
    character_coverage: float = 0.9995,
) -> Tokenizer:
    """Train on text and return the Tokenizer, which is used and saved like one of ``train_bpe``.

    Args:
        files: as for ``train_bpe``: .txt, .jsonl or .jsonl.gz, or an iterator of texts.
        vocab_size: number of ids: 32 special tokens, then the 256 bytes, then merges and characters. Below 512 there
            are no spare special tokens (11 remain), so the smallest vocabulary is 268.
        max_token_length: of a token in *characters* (``train_bpe`` counts bytes). None: 512, SentencePiece's limit.
        split_han: never merge neighbouring Chinese characters.
        character_coverage: share of the text that is covered by characters with their own id, most frequent first. They
            take at most half of the ids after special tokens and bytes; the other half is for merges.

    If the text is too small for ``vocab_size`` tokens, ``tokenizer.vocab_size`` is smaller, and a warning says so.

    Raises:
        UserError: the package sentencepiece is missing, the vocabulary is too small, or there is no text.
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
    """Raise UserError unless sentencepiece is installed and the vocabulary has room for a character."""
    _package()
    n_special = len(special_tokens(vocab_size))
    smallest = 256 + n_special + 1
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes + {n_special} special tokens + a character are {smallest}"
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
    max_piece = MAX_PIECE if max_token_length is None else max_token_length
    if not 1 <= max_piece <= MAX_PIECE:
        raise UserError(f"max_token_length is {max_piece}; give 1 to {MAX_PIECE} characters, or None for {MAX_PIECE}")
    if not 0 < character_coverage <= 1:
        raise UserError(f"character_coverage is {character_coverage}; it must be above 0 and at most 1")
    specials = special_tokens(vocab_size)
    model_file = io.BytesIO()
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as lines:
        counts = _write_lines(CountedTexts(texts_of(files)), lines)
        alphabet = _frequent_characters(counts, character_coverage, n_ids=vocab_size - 256 - len(specials))
        _package().SentencePieceTrainer.train(
            sentence_iterator=_read_lines(lines, alphabet, counts, split_han),
            model_writer=model_file,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            # SentencePiece requires an unknown token; with all bytes in the vocabulary it never occurs.
            unk_id=0,
            unk_piece=specials[0],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=specials[1:],  # no text is ever encoded to them
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pretokenization_delimiter=_CUT,
            character_coverage=1.0,  # rare characters are removed already
            max_sentencepiece_length=max_piece,
            max_sentence_length=8 * MAX_LINE,  # bytes, with a cut after each character
            minloglevel=2,
        )
    return model_file.getvalue()


def convert_sentencepiece(model: bytes) -> Tokenizer:
    """Return the Tokenizer with the ids of a model of ``sentencepiece_model``.

    SentencePiece merges the neighbours whose *union* comes first in the vocabulary; tokenizers merges the *pair* that
    comes first in a list. So the list has every pair that makes a token, in the order of the tokens.
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
    """Write the lines of all texts to ``file``; return how often each character occurs."""
    counts: Counter = Counter()
    for text in texts:
        for line in _ENDS.split(text):
            for start in range(0, len(line), MAX_LINE):
                short_line = line[start : start + MAX_LINE]
                counts.update(short_line)
                file.write(short_line + "\n")
    if not counts:
        raise UserError("there is no text to train on: every file or record is empty")
    return counts


def _frequent_characters(counts: Counter, coverage: float, *, n_ids: int) -> set[str]:
    """Return the characters with an id: the space, and the most frequent ones up to ``coverage`` or ``n_ids / 2``."""
    alphabet, n_covered = {" "}, counts[" "]
    for character, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if n_covered >= coverage * counts.total() or len(alphabet) >= n_ids // 2:
            break
        if character != " ":
            alphabet.add(character)
            n_covered += n
    return alphabet


def _read_lines(file, alphabet: set[str], counts: Counter, split_han: bool) -> Iterator[str]:
    """Yield the lines of ``file``, cut at characters that are not in ``alphabet``."""
    yield " "  # gives the space an id in every vocabulary
    rare = "".join(map(re.escape, counts.keys() - alphabet))
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
