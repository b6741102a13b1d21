"""A document begins and ends with its tokenizer's own tokens, the same ones wherever documents are read or written."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import eval_model
import train_pretrain
from minillm.cli.arguments import PretrainArguments
from minillm.data import TextRows, read_records
from minillm.data.schema import Prompt
from minillm.evaluation import perplexity
from minillm.hub.huggingface import load_model
from minillm.hub.weights import create_model
from minillm.inference import samples
from minillm.inference.chat import ChatModel
from minillm.tokenizer import load_tokenizer
from tests.foreign.layouts import LAYOUTS, make_tokenizer
from tests.foreign.models import make_model

# What begins and ends a document: of MiniMind, as its own training writes; of Qwen, as its models were pretrained.
ENDS = {
    "llama2": ("<s>", "</s>"),
    "mistral": ("<s>", "</s>"),
    "metaspace_chatml": ("<s>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": ("<|endoftext|>", "<|endoftext|>"),
    "qwen3": ("<|endoftext|>", "<|endoftext|>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "minimind2": ("<|im_start|>", "<|im_end|>"),
    "minimind3": ("<|im_start|>", "<|im_end|>"),
}
TEXTS = ["The quick brown fox has 12 apples.", "小明有三个苹果。", "kamo rite lunsa", "a"]
RUN = ["--device", "cpu", "--num_threads", "1", "--dtype", "float32", "--max_seq_len", "96", "--batch_size", "4"]
RUN += ["--max_steps", "1", "--learning_rate", "1e-12", "--save_interval", "0"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ENDS)
def test_which_tokens_they_are(layout, tmp_path):
    directory = make_tokenizer(layout, tmp_path / "t")
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    begin, end = (ours.token_id(name) for name in ENDS[layout])
    assert ours.document([7, 8]) == [begin, 7, 8, end]
    assert ours.open_document([7, 8]) == [begin, 7, 8]
    if LAYOUTS[layout].bos is not None:
        assert (theirs.bos_token_id, theirs.eos_token_id) == (begin, end)
    if LAYOUTS[layout].adds_bos:  # where transformers begins a text by itself, it begins so
        assert theirs(TEXTS[0]).input_ids == ours.open_document(ours.encode(TEXTS[0]))
    assert {end, theirs.eos_token_id} <= set(ours.end_ids)


def transformers_loss(directory, layout) -> float:
    """Return nats per token of the texts, one after the other, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    begin, end = tokenizer.convert_tokens_to_ids(list(ENDS[layout]))
    loss_sum = n_targets = 0
    for text in TEXTS:
        ids = torch.tensor([[begin, *tokenizer(text, add_special_tokens=False).input_ids, end]])
        with torch.no_grad():
            loss_sum += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        n_targets += ids.shape[1] - 1
    return loss_sum / n_targets


@pytest.mark.parametrize("layout", ["mistral", "llama3", "qwen2", "deepseek", "minimind3"])
def test_validation_perplexity_and_transformers_agree(layout, texts, tmp_path):
    directory = make_model("llama", layout, tmp_path / "base")
    argv = ["--save_dir", str(tmp_path / "out"), "--from_weight", str(directory), "--data_path", str(texts)]
    result = train_pretrain.main([*argv, "--valid_path", str(texts), "--packing", "best_fit", *RUN])
    expected = transformers_loss(directory, layout)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    model, tokenizer = load_model(tmp_path / "out" / "pretrain_32"), load_tokenizer(tmp_path / "out" / "pretrain_32")
    measured = perplexity(model, read_records(texts), tokenizer)
    assert measured.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert measured.n_targets == result["n_targets"]


@pytest.mark.parametrize("packing", ["stream", "best_fit", "none"])
def test_rows_hold_both_tokens_of_every_document(packing, texts, tmp_path):
    tokenizer = load_tokenizer(make_tokenizer("deepseek", tmp_path / "t"))
    rows = TextRows(texts, tokenizer, max_seq_len=7, packing=packing, cache_dir=tmp_path / "c")
    inputs = [i for row in range(len(rows)) for i in rows[row]["input_ids"].tolist()]
    targets = [i for row in range(len(rows)) for i in rows[row]["targets"].tolist()]
    assert inputs.count(tokenizer.bos_token_id) == targets.count(tokenizer.eos_token_id) == len(TEXTS)
    assert tokenizer.eos_token_id not in inputs  # nothing is predicted across the end of a document
    assert tokenizer.bos_token_id not in targets
    if packing == "stream":
        whole = [tokenizer.document(tokenizer.encode(text)) for text in TEXTS]
        assert inputs == [i for ids in whole for i in ids[:-1]]
        assert targets == [i for ids in whole for i in ids[1:]]


@pytest.mark.parametrize("layout", ["llama3", "minimind3"])
def test_completion_and_samples_begin_like_a_document(layout, texts, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(make_tokenizer(layout, tmp_path / "t"))
    ids = tokenizer.encode(TEXTS[0])
    chat_model = ChatModel(model=None, tokenizer=tokenizer, completes_text=True)
    prompt = eval_model.encode_prompt(SimpleNamespace(model_mode=0), chat_model, Prompt(content=TEXTS[0]))
    assert prompt == tokenizer.document(ids)[:-1]
    seen = {}

    def generate(model, prompts, **options):
        seen.update(options, prompts=prompts)
        return [[5]] * len(prompts)

    monkeypatch.setattr(samples, "generate", generate)
    samples.sample_completions(None, tokenizer, [str(texts)], n_samples=1)
    assert seen["prompts"] == [tokenizer.document(ids[: len(ids) // 4])[:-1]]
    assert set(seen["eos_token_id"]) == set(tokenizer.end_ids)


@pytest.mark.parametrize("layout", ["mistral", "qwen2", "minimind3"])
def test_a_new_model_knows_the_tokens_of_its_tokenizer(layout, tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(layout, tmp_path / "t"))
    args = PretrainArguments(data_path="-", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=1)  # fmt: skip
    config = create_model(args, tokenizer).config
    assert (config.bos_token_id, config.eos_token_id) == tuple(map(tokenizer.token_id, ENDS[layout]))


def test_odd_kinds_are_groups_like_any_other(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer("gpt2", tmp_path / "t"))
    model = load_model(make_model("llama", "gpt2", tmp_path / "m"))
    kinds = [["a"], "a", 1, True, {"b": None}, None, ["a"]]
    result = perplexity(model, [{"text": "kamo", "kind": kind} for kind in kinds], tokenizer)
    assert {name: part.n_texts for name, part in result.by_kind.items()} == {
        '["a"]': 2, "a": 1, "1": 1, "true": 1, '{"b": null}': 1,
    }  # fmt: skip
    assert result.table().count("\n") == 6
    assert list(result.as_dict()["by_kind"]) == sorted(result.by_kind)
