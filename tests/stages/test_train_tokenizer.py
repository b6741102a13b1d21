import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_pretrain
import train_sft
import train_tokenizer
from minillm.hub.huggingface import load_model
from minillm.inference import generate
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat, load_tokenizer

ENGLISH = ["the river", "a small house", "green apples", "they were singing", "an old teacher", "winter"]
CHINESE = ["小河流过村庄", "红色的苹果", "老师在唱歌", "冬天下雪了", "山上有一座房子", "七只小鸟"]


def english(n):
    return f"{ENGLISH[n % 6]} and {ENGLISH[n // 6 % 6]} near {ENGLISH[n // 36 % 6]}, {n}."


def chinese(n):
    return f"{CHINESE[n % 6]}，{CHINESE[n // 6 % 6]}，{CHINESE[n // 36 % 6]}，{n}。"


@pytest.fixture
def data(tmp_path):
    text, chats = tmp_path / "text.jsonl", tmp_path / "chats.jsonl.gz"
    text.write_text("".join(json.dumps({"text": english(n)}) + "\n" for n in range(400)), encoding="utf-8")
    turns = ([{"role": "user", "content": chinese(n)}, {"role": "assistant", "content": "<think>好</think>"}]
             for n in range(400))  # fmt: skip
    lines = "".join(json.dumps({"conversations": turn}, ensure_ascii=False) + "\n" for turn in turns)
    chats.write_bytes(gzip.compress(lines.encode("utf-8")))
    return f"{text}, {chats}"


def run(capsys, *argv):
    train_tokenizer.main([str(word) for word in argv])
    return capsys.readouterr().out


def refuse(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        train_tokenizer.main([str(word) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error


def test_trains_reports_and_saves(capsys, data, tmp_path):
    save_dir = tmp_path / "out"
    out = run(capsys, "--data_path", data, "--save_dir", save_dir, "--vocab_size", 350)
    assert "trained 350 tokens" in out
    assert "zh: " in out
    assert "en: " in out
    assert "warning" not in out
    tokenizer = load_tokenizer(save_dir / "tokenizer")
    assert tokenizer.vocab_size == 350
    assert sorted(os.listdir(save_dir / "tokenizer")) == sorted(tokenizer.files)

    again = run(capsys, "--data_path", data, "--save_dir", save_dir, "--vocab_size", 350)
    assert again == out
    assert load_tokenizer(save_dir / "tokenizer").files == tokenizer.files

    other = run(capsys, "--data_path", data, "--save_dir", save_dir, "--vocab_size", 300, "--split_han")
    assert "warning:" in other
    assert "held another tokenizer" in other


def test_held_out_records_are_not_trained_on(capsys, tmp_path):
    lines = [f"word{'x' if n % 20 == 19 else 'y'} q" for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with_split = train_tokenizer.main(["--data_path", f"{tmp_path}/a.jsonl", "--vocab_size", "275",
                                       "--save_dir", str(tmp_path / "o")])  # fmt: skip
    assert "en: " in capsys.readouterr().out
    vocabulary = [with_split.token_bytes(i) for i in range(267, with_split.vocab_size)]
    assert any(token.endswith(b"y") for token in vocabulary)
    assert not any(b"x" in token for token in vocabulary)


def test_limits_cut_all_files_alike(capsys, data, tmp_path):
    common = ("--data_path", data, "--save_dir", tmp_path / "out", "--vocab_size", 300)
    assert "on 0.00" in run(capsys, *common, "--max_bytes", 4000)
    files = [part.strip() for part in data.split(",")]
    given = {"en": 0, "zh": 0}
    for n, (texts, _roles) in enumerate(train_tokenizer.balanced_records(files, strict=True)):
        given["en" if texts[0].isascii() else "zh"] += train_tokenizer.count_bytes(texts)
        if n == 300:
            break
    assert given["en"] == pytest.approx(given["zh"], rel=0.02)
    assert sum(1 for _ in train_tokenizer.balanced_records(files, strict=True)) == 800
    run(capsys, *common, "--max_records", 50)


def test_valid_path(capsys, data, tmp_path):
    valid = tmp_path / "valid.txt"
    valid.write_text("the old house\n", encoding="utf-8")
    out = run(capsys, "--data_path", data, "--valid_path", valid, "--save_dir", tmp_path, "--vocab_size", 300)
    assert "held out: 13 bytes" in out
    assert "zh: " not in out


def test_small_text_warns(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("the old house\n" * 9)
    out = run(capsys, "--data_path", tmp_path / "a.txt", "--save_dir", tmp_path / "out")
    assert "warning: the text" in out
    assert "of 6400 tokens" in out
    assert "no held-out text" in out


def test_bad_inputs_leave_nothing_behind(capsys, data, tmp_path):
    save_dir = tmp_path / "out"
    where = ("--save_dir", save_dir)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n' * 6 + '{"text": \n')
    (tmp_path / "file").write_text("")
    assert "missing.jsonl" in refuse(capsys, "--data_path", tmp_path / "missing.jsonl", *where)
    assert "empty" in refuse(capsys, "--data_path", tmp_path / "empty.jsonl", *where)
    with pytest.raises(SystemExit, match="2"):
        train_tokenizer.main(["--data_path", str(tmp_path / "blank.jsonl"), "--save_dir", str(save_dir)])
    # the reader tells of the line that it set aside, then comes the error
    assert "blank.jsonl has no usable record" in capsys.readouterr().err.splitlines()[-1]
    assert "line 7" in refuse(capsys, "--data_path", tmp_path / "broken.jsonl", "--strict", *where)
    assert "names no" in refuse(capsys, "--data_path", " , ", *where)
    assert "vocab_size 266 is too small" in refuse(capsys, "--data_path", data, "--vocab_size", 266, *where)
    assert "max_token_length -1" in refuse(capsys, "--data_path", data, "--max_token_length", -1, *where)
    assert "valid_path" in refuse(capsys, "--data_path", data, "--valid_path", "nowhere.txt", *where)
    assert not save_dir.exists()
    for bad in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert "not a writable directory" in refuse(capsys, "--data_path", data, "--save_dir", bad)


def test_sentencepiece_reports_and_saves(capsys, data, tmp_path):
    pytest.importorskip("sentencepiece")
    common = ("--data_path", data, "--save_dir", tmp_path / "out", "--vocab_size", 350)
    out = run(capsys, *common, "--tokenizer_type", "sentencepiece")
    assert "trained 350 tokens" in out
    assert "zh: " in out
    assert "en: " in out
    assert "warning" not in out
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert json.loads(tokenizer.files["tokenizer.json"])["model"]["byte_fallback"] is True
    assert len(tokenizer.encode("小河流过村庄")) < 6
    assert "held another tokenizer" in run(capsys, *common), "the default is bytes"
    again = run(capsys, *common, "--tokenizer_type", "sentencepiece", "--max_token_length", 0, "--split_han")
    assert "trained" in again
    assert len(load_tokenizer(tmp_path / "out" / "tokenizer").encode("小河流过村庄")) >= 6


def test_sentencepiece_refuses_before_reading(capsys, data, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    flags = ("--data_path", data, "--save_dir", tmp_path / "out", "--tokenizer_type", "sentencepiece")
    monkeypatch.setattr(train_tokenizer, "balanced_records", None)
    assert "vocab_size 267 is too small" in refuse(capsys, *flags, "--vocab_size", 267)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in refuse(capsys, *flags)
    assert not (tmp_path / "out").exists()


def test_training_with_a_sentencepiece_tokenizer(world, call, capsys):
    """From text to a model that chats, with no further word about which tokenizer it is."""
    pytest.importorskip("sentencepiece")
    # the world has a byte-level tokenizer, which this replaces
    argv = ("--data_path", f"{world.text},{world.chat}", "--save_dir", world.out, "--vocab_size", 320)
    assert "held another tokenizer" in run(capsys, *argv, "--tokenizer_type", "sentencepiece")
    tokenizer = load_tokenizer(world.out / "tokenizer")
    common = ["--batch_size", "4", "--log_interval", "1", "--learning_rate", "1e-2"]
    done = call(train_pretrain.main, world, "--data_path", world.text, "--max_seq_len", 32, "--max_steps", 8, *common)
    assert done.code == 0, done.err
    done = call(train_sft.main, world, "--data_path", world.chat, "--max_seq_len", 300, "--epochs", 4, *common)
    assert done.code == 0, done.err
    for stage in ("pretrain_32", "full_sft_32"):
        losses = [row["loss"] for row in read_metrics(world.out / stage / "metrics.jsonl") if row["split"] == "train"]
        assert losses[-1] < losses[0]
        beside = load_tokenizer(world.out / stage)
        assert beside.content_hash == tokenizer.content_hash
    model = load_model(world.out / "full_sft_32")
    assert model.config.vocab_size == tokenizer.vocab_size
    prompt, _ = encode_chat(beside, [{"role": "user", "content": "小明 12 😀"}], add_generation_prompt=True)
    (answer,) = generate(model, [prompt], max_new_tokens=5, temperature=0.0, eos_token_id=beside.im_end_id)
    assert isinstance(beside.decode(answer), str)

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(world.out / "full_sft_32")
    chat = [{"role": "user", "content": "小明 12 😀"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] == prompt


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(capsys, data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "not a writable directory" in refuse(capsys, "--data_path", data, "--save_dir", tmp_path / "locked")


def test_as_a_program(data, tmp_path, python):
    script = Path(train_tokenizer.__file__)
    command = [
        python,
        str(script),
        "--data_path",
        data,
        "--save_dir",
        str(tmp_path),
        "--vocab_size",
        "10",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert result.returncode == 2
    assert result.stderr == "error: vocab_size 10 is too small: 256 bytes + 11 special tokens are 267\n"
