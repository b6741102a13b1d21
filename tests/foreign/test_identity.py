"""What decides ids, rows or a frozen model's numbers is part of every key: two formats never share a cache."""

import json
import math
import shutil

import pytest

import train_dpo
import train_sft
from minillm.data import ChatRows, TextRows
from minillm.errors import UserError
from minillm.hub.huggingface import load_model
from minillm.hub.weights import check_tokenizer
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat, load_tokenizer
from tests.foreign.layouts import CHATML, CHATML_WITH_SYSTEM, make_tokenizer
from tests.foreign.models import make_model

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
RUN = ["--device", "cpu", "--num_threads", "1", "--dtype", "float32", "--max_seq_len", "96", "--batch_size", "2"]
RUN += ["--max_steps", "1", "--log_interval", "1"]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path / "chats.jsonl", {"messages": TALK}, {"messages": TALK[:1] * 2 + TALK[1:]})


@pytest.fixture
def pairs(tmp_path):
    sides = [[{"role": "assistant", "content": text}] for text in ("Hello! fox", "kamo")]
    return write(tmp_path / "pairs.jsonl", *(
        {"prompt": f"Hi {n}", "chosen": sides[0], "rejected": sides[1]} for n in range(6)
    ))  # fmt: skip


def test_two_templates_with_one_tokenizer_file_share_no_conversations(chats, tmp_path):
    plain, told = (
        load_tokenizer(make_tokenizer("qwen2", tmp_path / name, template=template))
        for name, template in (("plain", CHATML), ("told", CHATML_WITH_SYSTEM))
    )
    assert plain.content_hash == told.content_hash
    rows = [ChatRows(chats, t, max_seq_len=99, packing="none", cache_dir=tmp_path / "c") for t in (plain, told, plain)]
    for tokenizer, each in zip((plain, told, plain), rows, strict=True):
        ids, _ = encode_chat(tokenizer, TALK)
        assert each[0]["input_ids"].tolist() == ids[: len(each[0]["input_ids"])]
    assert rows[0].data_hash == rows[2].data_hash != rows[1].data_hash
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_texts_follow_the_tokens_around_them_and_no_template(tmp_path):
    texts = write(tmp_path / "texts.jsonl", {"text": "kamo rite"}, {"text": "fox"})
    settings = [{}, {"template": CHATML}, {"eos_token": "<|end_of_text|>"}, {"bos_token": "<|end_of_text|>"}]
    tokenizers = [
        load_tokenizer(make_tokenizer("llama3", tmp_path / str(number), **each)) for number, each in enumerate(settings)
    ]
    assert len({tokenizer.content_hash for tokenizer in tokenizers}) == 1
    rows = [TextRows(texts, each, max_seq_len=99, packing="none", cache_dir=tmp_path / "c") for each in tokenizers]
    for tokenizer, each in zip(tokenizers, rows, strict=True):
        assert each[0]["input_ids"].tolist() == tokenizer.open_document(tokenizer.encode("kamo rite"))
        assert each[0]["targets"].tolist()[-1] == tokenizer.eos_token_id
    assert rows[0].data_hash == rows[1].data_hash  # nothing is tokenised again
    assert len({each.data_hash for each in rows}) == 3
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_the_template_counts_wherever_it_lies(tmp_path):
    apart = make_tokenizer("qwen2", tmp_path / "apart")
    inside = tmp_path / "inside"
    shutil.copytree(apart, inside)
    template = (inside / "chat_template.jinja").read_text(encoding="utf-8")
    settings = json.loads((inside / "tokenizer_config.json").read_text(encoding="utf-8"))
    (inside / "chat_template.jinja").unlink()
    assert load_tokenizer(inside).encoding_hash != load_tokenizer(apart).encoding_hash
    (inside / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
    assert load_tokenizer(inside).encoding_hash == load_tokenizer(apart).encoding_hash
    settings |= {"chat_template": template, "eos_token": "<|endoftext|>"}
    (inside / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(inside).encoding_hash != load_tokenizer(apart).encoding_hash


def test_a_tokenizer_in_another_format_is_noted_and_one_of_other_ids_refused(tmp_path, capsys):
    base = make_model("llama", "qwen2", tmp_path / "base")
    model = load_model(base)
    capsys.readouterr()
    check_tokenizer(load_tokenizer(base), model, base)
    assert capsys.readouterr().err == ""
    other = make_tokenizer("qwen2", tmp_path / "other", template=CHATML, bos_token="<|im_start|>")
    check_tokenizer(load_tokenizer(other), model, base)
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert all(word in note for word in ("another chat template", "other tokens around a document", str(other)))
    with pytest.raises(UserError, match="differs from the one next to"):
        check_tokenizer(load_tokenizer(make_tokenizer("llama3_chatml", tmp_path / "third")), model, base)


def test_a_run_is_not_resumed_with_another_template(chats, tmp_path, capsys):
    base = make_model("llama", "qwen2", tmp_path / "base")
    argv = ["--save_dir", str(tmp_path / "out"), "--from_weight", str(base), "--data_path", str(chats), *RUN]
    train_sft.main(argv)
    train_sft.main([*argv, "--from_resume"])
    (base / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_sft.main([*argv, "--from_resume"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --from_resume")
    assert "the chat template changed" in error


def test_a_cached_reference_is_that_of_this_configuration(pairs, tmp_path):
    """The same weights, read with other positions, are another model: with its own numbers step 0 is ln 2."""
    base = make_model("llama", "qwen2", tmp_path / "base")
    argv = ["--save_dir", str(tmp_path / "out"), "--from_weight", str(base), "--data_path", str(pairs), *RUN]
    for more in ([], ["--rope_scaling", "linear:4", "--overwrite"]):
        train_dpo.main([*argv, "--reference", "cached", "--learning_rate", "1e-12", *more])
        row = read_metrics(tmp_path / "out" / "rlhf_32" / "metrics.jsonl")[0]
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["kl"] == 0
