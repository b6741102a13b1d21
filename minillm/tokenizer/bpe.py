"""Byte-level byte-pair encoding by hand: learn merges, encode, decode (Sennrich et al. 2016, section 3.2).

The alphabet is the 256 bytes, so no text is unknown (Radford et al. 2019, section 2.2). Training counts, again and
again, which two neighbouring tokens occur together most often, and makes one token of them. Encoding replays the
merges in the order in which they were learned:

    l o w e r      the bytes of one piece of text
    l o w er       (e, r) was learned first
    lo w er        then (l, o)
    low er         then (lo, w); no pair left that was ever learned

The library ``tokenizers`` does the same in Rust. This file is to be read, and it is exact: it learns the same merges
and gives the same ids (the tests compare), only later (benchmarks/tokenizer_table.py says how much).
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

# How GPT-2 cuts a text into pieces; merges never reach over a cut.
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# In a vocabulary file one visible character stands for each byte; ids of the bytes are in the characters' order.
BYTE_OF = dict(sorted(byte_level_alphabet().items()))
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}

MAX_KNOWN, MAX_KNOWN_LEN = 1 << 16, 64  # pieces whose ids are remembered, and the bytes of the longest one

Pair = tuple[int, int]


class BytePairEncoding:
    """A vocabulary and its merges.

    tokens: the bytes of every id; of a control token, which no text encodes to, those of its name.
    merges: pair of ids → the id of the two together, in the order of learning.
    pattern: which pieces a text is cut into (a regular expression in Oniguruma's syntax).
    """

    def __init__(self, tokens: list[bytes], merges: dict[Pair, int], *, pattern: str):
        self.tokens, self.merges, self.pattern = tokens, merges, pattern
        self.rank = {pair: rank for rank, pair in enumerate(merges)}  # the earlier learned, the earlier applied
        self.byte_ids = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
        if len(self.byte_ids) != 256:
            raise UserError(f"only {len(self.byte_ids)} of 256 bytes are tokens: this is not a byte-level vocabulary")
        self._known: dict[bytes, list[int]] = {}  # words repeat: most pieces of a text were encoded before

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, equal to those of ``tokenizers`` with the same vocabulary; UserError for lone surrogates."""
        ids: list[int] = []
        for piece in pieces(text, self.pattern):
            known = self._known.get(piece)
            if known is None:
                known = self.encode_piece(piece)
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()  # what is frequent comes back soon
                if len(piece) <= MAX_KNOWN_LEN:
                    self._known[piece] = known
            ids += known
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        """Ids of one piece: of all pairs in it, the one learned first is merged, the leftmost of equals; repeat.

        The pairs wait in a heap, so n bytes take O(n log n) steps, however long a piece is.
        """
        ids: list[int | None] = [self.byte_ids[byte] for byte in piece]  # None once merged into its left neighbour
        left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # neighbours, a linked list
        waiting = [(self.rank[pair], i, pair) for i, pair in enumerate(pairwise(ids)) if pair in self.rank]
        heapq.heapify(waiting)
        while waiting:
            _, i, pair = heapq.heappop(waiting)
            j = right[i]
            if j == len(ids) or (ids[i], ids[j]) != pair:
                continue  # one of the two has been merged with its other neighbour meanwhile
            ids[i], ids[j] = self.merges[pair], None
            right[i] = right[j]
            if right[i] < len(ids):
                left[right[i]] = i
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self.rank:
                    new = (ids[a], ids[b])
                    heapq.heappush(waiting, (self.rank[new], a, new))
        return [i for i in ids if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not a whole character become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "BytePairEncoding":
        """Read the vocabulary, the merges and the cuts out of a byte-level ``tokenizer.json``.

        Raises UserError for any other kind, and for one that does more to a text than cut and merge.
        """
        spec = json.loads(tokenizer.files["tokenizer.json"])
        model, cutter = spec["model"], spec.get("pre_tokenizer") or {}
        pattern = _pattern_of(cutter)
        if model.get("type") != "BPE" or pattern is None:
            kind = f"{model.get('type')} behind the pre-tokenizer {cutter.get('type')}"
            raise UserError(f"{tokenizer.origin} is {kind}; byte-level BPE is read, cut by one regular expression")
        for name in ("normalizer", "dropout", "ignore_merges", "byte_fallback"):
            if spec.get(name) or model.get(name):
                raise UserError(f"{tokenizer.origin} has {name} = {spec.get(name) or model[name]}; none is read here")
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        return cls.from_strings(model["vocab"], merges, pattern=pattern)

    @classmethod
    def from_gpt2(cls, encoder_json: str | Path, vocab_bpe: str | Path) -> "BytePairEncoding":
        """Read the two files that GPT-2 was published with (``encoder.json``, ``vocab.bpe``)."""
        vocab = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
        lines = Path(vocab_bpe).read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines[1:] if line]  # the first line is the version
        return cls.from_strings(vocab, merges, pattern=GPT2_PIECES)

    @classmethod
    def from_strings(cls, vocab: dict[str, int], merges: Iterable[list[str]], *, pattern: str) -> "BytePairEncoding":
        """Make one from tokens and merges as vocabulary files write them: one visible character for each byte."""
        tokens = [b""] * (max(vocab.values()) + 1)  # ids that no token owns say nothing
        for token, i in vocab.items():
            tokens[i] = bytes(BYTE_OF[character] for character in token)
        try:
            ids = {(vocab[a], vocab[b]): vocab[a + b] for a, b in merges}
        except KeyError as error:
            message = f"a merge needs {error}, which is not a token: vocabulary and merges do not belong together"
            raise UserError(message) from None
        return cls(tokens, ids, pattern=pattern)

    def to_strings(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Return the vocabulary and the merges as files write them, the opposite of ``from_strings``."""
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
    """Learn from pieces and how often each occurs (``count_pieces``).

    vocab_size: all ids: ``special_tokens`` first, then the 256 bytes, then a token for each merge. Fewer come
        back when no pair is left that occurs ``min_frequency`` times.
    max_token_length: bytes, at least 2; longer tokens are not made.

    Returns the bytes of every id, and the merges (pair of ids → id) in order: what ``BytePairEncoding`` takes.
    Pairs that occur equally often are merged in the order of their ids, so the same counts give the same merges.
    """
    tokens = [name.encode("utf-8") for name in special_tokens]
    id_of = {byte: len(tokens) + i for i, byte in enumerate(BYTE_OF.values())}
    tokens += [bytes([byte]) for byte in id_of]
    words = [[id_of[byte] for byte in piece] for piece in counts]
    frequency = list(counts.values())
    longest = max_token_length or float("inf")

    # How often each pair occurs, and in which words. A merge changes few of them: only these are counted again.
    n_of: Counter[Pair] = Counter()
    found_in: defaultdict[Pair, set[int]] = defaultdict(set)
    for n, word in enumerate(words):
        for pair in pairwise(word):
            n_of[pair] += frequency[n]
            found_in[pair].add(n)
    queue = [(-n_of[pair], pair, where) for pair, where in found_in.items()]  # the most frequent pair comes first
    heapq.heapify(queue)

    merges: dict[Pair, int] = {}
    while queue and len(tokens) < vocab_size:
        minus_count, pair, where = heapq.heappop(queue)
        if -minus_count != n_of[pair]:  # merges of other pairs took some away: back to its place in the queue
            heapq.heappush(queue, (-n_of[pair], pair, where))
            continue
        if -minus_count < max(min_frequency, 1):
            break  # the most frequent pair is too rare, and so are all others
        new_id = merges[pair] = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])

        # The pairs with the new token come into being now and at no other time: no other merge makes these bytes,
        # because the same bytes go through the same merges wherever they stand. So every pair is queued once.
        found_in.clear()
        for n in where:
            for changed, change in merge_in_word(words[n], pair, new_id):
                n_of[changed] += change * frequency[n]
                if change > 0:
                    found_in[changed].add(n)
        for new, where in found_in.items():
            if len(tokens[new[0]]) + len(tokens[new[1]]) <= longest:
                heapq.heappush(queue, (-n_of[new], new, where))
    return tokens, merges


def merge_in_word(word: list[int], pair: Pair, new_id: int) -> list[tuple[Pair, int]]:
    """Replace ``pair`` in ``word`` (in place), left to right.

    Returns which neighbouring pairs there are now one more (+1) or one fewer (-1) of, ``pair`` itself left out.
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
    """Cut ``text`` wherever a match of ``pattern`` begins or ends; UserError for a lone surrogate."""
    try:
        cut = _cutter(pattern).pre_tokenize_str(text)
    except (TypeError, UnicodeEncodeError):
        raise bad_text(text) from None
    return (piece.encode("utf-8") for piece, _ in cut)


@cache
def _cutter(pattern: str) -> pre_tokenizers.PreTokenizer:
    # Python's own re knows no \p{Han}: the cutting, and it alone, is left to the library.
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _pattern_of(cutter: dict) -> str | None:
    """The one regular expression of a pre-tokenizer in tokenizer.json; None where it does anything else."""
    steps = cutter.get("pretokenizers", [cutter])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PIECES if steps[0].get("use_regex", True) else None
    split, byte_level = steps[0], steps[-1]
    plain = len(steps) == 2 and split.get("type") == "Split" and not split["invert"] and not byte_level["use_regex"]
    return split["pattern"].get("Regex") if plain and split["behavior"] == "Isolated" else None


def count_pieces(texts: Iterable[str], pattern: str) -> dict[bytes, int]:
    """How often each piece occurs in all texts: merges are learned from this, the order of the texts is lost."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(pieces(text, pattern))
    return counts
