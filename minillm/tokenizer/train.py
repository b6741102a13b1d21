"""Trains a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2, section 2.2).

The merges are learned by the library ``tokenizers``, or by ``bpe.py``, which is written to be read; both give the same
file. The text is first cut into pieces, and merges never cross a cut. So the pieces decide what a token can be:

- a newline, always alone: text that is encoded in parts which meet at a newline equals the encoding of the whole;
- a digit, always alone: each number has one spelling, and its digits line up by place value;
- a run of Chinese characters, without spaces and letters of other scripts;
- a word of any other script, or a run of punctuation, with one space before it;
- a run of the remaining spaces. A space before a digit or a Chinese character is a separate token: this is the price
  for a digit having the same id everywhere.
"""

import gzip
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillm.errors import UserError
from minillm.tokenizer.base import SPECIAL_TOKENS, TAG_TOKENS, Tokenizer
from minillm.tokenizer.bpe import BytePairEncoding, count_pieces, learn_merges, pieces

N_SPECIAL = 32  # including spare tokens, for later stages
# Longest piece in characters for learning, whose time grows with the square of a piece's length. Words are short, but a
# text without spaces and punctuation is a single piece.
MAX_PIECE_LEN = 1000
SPARES_FROM_VOCAB = 512  # smaller vocabularies have no spare tokens, to leave room for merges

_SPECIAL_TEXT = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

# Oniguruma syntax; the first alternative that matches wins. {han} is "+" or "" (one character each).
_PIECES = "|".join(
    [
        r"\n",
        r"\p{N}",
        r"['’](?:[sStTmMdD]|[lL][lL]|[vV][eE]|[rR][eE])(?!\p{L})",  # I'm, we'll
        r"\p{Han}{han}",
        r" ?(?!\p{Han})\p{L}(?:(?!\p{Han})[\p{L}\p{M}])*",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\S\n]+(?![^\s\p{N}\p{Han}])",  # all spaces, except the last one if a word follows
        r"[^\S\n]+",
    ]
)


def train_bpe(
    files: str | Path | list[str | Path] | Iterator[str],
    *,
    vocab_size: int = 6400,
    max_token_length: int | None = 15,
    split_han: bool = False,
    min_frequency: int = 2,
    by_hand: bool = False,
) -> Tokenizer:
    """Train on text and return the Tokenizer. The same text and settings give the same tokenizer.

    Args:
        files: a ``.txt``, ``.jsonl`` or ``.jsonl.gz`` file, or a list of them; or an *iterator* of texts
            (``iter(list_of_texts)``), which is read once.
        vocab_size: number of ids: 32 special tokens, then the 256 bytes, then merges. Below 512 there are no spare
            special tokens (11 remain), so the smallest vocabulary is 267.
        max_token_length: of a token in bytes; 15 is five Chinese characters, or a word of 14 letters with its space.
            Small corpora repeat whole phrases, and a token for a phrase teaches a model nothing about its words.
            None: no limit.
        split_han: never merge neighbouring Chinese characters.
        min_frequency: how often a pair must occur to be merged.
        by_hand: learn the merges with ``bpe.py`` instead of the library; the result is the same, but it takes longer.

    Pieces of more than 1,000 characters are cut for learning, so that the time grows only with the size of the text. If
    the text is too small for ``vocab_size`` tokens, ``tokenizer.vocab_size`` is smaller, and a warning says so.

    Raises:
        UserError: the vocabulary has no room for bytes and special tokens, or there is no text.
    """
    check_vocab_size(vocab_size)
    specials = special_tokens(vocab_size)
    if max_token_length is not None and max_token_length < 2:
        raise UserError(f"max_token_length is {max_token_length}; give at least 2 bytes, or None for no limit")

    pattern = _PIECES.replace("{han}", "" if split_han else "+")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    texts = CountedTexts(texts_of(files), pattern)
    if by_hand:
        learned = learn_merges(
            count_pieces(texts, pattern),
            vocab_size,
            special_tokens=specials,
            min_frequency=min_frequency,
            max_token_length=max_token_length,
        )
        vocab, merges = BytePairEncoding(*learned, pattern=pattern).to_strings()
        backend.model = models.BPE(vocab=vocab, merges=merges)
        backend.add_special_tokens(specials)
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte gets an id
            # The library's tokens are *shorter* than its limit.
            max_token_length=None if max_token_length is None else max_token_length + 1,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
    if texts.n_characters == 0:
        raise UserError("there is no text to train on: every file or record is empty")

    n_tokens = backend.get_vocab_size(with_added_tokens=True)
    if n_tokens != vocab_size:
        warnings.warn(
            f"the text ({texts.n_characters:,} characters) gave only {n_tokens} of {vocab_size} tokens: no "
            f"other pair occurs {min_frequency} times; give more text or a smaller vocab_size",
            stacklevel=2,
        )
    return Tokenizer(directory_files(backend, specials), origin="the trained tokenizer")


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless the vocabulary has room for the bytes and the special tokens."""
    n_special = len(special_tokens(vocab_size))
    smallest = 256 + n_special
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes + {n_special} special tokens are {smallest}")


def special_tokens(vocab_size: int) -> list[str]:
    """Return the special tokens in the order of their ids: the named ones, then ``<|spare_0|>`` ... up to 32."""
    n_spare = N_SPECIAL - len(SPECIAL_TOKENS) if vocab_size >= SPARES_FROM_VOCAB else 0
    return [*SPECIAL_TOKENS, *(f"<|spare_{n}|>" for n in range(n_spare))]


def directory_files(backend: tokenizers.Tokenizer, specials: list[str]) -> dict[str, str]:
    """Return the files of a tokenizer's directory: tokenizer.json, and those that transformers expects next to it."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        # The trainer marks all of them as special. But tags (<think> ...) are output for the reader: only control and
        # spare tokens are "special" in the sense of skip_special_tokens.
        token["special"] = token["content"] not in TAG_TOKENS
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    additional = [token for token in specials if token not in TAG_TOKENS and token != "<|endoftext|>"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": None,
        "additional_special_tokens": additional,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    template = resources.files("minillm.tokenizer").joinpath("chat_template.jinja")
    return {
        "tokenizer.json": json.dumps(spec, indent=2, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps({**names, "additional_special_tokens": additional}, indent=2) + "\n",
        "chat_template.jinja": template.read_text(encoding="utf-8"),
    }


class CountedTexts:
    """An iterable of the training texts that counts their characters, cuts long pieces, and checks that all are str.

    Args:
        pattern: of the pieces; pieces longer than ``MAX_PIECE_LEN`` are cut. None: no text is cut.
    """

    def __init__(self, texts: Iterable[str], pattern: str | None = None):
        self.texts, self.pattern = texts, pattern
        self.n_characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if not isinstance(text, str):
                raise UserError(f"cannot train on {type(text).__name__}: texts (str) are needed")
            self.n_characters += len(text)
            # <think> and the other special tokens are tokens already: their letters must not lead to merges.
            text = _SPECIAL_TEXT.sub("\n", text)
            text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
            yield from [text] if self.pattern is None else without_long_pieces(text, self.pattern)


# Where a piece may be too long. Apart from one space at its beginning, a piece is only spaces or has none.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_PIECE_LEN},}}|(?<![^\S\n])[^\S\n]{{{MAX_PIECE_LEN},}}")


def without_long_pieces(text: str, pattern: str) -> Iterator[str]:
    """Yield ``text`` in parts, cut only inside of pieces longer than ``MAX_PIECE_LEN``; ordinary text is one part."""
    part_start = 0
    for run in _LONG_RUN.finditer(text):
        piece_end = run.start()
        for piece in pieces(run.group(), pattern):
            cut, piece_end = piece_end, piece_end + len(piece.decode("utf-8"))
            while piece_end - cut > MAX_PIECE_LEN:
                cut += MAX_PIECE_LEN
                yield text[part_start:cut]
                part_start = cut
    yield text[part_start:]


def texts_of(files) -> Iterable[str]:
    """Return an iterable of the texts of ``files`` (as for ``train_bpe``); UserError for anything else."""
    if isinstance(files, (str, Path)):
        files = [files]
    if not isinstance(files, (list, tuple)):
        return files
    for path in files:
        if not isinstance(path, (str, Path)) or not Path(path).is_file():
            raise UserError(f"{str(path)[:200]!r} is not a file (to train on texts, give iter(texts))")
        if not str(path).endswith((".txt", ".jsonl", ".jsonl.gz")):
            raise UserError(f"cannot read '{path}': .txt, .jsonl, .jsonl.gz, or an iterator of texts")
    return (text for path in files for text in _texts_of_file(Path(path)))


def _texts_of_file(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if path.suffix == ".txt":
                yield line
            elif line.strip():
                try:
                    yield from record_texts(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path} line {number} is broken JSON: {error}") from None


# Keys whose strings are text for a model; other strings (role, source, task ...) are labels.
_TEXT_KEYS = {"text", "content", "value", "reasoning_content"}  # plain text and messages
_TEXT_KEYS |= {"system", "instruction", "input", "output"}  # alpaca
_TEXT_KEYS |= {"prompt", "completion", "chosen", "rejected"}  # preferences
_LIST_KEYS = {"conversations", "messages", "conversation", "prompt", "completion", "chosen", "rejected"}


def record_texts(record) -> Iterator[str]:
    """Yield every text of a record of any schema ({"text"}, conversations, preference pairs, ...), in order."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, (list, tuple)):
        for item in record:
            yield from record_texts(item)
    elif isinstance(record, dict):
        for key, value in record.items():
            if (key in _TEXT_KEYS and isinstance(value, str)) or (
                key in _LIST_KEYS and isinstance(value, (list, tuple))
            ):
                yield from record_texts(value)


def language_of(line: str) -> str | None:
    """Return "zh" if at least a third of the letters are Chinese, "en" otherwise, None without letters."""
    letters = [c for c in line if c.isalpha()]
    if not letters:
        return None
    n_han = sum("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c >= "\U00020000" for c in letters)
    return "zh" if 3 * n_han >= len(letters) else "en"


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return the compression rates of a tokenizer, separately for Chinese and other lines.

    The result is {"zh": {"bytes_per_token", "characters_per_token", "bytes", "tokens"}, "en": {...}}, with only the
    languages that occur. Newlines and lines without a letter are not counted.
    """
    lines: dict[str, list[str]] = {}
    for text in texts:
        for line in text.split("\n"):
            language = language_of(line)
            if language is not None:
                lines.setdefault(language, []).append(line)
    table = {}
    for language in sorted(lines, reverse=True):
        n_bytes = sum(len(line.encode("utf-8")) for line in lines[language])
        n_tokens = sum(map(len, tokenizer.encode_batch(lines[language])))
        table[language] = {
            "bytes_per_token": n_bytes / n_tokens,
            "characters_per_token": sum(map(len, lines[language])) / n_tokens,
            "bytes": n_bytes,
            "tokens": n_tokens,
        }
    return table
