"""Byte-level byte-pair encoding by hand: learn merges, encode, decode (Sennrich et al. 2016, section 3.2).

The alphabet is the 256 bytes, so every text can be encoded (Radford et al. 2019, section 2.2). Training repeats one
step: find the pair of neighbouring tokens that occurs most often, and make it a new token. Encoding applies the merges
in the order in which they were learned:

    l o w e r      the bytes of one piece of text
    l o w er       (e, r) was learned first
    lo w er        then (l, o)
    low er         then (lo, w); no learned pair is left

The library ``tokenizers`` does the same in Rust. This file is written to be read. It learns the same merges and gives
the same ids (the tests compare), but more slowly (benchmarks/tokenizer_table.py measures how much).
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from minillm.errors import UserError
from minillm.tokenizer.base import Tokenizer, bad_text, byte_level_alphabet

# How GPT-2 cuts a text into pieces; merges never cross a cut.
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# In a vocabulary file a visible character stands for each byte. The bytes' ids are in the order of these characters.
BYTE_OF = dict(sorted(byte_level_alphabet().items()))
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}

MAX_CACHED, MAX_CACHED_LEN = 1 << 16, 64  # pieces in the cache of ids, and bytes of the longest one

Pair = tuple[int, int]


class BytePairEncoding:
    """A vocabulary and its merges.

    Args:
        tokens: the bytes of every id. For a control token, to which no text is encoded, the bytes of its name.
        merges: pair of ids → id of the merged token, in the order of learning.
        pattern: regular expression (Oniguruma's syntax) of the pieces that a text is cut into.
    """

    def __init__(self, tokens: list[bytes], merges: dict[Pair, int], *, pattern: str):
        self.tokens, self.merges, self.pattern = tokens, merges, pattern
        self.rank = {pair: rank for rank, pair in enumerate(merges)}  # lower ranks are applied first
        self.byte_ids = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
        if len(self.byte_ids) != 256:
            raise UserError(f"only {len(self.byte_ids)} of 256 bytes are tokens: this is not a byte-level vocabulary")
        self._cache: dict[bytes, list[int]] = {}  # ids of pieces: words repeat

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, equal to those of ``tokenizers`` with the same vocabulary.

        Raises:
            UserError: ``text`` has a lone surrogate.
        """
        ids: list[int] = []
        for piece in pieces(text, self.pattern):
            piece_ids = self._cache.get(piece)
            if piece_ids is None:
                piece_ids = self.encode_piece(piece)
                if len(self._cache) >= MAX_CACHED:
                    self._cache.clear()  # frequent pieces soon return
                if len(piece) <= MAX_CACHED_LEN:
                    self._cache[piece] = piece_ids
            ids += piece_ids
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        """Return the ids of one piece: merge the pair with the lowest rank (the leftmost of equals), and repeat.

        The pairs are in a heap, so n bytes take O(n log n) steps, also in a long piece.
        """
        ids: list[int | None] = [self.byte_ids[byte] for byte in piece]  # None once merged into its left neighbour
        # A linked list: the indices of the left and right neighbours.
        left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        heap = [(self.rank[pair], i, pair) for i, pair in enumerate(pairwise(ids)) if pair in self.rank]
        heapq.heapify(heap)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = right[i]
            if j == len(ids) or (ids[i], ids[j]) != pair:
                continue  # one of the two was merged with its other neighbour meanwhile
            ids[i], ids[j] = self.merges[pair], None
            right[i] = right[j]
            if right[i] < len(ids):
                left[right[i]] = i
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self.rank:
                    new_pair = (ids[a], ids[b])
                    heapq.heappush(heap, (self.rank[new_pair], a, new_pair))
        return [i for i in ids if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are not a complete character become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "BytePairEncoding":
        """Read vocabulary, merges and pattern of a byte-level ``tokenizer.json``.

        Raises:
            UserError: it is of another type, or does more to a text than cut and merge it.
        """
        spec = json.loads(tokenizer.files["tokenizer.json"])
        model, cutter = spec["model"], spec.get("pre_tokenizer") or {}
        pattern = _pattern_of(cutter)
        if model.get("type") != "BPE" or pattern is None:
            kind = f"{model.get('type')} with the pre-tokenizer {cutter.get('type')}"
            raise UserError(
                f"{tokenizer.origin} is {kind}; only byte-level BPE cut by one regular expression is supported"
            )
        for name in ("normalizer", "dropout", "ignore_merges", "byte_fallback"):
            value = spec.get(name) or model.get(name)
            if value:
                raise UserError(f"{tokenizer.origin} has {name} = {value}, which is not supported")
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        return cls.from_strings(model["vocab"], merges, pattern=pattern)

    @classmethod
    def from_gpt2(cls, encoder_json: str | Path, vocab_bpe: str | Path) -> "BytePairEncoding":
        """Read the two files of the published GPT-2 (``encoder.json``, ``vocab.bpe``)."""
        vocab = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
        lines = Path(vocab_bpe).read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines[1:] if line]  # the first line is the version
        return cls.from_strings(vocab, merges, pattern=GPT2_PIECES)

    @classmethod
    def from_strings(cls, vocab: dict[str, int], merges: Iterable[list[str]], *, pattern: str) -> "BytePairEncoding":
        """Return one made of the tokens and merges of vocabulary files, in which a visible character is a byte."""
        tokens = [b""] * (max(vocab.values()) + 1)  # ids without a token: no bytes
        for token, i in vocab.items():
            tokens[i] = bytes(BYTE_OF[character] for character in token)
        try:
            ids = {(vocab[a], vocab[b]): vocab[a + b] for a, b in merges}
        except KeyError as error:
            message = f"a merge needs {error}, which is not a token: vocabulary and merges do not belong together"
            raise UserError(message) from None
        return cls(tokens, ids, pattern=pattern)

    def to_strings(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Return the vocabulary and the merges as in vocabulary files, the inverse of ``from_strings``."""
        names = ["".join(CHARACTER_OF[byte] for byte in token) for token in self.tokens]
        vocab = {name: i for i, name in enumerate(names) if name}
        return vocab, [(names[a], names[b]) for a, b in self.merges]


def learn_merges(
    counts: dict[bytes, int],
    vocab_size: int,
    *,
    special_tokens: Iterable[str] = (),
    min_frequency: int = 2,
    max_token_length: int | None = None,
) -> tuple[list[bytes], dict[Pair, int]]:
    """Return the tokens and the merges learned from ``counts``, for ``BytePairEncoding``.

    Args:
        counts: how often each piece occurs (``count_pieces``).
        vocab_size: number of ids: ``special_tokens`` first, then the 256 bytes, then a token for each merge. It is
            smaller if no pair is left that occurs ``min_frequency`` times.
        max_token_length: of a token in bytes, at least 2.

    Returns:
        The bytes of every id, and the merges (pair of ids → id) in order. Pairs that occur equally often are merged in
        the order of their ids, so the same counts give the same merges.
    """
    tokens = [name.encode("utf-8") for name in special_tokens]
    id_of = {byte: len(tokens) + i for i, byte in enumerate(BYTE_OF.values())}
    tokens += [bytes([byte]) for byte in id_of]
    words = [[id_of[byte] for byte in piece] for piece in counts]
    frequency = list(counts.values())
    max_length = max_token_length or float("inf")

    # How often each pair occurs, and in which words. A merge changes few words: only their pairs are counted again.
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for n, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += frequency[n]
            words_with[pair].add(n)
    heap = [(-pair_counts[pair], pair, word_ids) for pair, word_ids in words_with.items()]  # most frequent pair first
    heapq.heapify(heap)

    merges: dict[Pair, int] = {}
    while heap and len(tokens) < vocab_size:
        minus_count, pair, word_ids = heapq.heappop(heap)
        if -minus_count != pair_counts[pair]:  # other merges have reduced its count: put it back with the new one
            heapq.heappush(heap, (-pair_counts[pair], pair, word_ids))
            continue
        if -minus_count < max(min_frequency, 1):
            break  # the most frequent pair is too rare, and so are all others
        new_id = merges[pair] = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])

        # All pairs with the new token appear now, and none later: no other merge makes the same bytes, because equal
        # bytes go through equal merges everywhere. So every pair enters the heap once.
        words_with.clear()
        for n in word_ids:
            for changed_pair, change in merge_in_word(words[n], pair, new_id):
                pair_counts[changed_pair] += change * frequency[n]
                if change > 0:
                    words_with[changed_pair].add(n)
        for new_pair, new_word_ids in words_with.items():
            if len(tokens[new_pair[0]]) + len(tokens[new_pair[1]]) <= max_length:
                heapq.heappush(heap, (-pair_counts[new_pair], new_pair, new_word_ids))
    return tokens, merges


def merge_in_word(word: list[int], pair: Pair, new_id: int) -> list[tuple[Pair, int]]:
    """Replace ``pair`` by ``new_id`` in ``word`` (in place), from left to right.

    Returns the neighbouring pairs that occur once more (+1) or once less (-1) now, without ``pair`` itself.
    """
    changes: list[tuple[Pair, int]] = []
    i = 0
    while i < len(word) - 1:
        if word[i] == pair[0] and word[i + 1] == pair[1]:
            word[i : i + 2] = [new_id]
            if i > 0:
                changes += [((word[i - 1], pair[0]), -1), ((word[i - 1], new_id), +1)]
            if i + 1 < len(word):
                changes += [((pair[1], word[i + 1]), -1), ((new_id, word[i + 1]), +1)]
        i += 1
    return changes


def pieces(text: str, pattern: str) -> Iterator[bytes]:
    """Return the pieces of ``text``, cut where a match of ``pattern`` begins or ends; UserError for lone surrogates."""
    try:
        cut = _cutter(pattern).pre_tokenize_str(text)
    except (TypeError, UnicodeEncodeError):
        raise bad_text(text) from None
    return (piece.encode("utf-8") for piece, _ in cut)


@cache
def _cutter(pattern: str) -> pre_tokenizers.PreTokenizer:
    # Python's re has no \p{Han}, so the library does the cutting (and nothing else).
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _pattern_of(cutter: dict) -> str | None:
    """Return the regular expression of a pre-tokenizer in tokenizer.json; None if it does anything else."""
    steps = cutter.get("pretokenizers", [cutter])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PIECES if steps[0].get("use_regex", True) else None
    split, byte_level = steps[0], steps[-1]
    is_split = len(steps) == 2 and split.get("type") == "Split" and not split["invert"] and not byte_level["use_regex"]
    return split["pattern"].get("Regex") if is_split and split["behavior"] == "Isolated" else None


def count_pieces(texts: Iterable[str], pattern: str) -> dict[bytes, int]:
    """Return how often each piece occurs in all texts; merges are learned from these counts alone."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(pieces(text, pattern))
    return counts
