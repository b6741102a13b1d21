import json
import re

import pytest

from minillm.data.batches import collate
from minillm.data.chat import ChatRows
from minillm.data.report import (
    CONTEXT,
    RESET,
    TARGET,
    colour_targets,
    count_duplicates,
    data_lines,
    data_report,
    format_report,
    main,
)
from minillm.data.sources.split import DataFiles
from minillm.data.text import TextRows
from minillm.tokenizer.chat import encode_chat


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")


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
    assert "This is normal for short documents and short answers" in warning
    same = TextRows(write("same.jsonl", [{"text": "7" * 50}, "{"]), tokenizer, max_seq_len=64, cache_dir=tmp_path)
    repeated, rejected, ends = data_report(same, tokenizer)["warnings"]
    assert "'7' is" in repeated
    assert "limit 30%" in repeated
    assert "1 of 2 records were rejected" in rejected
    assert "same.jsonl.rejected.jsonl" in rejected
    assert "--allow_rejected" in ends


def test_cut_conversations_are_warned_about(write, talks, tokenizer, tmp_path):
    rows = ChatRows(write("a.jsonl", [{"messages": t} for t in talks]), tokenizer, max_seq_len=60, cache_dir=tmp_path)
    report = data_report(rows, tokenizer)
    assert any("are cut at --max_seq_len 60" in warning for warning in report["warnings"])


@pytest.mark.parametrize("train_on, n_cut, n_usable", [("all", 2, 3), ("per_turn", 2, 3), ("last", 1, 2)])
def test_what_is_cut_and_what_is_rejected_are_told_apart(write, tokenizer, tmp_path, train_on, n_cut, n_usable):
    """Rows end 3 targets before the end of the long answer; in the last record a turn follows it, out of reach."""

    def turn(answered):
        return [{"role": "user", "content": "fox"}, {"role": "assistant", "content": answered}]

    ids, _ = encode_chat(tokenizer, turn("fox the fox the fox"))
    too_long = [{"role": "user", "content": "fox " * 40}, turn("fox")[1]]
    records = [turn("fox"), turn("fox the fox the fox"), too_long, turn("fox the fox the fox") + turn("a")]
    path = write("a.jsonl", [{"messages": talk} for talk in records])
    after_end = len(ids) - 1 - max(t for t, token in enumerate(ids) if token == tokenizer.im_end_id)
    max_seq_len = len(ids) - 1 - after_end - 3  # pairs up to the last target, but 3
    rows = ChatRows(path, tokenizer, max_seq_len=max_seq_len, train_on=train_on, cache_dir=tmp_path / "c")
    summary = rows.summary
    assert (summary["records"], summary["cut"]) == (4, n_cut)
    assert (summary["usable"], summary["rejected"], summary["documents"]) == (n_usable, 4 - n_usable, n_usable)
    usable = [records[number] for number in (0, 1, 3)[:n_usable]]
    n_targets = sum(sum(encode_chat(tokenizer, talk, train_on="all")[1]) for talk in usable)
    assert summary["targets_lost"] == n_targets - sum((row["targets"] >= 0).sum() for row in rows)
    text = format_report(data_report(rows, tokenizer))
    assert f"{n_cut} of {summary['usable']} conversations are cut" in text


def test_the_lines_about_the_data_say_what_became_of_every_record(write, talks, tokenizer, tmp_path):
    bad = ["{", '{"messages": 3}', *(f'{{"key{number}": 1}}' for number in "abcd"), "{", "[1]", "{"]
    bad += ['{"text": ""}', '{"text": 1}', '{"messages": []}']
    path = write("a.jsonl", [*bad, *({"messages": talk} for talk in talks)])
    rows = ChatRows(path, tokenizer, max_seq_len=500, cache_dir=tmp_path / "c")
    lines = data_lines(rows.summary)
    assert lines[0] == f"42 records read from {path}"
    assert lines[1] == f"12 rejected (28.6%), written to {path}.rejected.jsonl"
    assert re.fullmatch(rf" +4 x the keys fit no schema: .* \({path}:3\)", lines[2])
    assert re.fullmatch(rf" +3 x broken JSON: Expecting property name .*, column \d \({path}:1\)", lines[3])
    assert [line.split(" x ")[0].strip() for line in lines[4:7]] == ["2", "1", "1"]
    assert lines[7].split() == ["1", "x", "1", "other", "reasons"]
    n_pairs = sum(len(row["input_ids"]) for row in rows)
    n_targets = sum((row["targets"] >= 0).sum() for row in rows)
    assert lines[8].startswith(f"30 conversations, {n_pairs:,} tokens in {len(rows)} rows (")
    assert lines[8].endswith(f"% full), {n_targets:,} of them targets")
    assert len(lines) == 9
    again = ChatRows(path, tokenizer, max_seq_len=500, cache_dir=tmp_path / "c")  # from the cache
    assert data_lines(again.summary) == lines


def test_colour_targets_shows_every_token_once(write, talks, tokenizer, tmp_path, colours):
    talk = [{"role": "user", "content": "fox 狐?"}, {"role": "assistant", "content": "小明\nfox 😀"}]
    rows = ChatRows(write("a.jsonl", [{"messages": talk}]), tokenizer, max_seq_len=200, cache_dir=tmp_path)
    shown = colour_targets(collate([rows[0]], 200), tokenizer)
    assert shown.count(RESET) == shown.count(TARGET) + shown.count(CONTEXT)
    plain = shown.replace(RESET, "").replace(TARGET, "").replace(CONTEXT, "")
    assert plain == "<|im_start|>user\nfox 狐?<|im_end|>\n<|im_start|>assistant\n小明\nfox 😀<|im_end|>"
    green = "\n".join(re.findall(re.escape(TARGET) + "(.*?)" + re.escape(RESET), shown))
    assert green == "小明\nfox 😀<|im_end|>"


def test_colour_targets_of_packed_text(write, tokenizer, tmp_path, colours):
    rows = TextRows(write("a.jsonl", [{"text": "fox"}, {"text": "dog"}]), tokenizer, max_seq_len=64, cache_dir=tmp_path)
    shown = colour_targets(collate([rows[0]]), tokenizer)
    eos = "<|endoftext|>"
    assert shown == "\n\n".join(f"{CONTEXT}{eos}{RESET}{TARGET}{w}{eos}{RESET}" for w in ("fox", "dog"))


def test_without_colours_targets_stand_in_brackets(write, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    rows = TextRows(write("a.jsonl", [{"text": "fox\n\ndog"}]), tokenizer, max_seq_len=64, cache_dir=tmp_path)
    assert colour_targets(collate([rows[0]]), tokenizer) == "<|endoftext|>[[fox]]\n\n[[dog<|endoftext|>]]"


def test_command_line(write, texts, talks, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tok")
    text = write("a.jsonl", [{"text": t} for t in texts])
    chat = write("b.jsonl", [{"messages": t} for t in talks])
    common = ["--tokenizer_path", str(tmp_path / "tok"), "--cache_dir", str(tmp_path / "c"), "--max_seq_len", "128"]
    main(["--data_path", str(text), "--json_path", str(tmp_path / "r.json"), *common])
    assert "40 records" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["documents"] == 40
    main(["--data_path", str(chat), *common])
    assert "30 records" in capsys.readouterr().out
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


def test_duplicates_and_leaks_are_counted(write, tokenizer, tmp_path, capsys):
    texts = ["a fox", "A  FOX ", "dog", "dog", "猫", "only here"]
    train = write("train.jsonl", [{"text": text} for text in texts] + ["{broken"])
    valid = write("valid.jsonl", [{"text": text} for text in ("dog\n", "猫", "only there")])
    assert count_duplicates(DataFiles(train)) == {"duplicates": 2, "leaked": None}
    assert count_duplicates(DataFiles(train), DataFiles(valid)) == {"duplicates": 2, "leaked": 3}
    tokenizer.save(tmp_path / "tok")
    flags = ["--tokenizer_path", str(tmp_path / "tok"), "--cache_dir", str(tmp_path / "c"), "--data_path", str(train)]
    main(flags)
    assert "duplicates 2 records equal an earlier one\n" in capsys.readouterr().out
    main([*flags, "--valid_path", str(valid)])
    printed = capsys.readouterr().out
    assert "duplicates 2 records equal an earlier one, 3 equal one of --valid_path\n" in printed
    assert "WARNING: validation measures what was learned by heart" in printed


def test_names_of_control_tokens_in_texts_are_counted(write, tokenizer, tmp_path):
    chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"
    path = write("texts.jsonl", [{"text": text} for text in (chatml, "plain text", "a <|im_end|> here", "b")])
    report = data_report(TextRows(path, tokenizer, max_seq_len=40, cache_dir=tmp_path / "cache"), tokenizer)
    assert report["control_texts"] == {"<|im_end|>": 2, "<|im_start|>": 1}
    (warning,) = [text for text in report["warnings"] if "control tokens (" in text]
    assert "<|im_end|> in 2, <|im_start|> in 1 of 4" in warning
