"""Train a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2, section 2.2).

The library ``tokenizers`` learns the merges, or ``bpe.py`` does, which is written to be read: the same file results.
The text is first cut into pieces; merges never cross a cut. The pieces decide what a token can be:

- every newline alone, so that text encoded part by part equals the whole when the parts meet at a newline;
- every digit alone, so that a number has one spelling and its place values line up;
- a run of Chinese characters without blanks and without letters of other scripts;
- a word of any other script, or a run of punctuation, with the one blank before it;
- what is left of the blanks. A blank before a digit or a Chinese character is a token of its own: the
  price for one digit having one id wherever it stands.
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

N_SPECIAL = 32  # with the spare ones, for tokens a later stage may want
# Longest piece that merges are learned from, in characters. Learning takes time that grows with the square of a piece;
# words are short, but a text without blanks and punctuation is one piece, whatever its length.
MAX_PIECE_LEN = 1000
SPARES_FROM_VOCAB = 512  # below this size spare tokens would crowd out merges: only the named ones are kept

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
        r"[^\S\n]+(?![^\s\p{N}\p{Han}])",  # all blanks, but leave the last one to a word behind them
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
    """Train on text and return the Tokenizer. The same text in the same settings gives the same tokenizer.

    files: a ``.txt``, ``.jsonl`` or ``.jsonl.gz`` file, or a list of them; or an *iterator* of texts
        (``iter(list_of_texts)``), in any order of your own: texts are read once.
    vocab_size: all ids: 32 special tokens first, then the 256 bytes, then merges. Below 512 the spare
        special tokens are left out (11 remain), so the smallest vocabulary is 267.
    max_token_length: longest token in bytes; 15 is five Chinese characters, or a word of 14 letters and its blank.
        Small corpora repeat whole phrases, and a token per phrase teaches a model nothing about its words.
        None: no limit.
    split_han: each Chinese character a piece of its own, never merged with its neighbour.
    min_frequency: a merge must occur so often.
    A piece of more than 1,000 characters is cut for learning, so that time grows with the text alone.
    by_hand: learn the merges with ``bpe.py`` instead of the library: the same result, only later.

    Warns when the text is too small for ``vocab_size`` merges: then ``tokenizer.vocab_size`` is smaller.
    Raises UserError for a vocabulary without room for bytes and special tokens, or no text at all.
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
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so that every byte has an id
            # The library makes tokens *shorter* than its limit.
            max_token_length=None if max_token_length is None else max_token_length + 1,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
    if texts.n_characters == 0:
        raise UserError("there is no text to train on: every file or record is empty")

    found = backend.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        warnings.warn(
            f"the text ({texts.n_characters:,} characters) gave only {found} of {vocab_size} tokens: no "
            f"other pair occurs {min_frequency} times; give more text or a smaller vocab_size",
            stacklevel=2,
        )
    return Tokenizer(directory_files(backend, specials), origin="the trained tokenizer")


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless the bytes and the special tokens fit."""
    n_special = len(special_tokens(vocab_size))
    if vocab_size < 256 + n_special:
        least = 256 + n_special
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes + {n_special} special tokens are {least}")


def special_tokens(vocab_size: int) -> list[str]:
    """The special tokens in the order of their ids: the named ones, then ``<|spare_0|>`` ... up to 32."""
    n_spare = N_SPECIAL - len(SPECIAL_TOKENS) if vocab_size >= SPARES_FROM_VOCAB else 0
    return [*SPECIAL_TOKENS, *(f"<|spare_{n}|>" for n in range(n_spare))]


def directory_files(backend: tokenizers.Tokenizer, specials: list[str]) -> dict[str, str]:
    """tokenizer.json and what transformers expects next to it."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        # Tags (<think> ...) are output that a reader wants to see: only control and spare tokens are
        # "special" in the sense of skip_special_tokens. The trainer marks all of them.
        token["special"] = token["content"] not in TAG_TOKENS
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    extra = [t for t in specials if t not in TAG_TOKENS and t != "<|endoftext|>"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": None,
        "additional_special_tokens": extra,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    template = resources.files("minillm.tokenizer").joinpath("chat_template.jinja")
    return {
        "tokenizer.json": json.dumps(spec, indent=2, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps({**names, "additional_special_tokens": extra}, indent=2) + "\n",
        "chat_template.jinja": template.read_text(encoding="utf-8"),
    }


class CountedTexts:
    """Iterate once, count characters, cut what is too long, and refuse what is not text before Rust says it in its way.

    Args:
        pattern: of the pieces; those longer than ``MAX_PIECE_LEN`` are cut. None: nothing is cut.
    """

    def __init__(self, texts: Iterable[str], pattern: str | None = None):
        self.texts, self.pattern = texts, pattern
        self.n_characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if not isinstance(text, str):
                raise UserError(f"cannot train on {type(text).__name__}: texts (str) are needed")
            self.n_characters += len(text)
            # In chats <think> and its like are tokens already: their letters must not earn merges.
            text = _SPECIAL_TEXT.sub("\n", text)
            text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate counts as "?"
            yield from [text] if self.pattern is None else without_long_pieces(text, self.pattern)


# Where a piece may be too long: no piece reaches over a blank, but for the one before it, nor over a newline.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_PIECE_LEN},}}|(?<![^\S\n])[^\S\n]{{{MAX_PIECE_LEN},}}")


def without_long_pieces(text: str, pattern: str) -> Iterator[str]:
    """Yield ``text`` in parts, cut inside of pieces longer than ``MAX_PIECE_LEN`` and nowhere else.

    Ordinary text comes back whole.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        end = run.start()
        for piece in pieces(run.group(), pattern):
            begin, end = end, end + len(piece.decode("utf-8"))
            while end - begin > MAX_PIECE_LEN:
                begin += MAX_PIECE_LEN
                yield text[start:begin]
                start = begin
    yield text[start:]


def texts_of(files) -> Iterable[str]:
    """Every text of ``files``, which is what ``train_bpe`` accepts; UserError for anything else."""
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


# Keys whose strings are text to be read by a model; other strings (role, source, task ...) are labels.
_TEXT_KEYS = {"text", "content", "value", "reasoning_content"}  # plain text and messages
_TEXT_KEYS |= {"system", "instruction", "input", "output"}  # alpaca
_TEXT_KEYS |= {"prompt", "completion", "chosen", "rejected"}  # preferences
_LIST_KEYS = {"conversations", "messages", "conversation", "prompt", "completion", "chosen", "rejected"}


def record_texts(record) -> Iterator[str]:
    """Every text of a record of any schema ({"text"}, conversations, preference pairs, ...), in order."""
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
    """ "zh" when a third or more of the letters are Chinese, "en" for other letters, None without letters."""
    letters = [c for c in line if c.isalpha()]
    if not letters:
        return None
    n_han = sum("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c >= "\U00020000" for c in letters)
    return "zh" if 3 * n_han >= len(letters) else "en"


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """How far a token reaches, for Chinese and other lines apart.

    Returns {"zh": {"bytes_per_token", "characters_per_token", "bytes", "tokens"}, "en": {...}} with only the
    languages that occur. Lines without a letter are counted nowhere; their newlines are not counted either.
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
