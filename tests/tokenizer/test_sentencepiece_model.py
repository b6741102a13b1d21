"""tokenizer.model without a tokenizer.json: ids of SentencePiece itself and of transformers."""

import io
import json

import pytest

from minillm.errors import UserError
from minillm.tokenizer import encode_chat, has_tokenizer, load_tokenizer
from tests.foreign.layouts import CHATML_WITH_BOS, sample_texts

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

HARD = [
    "", " ", "  ", "   ", "a", " a", "  a  b   ", "Hi, hello!\n\n  user\tanswer \n", "\n", "\r\n", "12345 apples",
    "小明有三个苹果，小红有12个梨。", "你好\u3000世界", "龘靐齉", "😀👩\u200d👩\u200d👧 🇨🇳", "é e\u0301 ﬁ ½",
    "\u00a0x\u2003y",
    "\u0000\u0001", "<s>", "</s> <unk> [PAD]", "<0x0A>", "ka mo ri te lun sa pe dor vi gan", "aaaa aaa aa a",
    "def add(a, b):\n    return a + b  # 加法\n", "The quick brown fox" * 30, "ۖ القرآن עברית", "\ufeffbom", "▁a ▁",
]  # fmt: skip
MODELS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "split_digits": True},
    "runs of spaces": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                       "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "no space before": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                        "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "unknown characters": {"model_type": "bpe", "byte_fallback": False},
    "bpe, nfkc": {"model_type": "bpe", "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram, identity": {"model_type": "unigram", "normalization_rule_name": "identity",
                          "remove_extra_whitespaces": False, "byte_fallback": True},
    "unigram, unknown characters": {"model_type": "unigram", "byte_fallback": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Call it with a name of ``MODELS``: SentencePiece's model as bytes."""
    made = {}

    def models(name, **more):
        key = name + str(more)
        if key not in made:
            file = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in sample_texts() for line in text.splitlines() if line.strip()),
                model_writer=file, vocab_size=700, hard_vocab_limit=False, minloglevel=2, num_threads=1,
                character_coverage=0.98, **(MODELS[name] | more),
            )  # fmt: skip
            made[key] = file.getvalue()
        return made[key]

    return models


def directory_of(content, path, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(content)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(models, tmp_path, name):
    ours = load_tokenizer(directory_of(models(name), tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=models(name))
    assert ours.vocab_size == len(theirs)
    for text in HARD:
        if not (name.startswith("unigram") and "<0x" in text):  # a unigram model of tokenizers finds its byte pieces
            assert ours.encode(text) == theirs.encode(text), repr(text)
    assert {len(ours.encode(text)) for text in HARD} != {0, 1}
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("name", ["llama", "no space before"])
def test_a_text_comes_back(models, tmp_path, name):
    ours = load_tokenizer(directory_of(models(name), tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=models(name))
    for text in HARD:
        if "\u2581" not in text:
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_those_of_transformers(models, tmp_path, legacy):
    """transformers makes its own merges of the same pieces, and opens what we save."""
    from transformers.convert_slow_tokenizer import generate_merges

    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True,
    }  # fmt: skip
    path = directory_of(models("llama"), tmp_path / "theirs", tokenizer_config=settings)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=models("llama"))
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
    merges = generate_merges({piece: i for i, piece in enumerate(scores)}, scores)
    theirs = transformers.LlamaTokenizer(vocab={piece: i for i, piece in enumerate(scores)}, merges=merges)
    ours = load_tokenizer(path)
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [text for text in HARD if "<" not in text]:
        ids = ours.encode(text)
        # Their class puts no space before a text that begins with one; SentencePiece does, and "legacy" with it.
        if not (legacy and text[:1] in (" ", "▁")):
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ids == saved(text, add_special_tokens=False)["input_ids"], repr(text)
        assert [ours.bos_token_id, *ids] == saved(text)["input_ids"]
    assert load_tokenizer(tmp_path / "saved").encoding_hash == ours.encoding_hash


@pytest.mark.parametrize("form", ["older", "newer"])
def test_added_tokens(models, tmp_path, form):
    """They follow the pieces; the chat format uses them as single tokens."""
    n = len(sentencepiece.SentencePieceProcessor(model_proto=models("llama")))
    names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML_WITH_BOS}
    settings["additional_special_tokens"] = names[:2]
    if form == "older":
        files = {"added_tokens": {name: n + i for i, name in enumerate(names)}, "tokenizer_config": settings}
    else:
        entries = {str(n + i): {"content": name, "special": i < 2, "normalized": False} for i, name in enumerate(names)}
        files = {"tokenizer_config": settings | {"added_tokens_decoder": entries}}
    ours = load_tokenizer(directory_of(models("llama"), tmp_path / "model", **files))
    assert [ours.token_id(name) for name in names] == [n, n + 1, n + 2, n + 3]
    assert ours.special_ids >= {0, 1, 2, n, n + 1}
    assert not ours.special_ids & {n + 2, n + 3}
    assert ours.eos_token_id == n + 1
    messages = [{"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello!"}]
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids, mask = encode_chat(ours, messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert ours.decode(targets).strip() == "Hello!<|im_end|>"


def test_user_defined_pieces_are_single_tokens(models, tmp_path):
    content = models("llama", user_defined_symbols=["<sep>"])
    ours = load_tokenizer(directory_of(content, tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert ours.token_id("<sep>") == theirs.piece_to_id("<sep>")
    assert ours.token_id("<sep>") not in ours.special_ids


def test_bad_files(models, tmp_path):
    def reason(content, **files):
        path = directory_of(content, tmp_path / f"case{len(list(tmp_path.iterdir()))}", **files)
        assert has_tokenizer(path)
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        return str(error.value)

    content = models("llama")
    assert "is not a SentencePiece model" in reason(b"")
    assert "is not a SentencePiece model" in reason(content[: len(content) // 2])
    assert "is not a SentencePiece model" in reason(b"IQ== 0\nIg== 1\n")  # Llama 3's file of the same name
    words = models("llama", model_type="char")
    assert "only BPE and unigram models" in reason(words)
    n = len(sentencepiece.SentencePieceProcessor(model_proto=content))
    assert f"has {n} pieces, and the added tokens next to it leave out the id {n}" in reason(
        content, added_tokens={"<x>": n + 1}
    )
    assert f"leave out the id {n}" in reason(content, added_tokens={"<x>": 10**12})
    for files in (
        {"added_tokens": {"<x>": "y"}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<x>"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {str(n): {}}}},
        {"tokenizer_config": {"added_tokens_decoder": {str(n): "<x>"}}},
        {"tokenizer_config": {"additional_special_tokens": [["<x>"]]}},
    ):
        assert "are damaged" in reason(content, **files)
    assert "as token 5, and the files next to it '<x>'" in reason(content, added_tokens={"<x>": 5})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.model").write_bytes(content)
    (tmp_path / "broken" / "added_tokens.json").write_text("{")
    with pytest.raises(UserError, match=r"added_tokens.json next to .* is broken JSON"):
        load_tokenizer(tmp_path / "broken")
    with pytest.raises(UserError, match=r"there is no tokenizer.json or tokenizer.model in it"):
        load_tokenizer(tmp_path)
