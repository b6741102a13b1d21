import json
import re

import pytest

from minillm.data.batches import collate
from minillm.data.chat import ChatRows
from minillm.data.report import CONTEXT, RESET, TARGET, colour_targets, data_report, format_report, main
from minillm.data.text import TextRows


def test_report_of_text(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts])
    rows = TextRows(path, tokenizer, max_seq_len=64, cache_dir=tmp_path)
    report = data_report(rows, tokenizer)
    n_targets = sum(len(tokenizer.encode(t)) + 1 for t in texts)
    assert report["targets"] == n_targets
    assert report["special_share"] == pytest.approx(len(texts) / n_targets)
    assert report["bytes_per_target"] == pytest.approx(sum(len(t.encode()) for t in texts) / n_targets)
    assert sum(n for _, _, n in report["histogram"]) == len(texts)
    for low, high, n in report["histogram"]:
        assert n == sum(low <= len(tokenizer.encode(t)) + 1 <= high for t in texts)
    shares = [share for _, _, share in report["frequent_targets"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 10
    json.dumps(report)
    printed = format_report(report)
    assert f"{n_targets:,}" in printed
    assert "#" in printed


def test_warnings_come_when_they_should_and_say_why(write, tokenizer, tmp_path):
    calm = TextRows(
        write("calm.jsonl", [{"text": " ".join(f"{w}{n}" for n in range(90) for w in "abcdef")}]),
        tokenizer, max_seq_len=64, cache_dir=tmp_path,
    )  # fmt: skip
    assert data_report(calm, tokenizer)["warnings"] == []
    short = TextRows(
        write("short.jsonl", [{"text": t} for t in ("fox 1", "dog 2", "345", "(saw)", "river", "x=y", "pears")]),
        tokenizer,
        max_seq_len=64,
        cache_dir=tmp_path,
    )
    (warning,) = data_report(short, tokenizer)["warnings"]
    assert "special tokens are" in warning
    assert "Short documents and short answers do this rightly" in warning
    same = TextRows(write("same.jsonl", [{"text": "7" * 50}, "{"]), tokenizer, max_seq_len=64, cache_dir=tmp_path)
    repeated, rejected = data_report(same, tokenizer)["warnings"]
    assert "'7' is" in repeated
    assert "limit 30%" in repeated
    assert "1 of 2 records were rejected" in rejected
    assert "same.jsonl.rejected.jsonl" in rejected


def test_cut_conversations_are_warned_about(write, talks, tokenizer, tmp_path):
    rows = ChatRows(write("a.jsonl", [{"messages": t} for t in talks]), tokenizer, max_seq_len=60, cache_dir=tmp_path)
    report = data_report(rows, tokenizer)
    assert any("are cut at --max_seq_len 60" in warning for warning in report["warnings"])


def test_colour_targets_shows_every_token_once(write, talks, tokenizer, tmp_path):
    talk = [{"role": "user", "content": "fox 狐?"}, {"role": "assistant", "content": "小明\nfox 😀"}]
    rows = ChatRows(write("a.jsonl", [{"messages": talk}]), tokenizer, max_seq_len=200, cache_dir=tmp_path)
    shown = colour_targets(collate([rows[0]], 200), tokenizer)
    assert shown.count(RESET) == shown.count(TARGET) + shown.count(CONTEXT)
    plain = shown.replace(RESET, "").replace(TARGET, "").replace(CONTEXT, "")
    assert plain == "<|im_start|>user\nfox 狐?<|im_end|>\n<|im_start|>assistant\n小明\nfox 😀<|im_end|>"
    green = "\n".join(re.findall(re.escape(TARGET) + "(.*?)" + re.escape(RESET), shown))
    assert green == "小明\nfox 😀<|im_end|>"


def test_colour_targets_of_packed_text(write, tokenizer, tmp_path):
    rows = TextRows(write("a.jsonl", [{"text": "fox"}, {"text": "dog"}]), tokenizer, max_seq_len=64, cache_dir=tmp_path)
    shown = colour_targets(collate([rows[0]]), tokenizer)
    eos = "<|endoftext|>"
    assert shown == "\n\n".join(f"{CONTEXT}{eos}{RESET}{TARGET}{w}{eos}{RESET}" for w in ("fox", "dog"))


def test_command_line(write, texts, talks, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tok")
    text = write("a.jsonl", [{"text": t} for t in texts])
    chat = write("b.jsonl", [{"messages": t} for t in talks])
    common = ["--tokenizer_path", str(tmp_path / "tok"), "--cache_dir", str(tmp_path / "c"), "--max_seq_len", "128"]
    main(["--data_path", str(text), "--json_path", str(tmp_path / "r.json"), *common])
    assert "40 documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["documents"] == 40
    main(["--data_path", str(chat), *common])
    assert "30 documents" in capsys.readouterr().out
    for arguments in (
        ["--data_path", str(chat), "--kind", "text"],
        ["--data_path", str(tmp_path / "none.jsonl")],
        ["--data_path", str(text), "--json_path", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *common])
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_names_of_control_tokens_in_texts_are_counted(write, tokenizer, tmp_path):
    chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"
    path = write("texts.jsonl", [{"text": text} for text in (chatml, "plain text", "a <|im_end|> here", "b")])
    report = data_report(TextRows(path, tokenizer, max_seq_len=40, cache_dir=tmp_path / "cache"), tokenizer)
    assert report["control_texts"] == {"<|im_end|>": 2, "<|im_start|>": 1}
    (warning,) = [text for text in report["warnings"] if "control tokens (" in text]
    assert "<|im_end|> in 2, <|im_start|> in 1 of 4" in warning
