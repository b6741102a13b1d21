"""What a grammar allows, against the slow obvious definition, for our tokenizers and foreign ones."""

import json
import random

import pytest
import torch

from minillm.errors import UserError
from minillm.serving.constraint import ConstraintMaker, TokenConstraint
from minillm.tokenizer import load_tokenizer, train_bpe, train_sentencepiece
from tests.foreign.layouts import make_tokenizer

pytest.importorskip("llguidance")

DOCUMENTS = ["the lazy dog", "the quick 狐狸", "12", "naïve 🙂", 'a "quoted" \\ line', "<think>", "小明有三个苹果"]
KINDS = ["ours", "sentencepiece", "llama2", "llama2_chatml", "mistral", "qwen3", "llama3", "glm4", "yi", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    """A tokenizer of each kind."""
    texts = (text for _ in range(30) for text in [*DOCUMENTS, '{"a": [1, 2]} fox\n'])
    if request.param == "ours":
        return train_bpe(texts, vocab_size=320)
    if request.param == "sentencepiece":
        pytest.importorskip("sentencepiece")
        return train_sentencepiece(texts, vocab_size=320)
    return load_tokenizer(make_tokenizer(request.param, tmp_path_factory.mktemp(request.param)))


def written(document):
    """Return a document as JSON writes it."""
    return json.dumps(document, ensure_ascii=False).encode()


def test_exactly_what_leads_to_a_document_is_allowed(tokenizer):
    """At every prefix of every document: a token is allowed only if a document goes on with its bytes."""
    constraint = ConstraintMaker(tokenizer).json({"enum": DOCUMENTS})
    vocab_size = tokenizer.vocab_size + 9  # padded embeddings
    documents = [written(document) for document in DOCUMENTS]
    table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    no_text = {*tokenizer.special_ids, *tokenizer.end_ids}
    for document in documents:
        place, done = constraint.copy(), b""
        while done != document:
            allowed = place.allowed(vocab_size).nonzero().flatten().tolist()
            for token in allowed:
                assert token < tokenizer.vocab_size
                assert token not in no_text
                assert table[token]
                assert any(other.startswith(done + table[token]) for other in documents), (done, table[token])
            fitting = [token for token in allowed if document[len(done) :].startswith(table[token])]
            assert fitting, (done, document)
            best = max(fitting, key=lambda token: len(table[token]))
            place.accept(best)
            done += table[best]
        ends = place.allowed(vocab_size).nonzero().flatten().tolist()
        assert sorted(ends) == sorted(tokenizer.end_ids)
        assert place.is_done


@pytest.mark.parametrize("seed", range(3))
def test_random_walks_end_in_json_of_the_schema(tokenizer, seed):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            "kind": {"enum": ["a", "小明"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    }
    constraint = ConstraintMaker(tokenizer).json(schema)
    rng, ids = random.Random(seed), []
    while True:
        allowed = constraint.allowed(tokenizer.vocab_size).nonzero().flatten().tolist()
        token = rng.choice(allowed)
        if token in tokenizer.end_ids:
            break
        ids.append(token)
        constraint.accept(token)
        assert len(ids) < 500
    value = json.loads(b"".join(map(tokenizer.token_bytes, ids)).decode())
    assert set(value) - {"tags"} == {"name", "age", "kind"}
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 120
    assert value["kind"] in ("a", "小明")
    assert all(tag in (True, False) for tag in value.get("tags", ()))


def test_copies_are_in_places_of_their_own(tokenizer):
    constraint = ConstraintMaker(tokenizer).json({"enum": ["x1", "y2"]})
    first, second = constraint.copy(), constraint.copy()
    while not first.is_done:
        first.accept(int(first.allowed(tokenizer.vocab_size).nonzero()[-1]))
    assert torch.equal(second.allowed(tokenizer.vocab_size), constraint.allowed(tokenizer.vocab_size))
    assert not second.is_done


def test_a_forced_call_is_one_of_the_tools(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer("qwen3", tmp_path))
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"],
                  "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("add", "mul")]
    constraint = ConstraintMaker(tokenizer).tool_call(tools)
    rng, texts = random.Random(0), set()
    for _ in range(12):
        place, text = constraint.copy(), b""
        while True:
            token = rng.choice(place.allowed(tokenizer.vocab_size).nonzero().flatten().tolist())
            if token in tokenizer.end_ids:
                break
            place.accept(token)
            text += tokenizer.token_bytes(token)
        texts.add(text.decode())
    call = '<tool_call>\n{{"name": "{}", "arguments": {{"n": {}}}}}\n</tool_call>'
    assert texts == {call.format(name, n) for name in ("add", "mul") for n in (1, 22)}


def test_a_grammar_that_fails_on_its_way_ends_the_answer(tmp_path):
    class Failed:
        """A matcher as it is behind an error: of all tokens it allows one that ends."""

        def compute_bitmask(self):
            bits = sum(1 << token for token in tokenizer.end_ids[:1])
            return bits.to_bytes(-(-tokenizer.vocab_size // 32) * 4, "little")

        is_stopped = is_accepting = staticmethod(lambda: False)

    tokenizer = load_tokenizer(make_tokenizer("qwen3", tmp_path))
    mask = TokenConstraint(Failed(), tokenizer).allowed(tokenizer.vocab_size + 3)
    assert mask.nonzero().flatten().tolist() == sorted(tokenizer.end_ids)


def test_what_cannot_be_kept_is_refused(tmp_path):
    maker = ConstraintMaker(load_tokenizer(make_tokenizer("gpt2", tmp_path)))
    for schema in ({"type": "nonsense"}, {"type": "object", "properties": 3}, {"$ref": "#/nowhere"}, {"$ref": "#"}):
        with pytest.raises(UserError, match="JSON schema cannot be used"):
            maker.json(schema)
    with pytest.raises(UserError, match="lacks <tool_call>"):
        maker.tool_call([{"name": "f"}])
