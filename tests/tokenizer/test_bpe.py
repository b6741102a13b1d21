"""The hand-written byte-pair encoding against the library, a slow obvious formula, and GPT-2's published table."""

import json
import os
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from minillm.errors import UserError
from minillm.tokenizer import Tokenizer, bpe, train_bpe
from minillm.tokenizer.bpe import GPT2_PIECES, BytePairEncoding, count_pieces, learn_merges, merge_in_word, pieces
from minillm.tokenizer.train import special_tokens

# Real text and GPT-2's published vocabulary, where a copy lies beside the checkout or where this variable says.
DATA = Path(os.environ.get("MINILLM_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
TEXTS = ["", " ", "\n", "a", "low lower lowest", "你好，世界！Hello 世界", "  x\t\n\n 12.5  ", "naïve cafe\u0301"]
TEXTS += ["🙂👨\u200d👩\u200d👧", "\0\x7f"]


def slow_encode(bpe, piece: bytes) -> list[int]:
    """Merge the pair that was learned first, its leftmost occurrence, until there is none."""
    ids = [bpe.byte_ids[byte] for byte in piece]
    while True:
        found = [(bpe.rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in bpe.rank]
        if not found:
            return ids
        i = min(found)[1]
        ids[i : i + 2] = [bpe.merges[ids[i], ids[i + 1]]]


def slow_merges(words: list[bytes], vocab_size: int, min_frequency: int) -> list[tuple[bytes, bytes]]:
    """Count all pairs of all words before every merge."""
    split = [[bytes([byte]) for byte in word] for word in words]
    order = {token: i for i, token in enumerate(learn_merges({}, 256)[0])}
    merges: list[tuple[bytes, bytes]] = []
    while len(order) < vocab_size:
        counts = Counter(pair for word in split for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], order[pair[0]], order[pair[1]]))
        if counts[best] < min_frequency:
            break
        merges.append(best)
        order[b"".join(best)] = len(order)
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [b"".join(best)]
                i += 1
    return merges


def theirs(words: list[str], vocab_size: int, *, min_frequency: int, max_token_length: int | None):
    """Let the library learn from whole words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_length and max_token_length + 1,  # their limit is exclusive
        show_progress=False,
    )
    backend.train_from_iterator(iter(words), trainer=trainer)
    return backend


@pytest.mark.parametrize("split_han", [False, True])
@pytest.mark.parametrize("vocab_size, longest", [(280, None), (600, 15), (1100, None), (1100, 3), (5000, 4)])
@pytest.mark.filterwarnings("ignore:the text .* gave only")
def test_the_same_file_as_the_librarys(corpus, vocab_size, longest, split_han):
    by_library, by_hand = (
        train_bpe(corpus(), vocab_size=vocab_size, max_token_length=longest, split_han=split_han, by_hand=by_hand)
        for by_hand in (False, True)
    )
    assert by_hand.files == by_library.files
    bpe = BytePairEncoding.from_tokenizer(by_library)
    for text in [*corpus(), *TEXTS]:
        assert bpe.encode(text) == by_library.encode(text)
        assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("seed", range(60))
def test_few_letters_many_ties(seed):
    """Words of two or three letters: counts tie all the time, and runs such as aaaa overlap themselves."""
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abc"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(rng.randint(1, 8))]
    vocab_size, longest = 256 + rng.randint(0, 80), rng.choice([None, 2, 3, 5])
    settings = {"min_frequency": rng.choice([0, 1, 2, 3]), "max_token_length": longest}
    backend = theirs(words, vocab_size, **settings)
    expected = json.loads(backend.to_str())["model"]

    tokens, merges = learn_merges(Counter(word.encode() for word in words), vocab_size, **settings)
    bpe = BytePairEncoding(tokens, merges, pattern=".+")
    vocab, names = bpe.to_strings()
    assert vocab == expected["vocab"]
    assert [list(pair) for pair in names] == expected["merges"]
    if longest is not None:
        assert max(map(len, tokens)) <= longest
    for word in [*words, letters * 30]:
        assert bpe.encode(word) == backend.encode(word).ids == slow_encode(bpe, word.encode())


@pytest.mark.parametrize("seed", range(5))
def test_merges_of_the_slow_formula(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcd", [5, 3, 1, 1], k=rng.randint(1, 16))).encode() for _ in range(60)]
    # No letter twice in a row: how often (a, a) occurs in aaa is a matter of counting.
    words = [re.sub(rb"(.)\1+", rb"\1", word) for word in words]
    words += words[:20]
    tokens, merges = learn_merges(Counter(words), 300, min_frequency=2)
    learned = [(tokens[a], tokens[b]) for a, b in merges]
    assert len(learned) > 20
    assert learned == slow_merges(words, 300, min_frequency=2)


def test_an_example_by_hand():
    counts = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    tokens, merges = learn_merges(counts, 256 + 4, special_tokens=())
    assert [(tokens[a], tokens[b]) for a, b in merges] == [
        (b"e", b"s"),  # 9, as often as (s, t); the ids decide
        (b"es", b"t"),
        (b"l", b"o"),
        (b"lo", b"w"),
    ]
    bpe = BytePairEncoding(tokens, merges, pattern=GPT2_PIECES)
    assert [bpe.tokens[i] for i in bpe.encode("lowest")] == [b"low", b"est"]


@pytest.mark.parametrize(
    "word, after, changes",
    [
        ("xaby", "x1y", {"xa": -1, "x1": 1, "by": -1, "1y": 1}),
        ("ab", "1", {}),
        ("abab", "11", {"ba": -1, "11": 1}),
        ("axb", "axb", {}),
    ],
)
def test_changes_of_a_merge(word, after, changes):
    ids = [ord(letter) for letter in word]
    found = Counter()
    for (a, b), change in merge_in_word(ids, (ord("a"), ord("b")), ord("1")):
        found[chr(a) + chr(b)] += change
    assert "".join(map(chr, ids)) == after
    assert {pair: n for pair, n in found.items() if n} == changes


def test_a_piece_of_any_length_takes_little_time():
    tokens, merges = learn_merges({b"a" * 64: 3}, 262)
    bpe = BytePairEncoding(tokens, merges, pattern=".+")
    ids = bpe.encode("a" * 200_001)  # quadratic work would take minutes
    assert len(ids) == 200_000 // 64 + 1
    assert bpe.decode(ids) == "a" * 200_001


def test_no_pair_left():
    tokens, merges = learn_merges({b"abc": 1, b"abd": 1}, 300, special_tokens=["<|endoftext|>"])
    assert tokens[0] == b"<|endoftext|>"
    assert tokens[257:] == [b"ab"]
    assert list(merges.values()) == [257]
    assert learn_merges({}, 300)[1] == {}


def test_pieces_are_the_librarys_cuts(tokenizer):
    bpe = BytePairEncoding.from_tokenizer(tokenizer)
    for text in TEXTS:
        cut = [text[a:b].encode() for _, (a, b) in tokenizer._plain.pre_tokenizer.pre_tokenize_str(text)]
        assert list(pieces(text, bpe.pattern)) == cut
    assert count_pieces(["to be or", " not to be"], GPT2_PIECES)[b" be"] == 2


def test_ids_without_a_token_say_nothing():
    vocab = {**BytePairEncoding(*learn_merges({}, 256), pattern=".+").to_strings()[0], "ab": 300}
    bpe = BytePairEncoding.from_strings(vocab, [["a", "b"]], pattern=".+")
    assert bpe.encode("ab") == [300]
    assert bpe.decode([299, 300]) == "ab"
    assert bpe.to_strings() == (vocab, [("a", "b")])


@pytest.mark.parametrize("name, value", [("ignore_merges", True), ("dropout", 0.1), ("normalizer", {"type": "NFC"})])
def test_what_it_does_not_do_is_refused_by_name(tokenizer, name, value):
    spec = json.loads(tokenizer.files["tokenizer.json"])
    (spec if name == "normalizer" else spec["model"])[name] = value
    with pytest.raises(UserError, match=f"has {name} = "):
        BytePairEncoding.from_tokenizer(Tokenizer({"tokenizer.json": json.dumps(spec)}))


@pytest.mark.parametrize(
    "cutter",
    [
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        None,
    ],
)
def test_other_cuts_are_refused(tokenizer, cutter):
    spec = json.loads(tokenizer.files["tokenizer.json"])
    spec["pre_tokenizer"] = cutter
    with pytest.raises(UserError, match="only byte-level BPE cut by one regular expression"):
        BytePairEncoding.from_tokenizer(Tokenizer({"tokenizer.json": json.dumps(spec)}))


def test_bad_text_and_vocabularies(tokenizer):
    bpe = BytePairEncoding.from_tokenizer(tokenizer)
    with pytest.raises(UserError, match=r"character 1 of a text is the lone surrogate U\+D800"):
        bpe.encode("a\ud800")
    with pytest.raises(UserError, match="cannot tokenise int"):
        bpe.encode(3)
    with pytest.raises(UserError, match="only 1 of 256 bytes are tokens"):
        BytePairEncoding.from_strings({"a": 0}, [], pattern=".+")
    with pytest.raises(UserError, match="a merge needs 'ac', which is not a token"):
        BytePairEncoding.from_strings({"a": 0, "c": 1}, [("a", "c")], pattern=".+")


# ---- GPT-2's published table and real text ----


@pytest.fixture(scope="module")
def gpt2_files():
    files = DATA / "tokenizers/gpt2_encoder.json", DATA / "tokenizers/gpt2_vocab.bpe"
    if not all(file.is_file() for file in files):
        pytest.skip(f"no {files[0]}: set MINILLM_DATA to a directory with tokenizers/gpt2_encoder.json")
    return files


@pytest.fixture(scope="module")
def real_texts():
    files = [DATA / f"pretrain_{language}_valid.jsonl.gz" for language in ("zh", "en")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"no {files[0]}: set MINILLM_DATA to a directory with real text")
    return files


def test_gpt2(gpt2_files):
    bpe = BytePairEncoding.from_gpt2(*gpt2_files)
    vocab = json.loads(gpt2_files[0].read_text(encoding="utf-8"))
    lines = gpt2_files[1].read_text(encoding="utf-8").splitlines()
    assert len(bpe.tokens) == 50257
    assert len(bpe.merges) == 50000
    assert bpe.encode("Hello world! 你好") == [15496, 995, 0, 220, 19526, 254, 25001, 121]
    assert bpe.to_strings() == (vocab, [tuple(line.split(" ")) for line in lines[1:]])


def test_gpt2_on_real_text(gpt2_files, real_texts):
    from minillm.data import read_records

    bpe = BytePairEncoding.from_gpt2(*gpt2_files)
    backend = tokenizers.Tokenizer(models.BPE.from_file(*map(str, gpt2_files)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for path in real_texts:
        for record in list(read_records(path))[:100]:
            ids = bpe.encode(record.text)
            assert ids == backend.encode(record.text).ids
            assert bpe.decode(ids) == record.text


@pytest.mark.parametrize("vocab_size", [2000, 6400])
def test_the_same_file_on_real_text(real_texts, vocab_size):
    by_library, by_hand = (train_bpe(real_texts, vocab_size=vocab_size, by_hand=by_hand) for by_hand in (False, True))
    assert by_hand.files == by_library.files
    assert by_hand.vocab_size == vocab_size
    assert len(special_tokens(vocab_size)) == 32


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(bpe, "MAX_CACHED", 10)
    tokenizer = train_bpe(iter(["low lower lowest"]), vocab_size=270)
    ours = BytePairEncoding.from_tokenizer(tokenizer)
    text = "长" * 100 + " ".join(f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(200))
    assert ours.encode(text) == tokenizer.encode(text)
    assert len(ours._cache) <= 10
    assert max(map(len, ours._cache)) <= bpe.MAX_CACHED_LEN
