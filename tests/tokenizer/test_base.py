import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_bpe

TEXT = st.text(max_size=40) | st.text("ab 1\n\t\r 中文。<|im_end|>'s😀\u200d\ufe0f", max_size=60)
HARD = [
    "",
    " ",
    "\n",
    "  \n \n\n  ",
    "\r\n\r\n",
    "\ttab\u00a0nbsp\u3000全角空格",
    "naïve café e\u0301 ÅÉ",
    "👩‍👩‍👧‍👦 ❤️ 🇨🇳 x😀y",
    "mixed中文and English混排123中4文",
    "    def f(x):\n\treturn x ** 2\n",
    "<|im_end|><|endoftext|><think></think>",
    "\x00\x01\x7f\u200b\ufeff\uffff",
    "٣٤٥ Ⅻ ½ 〇 ² ๑",
    "العربية हिन्दी 한국어 日本語カナ ไทย",
]


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_decode_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT, TEXT)
@settings(max_examples=300, deadline=None)
def test_part_by_part_equals_the_whole_at_newlines(tokenizer, first, second):
    parts = [tokenizer.encode(part) for part in (first, "\n", second)]
    assert len(parts[1]) == 1
    assert tokenizer.encode(first + "\n" + second) == [*parts[0], *parts[1], *parts[2]]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode("utf-8")
    assert not set(ids) & set(range(32)), "text that looks like a special token stays text"


@pytest.mark.parametrize("text", HARD)
def test_ids_equal_transformers(tokenizer, theirs, text):
    if "<|" not in text:  # there transformers parses what we keep as text
        assert theirs(text, add_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_encode_batch(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(text for text in ["a", "b"]) == [
        tokenizer.encode("a"),
        tokenizer.encode("b"),
    ]


@pytest.mark.parametrize("bad", ["a\ud800b", None, 3, b"bytes"])
def test_what_has_no_utf8_form_is_named(tokenizer, bad):
    for call in (lambda: tokenizer.encode(bad), lambda: tokenizer.encode_batch(["fine", bad])):
        with pytest.raises(UserError, match=r"surrogate U\+D800|cannot tokenise"):
            call()


def test_special_tokens_have_the_promised_ids(tokenizer, loaded):
    for t in (tokenizer, loaded):
        assert [t.token_id(name) for name in SPECIAL_TOKENS] == list(range(11))
        assert [t.token_id(f"<|spare_{n}|>") for n in range(21)] == list(range(11, 32))
        assert (t.eos_token_id, t.bos_token_id, t.pad_token_id, t.im_start_id, t.im_end_id) == (0, 0, 0, 1, 2)
        assert not t.has_token("<|spare_21|>")
    with pytest.raises(UserError, match="no token '<nothing>'"):
        tokenizer.token_id("<nothing>")


def test_decode_never_fails_on_partial_bytes(tokenizer):
    for byte_id in range(32, 288):
        tokenizer.decode([byte_id])
    pieces = [i for i in range(32, 288) if tokenizer.token_bytes(i) in (b"\xe4", b"\xb8")]
    assert len(pieces) == 2
    assert "\ufffd" in tokenizer.decode(pieces[:1])
    assert tokenizer.decode([pieces[0], tokenizer.vocab_size, tokenizer.vocab_size + 99]) == "\ufffd"  # padding
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([-1])


def test_every_byte_has_one_id(tokenizer):
    assert sorted(tokenizer.token_bytes(i) for i in range(32, 288)) == [bytes([b]) for b in range(256)]


def test_skip_special_tokens_keeps_tags(tokenizer, theirs):
    ids = [1, *tokenizer.encode("hi"), 3, 4, 12, 2, 0]
    assert tokenizer.decode(ids) == "<|im_start|>hi<think></think><|spare_1|><|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<think></think>"
    assert theirs.decode(ids, skip_special_tokens=True) == "hi<think></think>"
    assert tokenizer.special_ids == frozenset([0, 1, 2, *range(11, 32)])


def test_save_and_load(tokenizer, loaded, saved, tmp_path):
    assert sorted(p.name for p in saved.iterdir()) == sorted(tokenizer.files)
    assert loaded.content_hash == tokenizer.content_hash
    assert len(loaded.content_hash) == 64
    loaded.save(tmp_path / "deep" / "copy")
    for name in tokenizer.files:
        assert (tmp_path / "deep" / "copy" / name).read_bytes() == (saved / name).read_bytes()
    assert load_tokenizer(saved / "tokenizer.json").content_hash == tokenizer.content_hash
    assert pickle.loads(pickle.dumps(loaded)).encode("中文 abc") == tokenizer.encode("中文 abc")


def test_transformers_opens_the_directory(tokenizer, theirs):
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.get_vocab() == tokenizer._full.get_vocab()
    assert theirs.eos_token == theirs.bos_token == theirs.pad_token == "<|endoftext|>"
    assert theirs.unk_token is None
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.im_end_id
    assert theirs.chat_template.strip() == tokenizer.files["chat_template.jinja"].strip()


def test_transformers_saves_what_we_open(theirs, tokenizer, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("Don't 你好 12\n") == tokenizer.encode("Don't 你好 12\n")
    assert again.content_hash == tokenizer.content_hash


def test_load_errors(tmp_path, saved):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="broken JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    for text, words in (("{", "broken JSON"), ("[]", "not a JSON object")):
        (tmp_path / "special_tokens_map.json").write_text(text)
        with pytest.raises(UserError, match=rf"special_tokens_map\.json .*{words}"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path)


def test_save_into_what_is_no_directory(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        tokenizer.save(tmp_path / "file" / "tokenizer")
    with pytest.raises(UserError, match="cannot write"):
        tokenizer.save(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_foreign_byte_level_directory(corpus, tmp_path):
    """As Qwen's: control tokens outside the model's vocabulary, no <|endoftext|> here, a normaliser."""
    spec = json.loads(train_bpe(corpus(), vocab_size=300).files["tokenizer.json"])
    vocab = {token: n - 11 for token, n in spec["model"]["vocab"].items() if n >= 11}
    spec["model"]["vocab"] = vocab
    spec["normalizer"] = {"type": "NFC"}
    added = spec["added_tokens"][0]
    names = ["</s>", "<|im_start|>", "<|im_end|>"]
    spec["added_tokens"] = [added | {"id": len(vocab) + n, "content": c} for n, c in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    foreign = load_tokenizer(tmp_path)
    assert (foreign.vocab_size, foreign.eos_token_id, foreign.bos_token_id) == (292, 289, 289)
    assert (foreign.im_start_id, foreign.im_end_id) == (290, 291)
    assert foreign.decode(foreign.encode("<|im_start|>hi")) == "<|im_start|>hi"
    assert foreign.token_bytes(291) == b"<|im_end|>"
    assert 290 not in foreign.encode("<|im_start|>hi")
    assert foreign.encode("e\u0301") == foreign.encode("\u00e9")


def test_foreign_sentencepiece_style(tmp_path):
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [], "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "merges": [],
                  "vocab": {"<unk>": 0, "a": 1, "▁": 2, "<0xC3>": 3, "<0xA9>": 4}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    foreign = load_tokenizer(tmp_path)
    assert foreign.encode("a aé") == [1, 2, 1, 3, 4]
    assert foreign.decode([1, 2, 1, 3, 4]) == "a aé"
    assert [foreign.token_bytes(i) for i in (1, 2, 3)] == [b"a", b" ", b"\xc3"]
    with pytest.raises(UserError, match=r"has no '<.endoftext.>'"):
        _ = foreign.eos_token_id


def test_foreign_byte_level_token_that_is_no_bytes(tmp_path):
    """A token with characters outside of the byte alphabet is meant as it stands; so the library decodes it too."""
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "added_tokens": [],
        "normalizer": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "merges": [], "vocab": {"a": 0, "Ġ": 1, "\n": 2, "果": 3, "<0xZZ>": 4}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    foreign = load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert foreign.decode([0, 1, 2, 3, 4]) == library.decode([0, 1, 2, 3, 4]) == "a \n果<0xZZ>"
    spec["model"]["vocab"]["b"] = 1 << 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="has 2147483649 ids"):
        load_tokenizer(tmp_path).token_bytes(0)


def test_settings_that_name_no_token(saved, tmp_path):
    files = load_tokenizer(saved).files
    settings = json.loads(files["tokenizer_config.json"]) | {"bos_token": [], "pad_token": {"content": 5}}
    foreign = Tokenizer(files | {"tokenizer_config.json": json.dumps(settings)})
    assert foreign.bos_token_id == foreign.pad_token_id == foreign.eos_token_id
