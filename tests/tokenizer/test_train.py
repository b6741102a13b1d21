import gzip
import json
import random
import warnings

import pytest

from minillm.errors import UserError
from minillm.tokenizer import bytes_per_token, record_texts, train_bpe
from minillm.tokenizer.bpe import pieces as cut
from minillm.tokenizer.train import _PIECES, MAX_PIECE_LEN, language_of, special_tokens, without_long_pieces


def pieces(tokenizer, text):
    """The cuts before any merge, as text."""
    return [text[a:b] for _, (a, b) in tokenizer._plain.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hello world", ["hello", " world"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
        ("a  \n  b", ["a", "  ", "\n", " ", " b"]),
        ("x = 12.5", ["x", " =", " ", "1", "2", ".", "5"]),
        ("23+45=68", ["2", "3", "+", "4", "5", "=", "6", "8"]),
        ("a   12", ["a", "   ", "1", "2"]),
        ("don't we'll THEY'VE", ["don", "'t", " we", "'ll", " THEY", "'VE"]),
        ("say 'tell me'", ["say", " '", "tell", " me", "'"]),
        ("用Python编程2次", ["用", "Python", "编程", "2", "次"]),
        ("你好，世界 中文", ["你好", "，", "世界", " ", "中文"]),
        ("\r\n\tx", ["\r", "\n", "\t", "x"]),
        ("ok 😀❤️!", ["ok", " 😀❤️!"]),
    ],
)
def test_pieces(tokenizer, text, expected):
    assert pieces(tokenizer, text) == expected


def test_digits_and_newlines_are_never_merged(tokenizer):
    for i in range(32, tokenizer.vocab_size):
        token = tokenizer.token_bytes(i)
        if len(token) > 1:
            assert b"\n" not in token
            assert not any(48 <= byte <= 57 for byte in token)


def test_size_and_determinism(corpus):
    first, again = (train_bpe(corpus(), vocab_size=600) for _ in range(2))
    assert first.vocab_size == 600
    assert first.files == again.files
    other_order = train_bpe(iter(sorted(corpus())), vocab_size=600)
    assert other_order.content_hash == first.content_hash, "counts decide, not the order of the texts"


@pytest.mark.parametrize("vocab_size", [0, -1, 100, 266])
def test_too_small_a_vocabulary_is_refused(corpus, vocab_size):
    with pytest.raises(UserError, match=rf"vocab_size {vocab_size} is too small: 256 bytes \+ 11 .* 267"):
        train_bpe(corpus(), vocab_size=vocab_size)


def test_smallest_vocabularies(corpus):
    assert train_bpe(corpus(), vocab_size=267).vocab_size == 267
    small, large = train_bpe(corpus(), vocab_size=511), train_bpe(corpus(), vocab_size=512)
    assert not small.has_token("<|spare_0|>")
    assert large.has_token("<|spare_20|>")
    assert len(special_tokens(511)) == 11
    assert len(special_tokens(512)) == 32


def test_too_little_text_warns_and_keeps_what_there_is(corpus):
    with pytest.warns(UserWarning, match=r"gave only \d+ of 5000 tokens"):
        tokenizer = train_bpe(iter(["abc abc abc"]), vocab_size=5000)
    assert 288 < tokenizer.vocab_size < 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_bpe(corpus(), vocab_size=400)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text(texts):
    with pytest.raises(UserError, match="no text to train on"):
        train_bpe(iter(texts), vocab_size=300)


def test_texts_must_be_text():
    with pytest.raises(UserError, match="cannot train on int"):
        train_bpe(iter(["a", 3]), vocab_size=300)


def test_special_token_text_in_the_corpus_earns_no_merges():
    texts = ["<|im_end|> <think> the then </think> <|im_end|>\n"] * 50
    tokenizer = train_bpe(iter(texts), vocab_size=270)
    assert [tokenizer.token_bytes(i) for i in range(267, 270)] == [b"he", b"the", b" the"]
    assert tokenizer.token_id("<|im_end|>") == 2
    assert 2 not in tokenizer.encode("<|im_end|>")


def test_phrases_are_bounded(corpus):
    phrase = ["中华人民共和国成立了\n"] * 400
    unbounded = train_bpe(iter(phrase), vocab_size=295, max_token_length=None)
    assert len(unbounded.encode("中华人民共和国成立了")) == 1
    bounded = train_bpe(iter(phrase * 2 + list(corpus())), vocab_size=400, max_token_length=6)
    assert max(len(bounded.token_bytes(i)) for i in range(11, 400)) == 6
    alone = train_bpe(corpus(), vocab_size=500, split_han=True)
    for i in range(267, 500):
        assert len(alone.token_bytes(i).decode("utf-8", "ignore")) <= 1 or alone.token_bytes(i).isascii()
    with pytest.raises(UserError, match="max_token_length is 1; give at least 2 bytes"):
        train_bpe(corpus(), vocab_size=300, max_token_length=1)


def test_files(corpus, tmp_path):
    texts = list(corpus())
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("".join(texts), encoding="utf-8")
    records = "".join(json.dumps({"text": t, "source": "label"}, ensure_ascii=False) + "\n" for t in texts)
    lines.write_text(records + "\n", encoding="utf-8")
    packed.write_bytes(gzip.compress(records.encode("utf-8")))
    expected = train_bpe(corpus(), vocab_size=400).content_hash
    for files in (plain, str(lines), [packed]):
        assert train_bpe(files, vocab_size=400).content_hash == expected
    with pytest.raises(UserError, match="not a file"):
        train_bpe(["some text of mine"], vocab_size=400)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="cannot read"):
        train_bpe(tmp_path / "a.csv", vocab_size=400)
    lines.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(UserError, match="line 2 is broken JSON"):
        train_bpe(lines, vocab_size=400)


def test_record_texts():
    chat = {"conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}], "task": "t"}
    assert list(record_texts(chat)) == ["q", "a"]
    assert list(record_texts({"text": "x", "source": "s", "log_prob": -3.0})) == ["x"]
    assert list(record_texts({"instruction": "i", "input": "", "output": "o"})) == ["i", "", "o"]
    pair = {"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r"}
    assert list(record_texts(pair)) == ["p", "c", "r"]
    turns = {"conversation": [{"system": "s", "input": "i", "output": "o"}]}
    assert list(record_texts(turns)) == ["s", "i", "o"]


def test_bytes_per_token(tokenizer, sentences):
    assert [language_of(line) for line in ("hello", "你们好 hello", "hello hello 你", "12 + 3", "")] == [
        "en", "zh", "en", None, None
    ]  # fmt: skip
    table = bytes_per_token(tokenizer, [*sentences, "123\n"])
    assert list(table) == ["zh", "en"]
    for language, row in table.items():
        lines = [line for text in sentences for line in text.split("\n") if language_of(line) == language]
        n_tokens = sum(len(tokenizer.encode(line)) for line in lines)
        n_bytes = sum(len(line.encode()) for line in lines)
        assert row["bytes_per_token"] == n_bytes / n_tokens
        assert row["tokens"] == n_tokens
    assert bytes_per_token(tokenizer, []) == {}


@pytest.mark.parametrize(
    "text", ["春眠不觉晓" * 700, "x" * 2_500, " " * 2_500, "a " + "-=" * 1_200 + " end", "中 " * 2000]
)
def test_pieces_are_cut_at_a_length(text):
    """Parts are the text; no piece of one is longer than the limit; what has no such piece stays whole."""
    pattern = _PIECES.replace("{han}", "+")
    parts = list(without_long_pieces(text, pattern))
    assert "".join(parts) == text
    lengths = [len(piece.decode()) for part in parts for piece in cut(part, pattern)]
    assert max(lengths) <= MAX_PIECE_LEN + 1  # with the blank before it
    longest = max(len(piece.decode()) for piece in cut(text, pattern))
    assert len(parts) == -(-longest // MAX_PIECE_LEN)


def test_ordinary_text_is_not_cut(corpus):
    """Paragraphs of Chinese have no blanks, but their pieces end at punctuation."""
    pattern = _PIECES.replace("{han}", "+")
    for text in ("".join(corpus()), "你好，世界。" * 1000, "word " * 3000):
        assert list(without_long_pieces(text, pattern)) == [text]


def test_one_unbroken_run_of_characters_trains():
    """Both ways alike; 200,000 characters, whose square is 4e10, are some thousand times 200 pieces."""
    numbers = random.Random(0).choices(range(0x4E00, 0x4E00 + 60), k=200_000)
    text = "".join(map(chr, numbers))
    assert train_bpe(iter([text]), vocab_size=320).vocab_size == 320
    ours, theirs = (train_bpe(iter([text[:4_000]]), vocab_size=340, by_hand=by_hand) for by_hand in (True, False))
    assert ours.files == theirs.files
