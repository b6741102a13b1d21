"""The same ids as SentencePiece itself; the tests of test_base.py and test_chat.py run on this tokenizer too."""

import json
import random
import re
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.inference.text import TextDecoder
from minillm.tokenizer import bytes_per_token, load_tokenizer, train_sentencepiece
from minillm.tokenizer.sentencepiece_bpe import (
    MAX_LINE,
    convert_sentencepiece,
    sentencepiece_model,
)

sentencepiece = pytest.importorskip("sentencepiece")

PLAIN = [
    "",
    " ",
    "   ",
    "The quick brown fox has 12 apples.",
    "  blanks leading and  inside   and trailing   ",
    "小明有三个苹果，小红有12个梨。",
    "用Python写 hello, 共12行 中 文",
    "    def f(x):\n\treturn x ** 2  # 加法\n\n",
    "\ttabs\t\tinside\t",
    "a\r\nb\r\n\n",
    "👩‍👩‍👧‍👦 ❤️ 🇨🇳 x😀y",
    "العربية हिन्दी 한국어 日本語カナ ไทย",
    "naïve café e\u0301 ÅÉ \u00a0\u3000\ufeff\x00\x01\x7f\uffff",
    "<|im_end|><|im_start|>user\n<think>1</think><0x41><unk>",
]
LETTERS = st.text("ab 1\n\t\r 中文。有个<|im_end|>'s😀ё", max_size=60) | st.text(max_size=40)


@pytest.fixture(scope="module")
def model(corpus):
    return sentencepiece_model(corpus(), vocab_size=600)


@pytest.fixture(scope="module")
def reference(model):
    """SentencePiece's own encoder and decoder."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_training_is_deterministic_and_is_the_model_converted(tokenizer, model, corpus):
    assert sentencepiece_model(corpus(), vocab_size=600) == model
    assert convert_sentencepiece(model).files == tokenizer.files
    assert tokenizer.vocab_size == 600


@pytest.mark.parametrize("text", PLAIN)
def test_ids_equal_sentencepiece_and_transformers(loaded, reference, theirs, text):
    ids = reference.encode(text)
    assert loaded.encode(text) == ids
    assert loaded.decode(ids) == reference.decode(ids) == text
    assert theirs.decode(ids) == text
    if "<|" not in text:  # transformers parses what we keep as text
        assert theirs(text)["input_ids"] == ids


def test_ids_equal_sentencepiece_on_the_corpus(tokenizer, reference, corpus):
    texts = list(corpus())
    whole = "".join(texts)
    assert tokenizer.encode_batch([*texts, whole]) == reference.encode([*texts, whole])
    assert len(tokenizer.encode(whole)) < len(whole.encode()) / 2, "merges are made"


@given(LETTERS)
@settings(max_examples=300, deadline=None)
def test_ids_equal_sentencepiece_on_any_text(tokenizer, reference, text):
    text = text.replace("\u2581", "")  # SentencePiece's own sign for a blank
    assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.filterwarnings("ignore:the text gave only")
def test_the_sign_for_a_blank_comes_back_as_itself(tokenizer, reference):
    text = "a\u2581b \u2581 \u2585"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert reference.decode(reference.encode(text)) == "a b   \u2585", "why our vocabulary holds true blanks"
    # ... in the training text as well
    marked = train_sentencepiece(iter(["a\u2581b c\x01d\x00e\u2585f\n"] * 9), vocab_size=300)
    assert not any("\u2581" in marked.token_bytes(i).decode("utf-8", "ignore") for i in range(marked.vocab_size))


@pytest.fixture(scope="module")
def repetitive():
    """Periodic words: many pairs make the same piece (``ab a``, ``a ba``)."""
    draw = random.Random(3)
    words = ["".join(draw.choices(["a", "b", "ab", "aba", "aab"], k=draw.randint(1, 6))) for _ in range(400)]
    model = sentencepiece_model(iter([" ".join(words)]), vocab_size=480)
    return convert_sentencepiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)


def test_ids_equal_sentencepiece_where_many_pairs_make_one_piece(repetitive):
    ours, reference = repetitive
    draw = random.Random(4)
    texts = ["".join(draw.choices("aaabbb ", k=draw.randint(1, 40))) for _ in range(5000)]
    assert ours.encode_batch(texts) == reference.encode(texts)


def test_pieces_keep_to_their_word_and_digits_and_newlines_stand_alone(tokenizer):
    for i in range(288, tokenizer.vocab_size):
        piece = tokenizer.token_bytes(i).decode()
        assert re.fullmatch(r" ?[^ \n\r]+| +", piece)
        assert not re.search("[0-9]", piece) or len(piece) == 1
        assert len(piece) <= 16
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a 12\n\n3")] == ["a", " ", "1", "2", "\n", "\n", "3"]


def test_split_han_and_longest_token(corpus):
    text = ["中华人民共和国成立了 internationalisation\n"] * 50
    free = train_sentencepiece(iter(text), vocab_size=330)
    assert len(free.encode("中华人民共和国成立了")) == 1
    split = train_sentencepiece(iter(text), vocab_size=320, split_han=True)
    assert len(split.encode("中华人民共和国成立了")) == 10
    assert len(split.encode(" internationalisation")) <= 3
    short = train_sentencepiece(iter(text), vocab_size=310, max_token_length=4)
    assert max(len(short.token_bytes(i).decode()) for i in range(267, short.vocab_size)) == 4
    long = train_sentencepiece(iter(["q" * 64 + "\n"] * 4), vocab_size=275, max_token_length=None)
    assert len(long.encode("q" * 64)) == 1
    for wrong in (0, 513):
        with pytest.raises(UserError, match=f"max_token_length is {wrong}; give 1 to 512"):
            train_sentencepiece(corpus(), vocab_size=300, max_token_length=wrong)


@pytest.mark.filterwarnings("ignore:the text gave only")
def test_frequent_characters_get_ids_and_leave_half_the_room(corpus):
    """A vocabulary smaller than the characters of the text: SentencePiece alone would refuse it."""
    small = train_sentencepiece(corpus(), vocab_size=300)
    single = [i for i in range(267, 300) if len(small.token_bytes(i).decode()) == 1]
    assert len(single) == (300 - 267) // 2
    assert small.encode(" ")[0] in single
    covered = train_sentencepiece(corpus(), vocab_size=600, character_coverage=0.5)
    assert len(covered.encode("梨")) == 3
    for tokenizer in (small, covered):
        assert tokenizer.decode(tokenizer.encode("梨 has 12 apples 世界\n")) == "梨 has 12 apples 世界\n"
    with pytest.raises(UserError, match="character_coverage is 0"):
        train_sentencepiece(corpus(), vocab_size=300, character_coverage=0)


def test_blanks_have_an_id_whatever_the_text():
    model = sentencepiece_model(iter(["水果\n"] * 3), vocab_size=270)
    ours, reference = convert_sentencepiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours.encode(" 水 ") == reference.encode(" 水 ")
    assert len(ours.encode(" ")) == 1


@pytest.mark.filterwarnings("ignore:the text gave only")
def test_very_long_lines_are_learned_from():
    """SentencePiece leaves out lines of 4,192 bytes, and ends the process at words of 65,536 characters."""
    line = "天地人" * 25_000
    tokenizer = train_sentencepiece(iter([line]), vocab_size=400)
    assert len(tokenizer.encode("天地人" * 8)) < 8
    assert MAX_LINE < 65_536
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_streaming_shows_whole_characters(tokenizer):
    text = "naïve 👩‍👩‍👧 你好，ไทย  x\n\ty"
    ids = tokenizer.encode(text)
    decoder = TextDecoder(tokenizer)
    shown = [decoder.push(i) for i in ids]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert shown.count("") > 10, "byte tokens wait for the rest of their character"


@given(st.lists(st.integers(0, 599), max_size=12))
@settings(max_examples=300, deadline=None)
def test_streaming_equals_decode_for_any_ids(tokenizer, ids):
    decoder = TextDecoder(tokenizer)
    shown = "".join(decoder.push(i) for i in [*ids, *tokenizer.encode("a")])
    assert shown == tokenizer.decode([*ids, *tokenizer.encode("a")], skip_special_tokens=True)


def test_broken_characters_read_as_everywhere_else(tokenizer):
    start = [32 + byte for byte in "你".encode()[:2]]
    assert tokenizer.decode([*start, *tokenizer.encode("a")]) == "\ufffda", "one sign for one broken character"


def test_special_tokens_never_come_out_of_text(tokenizer, reference):
    assert [reference.is_control(i) or reference.is_unknown(i) for i in range(33)] == [True] * 32 + [False]
    for i in range(32):
        assert not set(tokenizer.encode(tokenizer.decode([i]))) & set(range(32))


@pytest.mark.parametrize("vocab_size", [-1, 0, 100, 267])
def test_too_small_a_vocabulary_is_refused(corpus, vocab_size):
    with pytest.raises(UserError, match=rf"vocab_size {vocab_size} is too small: .* \+ a character are 268"):
        train_sentencepiece(corpus(), vocab_size=vocab_size)


@pytest.mark.parametrize("vocab_size", [268, 269, 511, 512])
def test_smallest_vocabularies(corpus, vocab_size):
    tokenizer = train_sentencepiece(corpus(), vocab_size=vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.has_token("<|spare_20|>") == (vocab_size >= 512)
    assert tokenizer.decode(tokenizer.encode("hi 你好\n")) == "hi 你好\n"


@pytest.mark.parametrize("texts", [[], [""], ["\n", "\r\n"]])
def test_no_text(texts):
    with pytest.raises(UserError, match="no text to train on"):
        train_sentencepiece(iter(texts), vocab_size=300)


def test_texts_must_be_text():
    with pytest.raises(UserError, match="cannot train on int"):
        train_sentencepiece(iter(["a", 3]), vocab_size=300)


def test_too_little_text_warns_and_keeps_what_there_is(corpus):
    with pytest.warns(UserWarning, match=r"gave only \d+ of 5000 tokens"):
        tokenizer = train_sentencepiece(iter(["abc abc abc"]), vocab_size=5000)
    assert 288 < tokenizer.vocab_size < 310
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_sentencepiece(corpus(), vocab_size=400)


def test_without_the_package_the_error_says_how_to_get_it(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install sentencepiece  .*pip install -e '\.\[tokenizer\]'"):
        train_sentencepiece(corpus(), vocab_size=300)


def test_what_is_saved_needs_no_sentencepiece(saved, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    loaded = load_tokenizer(saved)
    assert loaded.decode(loaded.encode("你好 fox\n")) == "你好 fox\n"
    spec = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["model"]["byte_fallback"] is True
    assert set(bytes_per_token(loaded, corpus())) == {"zh", "en"}


def test_files(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("".join(corpus()), encoding="utf-8")
    from_file = train_sentencepiece(tmp_path / "a.txt", vocab_size=400)
    assert from_file.files == train_sentencepiece(corpus(), vocab_size=400).files
    with pytest.raises(UserError, match="not a file"):
        train_sentencepiece(["some text of mine"], vocab_size=400)
