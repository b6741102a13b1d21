import gzip
import json
from itertools import islice

import pytest

from minillm.data.schema import parse_record, read_records
from minillm.errors import UserError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "record, kind, messages",
    [
        ({"text": "hello"}, "text", None),
        ({"conversations": [USER, ANSWER]}, "chat", [USER, ANSWER]),
        ({"messages": [USER, ANSWER]}, "chat", [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "chat", [USER, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "chat",
            [{"role": "system", "content": "s"}, USER, ANSWER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "chat", [USER, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, "chat", [{"role": "user", "content": "q\ni"}, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [["q", "b"]]}, "chat", [USER, WORSE, USER, ANSWER]),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q", "output": "b"}]},
            "chat",
            [{"role": "system", "content": "s"}, USER, ANSWER, USER, WORSE],
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "preference", [USER]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", [USER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, "preference", [USER]),
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "preference", [USER]),
        ({"prompt": "q", "completion": "a", "label": True}, "judged", [USER]),
    ],
)
def test_every_schema_becomes_the_normal_form(record, kind, messages):
    parsed = parse_record({**record, "task": "t", "log_prob": -1.5}, 3)
    assert (parsed.kind, parsed.messages, parsed.line) == (kind, messages, 3)
    assert parsed.extra == {"task": "t"}
    assert parsed.log_prob == -1.5
    if kind == "preference":
        assert (parsed.chosen, parsed.rejected) == ([ANSWER], [WORSE])
    if kind == "judged":
        assert (parsed.chosen, parsed.label) == ([ANSWER], True)


@pytest.mark.parametrize(
    "record, reason",
    [
        ([1], "JSON object"),
        ({"txt": "x"}, "fit no schema"),
        ({"text": 5}, "must be a string"),
        ({"text": "  \n"}, "empty"),
        ({"text": "x", "log_prob": "low"}, "log_prob"),
        ({"text": "x", "log_prob": float("nan")}, "log_prob"),
        ({"text": "x", "log_prob": 10**400}, "log_prob"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}, ANSWER]}, "'robot'; allowed: system, user, assistant, tool"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'robot'; allowed: system, user.*gpt"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "string"),
        ({"instruction": "q", "input": "", "output": 5}, "string"),
        ({"instruction": 5, "output": "a"}, "instruction and input must be strings"),
        ({"instruction": "q", "output": "a", "history": 5}, "list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["q", "a", "b"]]}, "list of pairs"),
        ({"system": "s", "conversations": ["q", ANSWER]}, "message 0 must be an object"),
        ({"conversation": [{"input": "q"}]}, "output"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, WORSE]}, "share every message"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "no prompt"),
        ({"prompt": "q", "chosen": [ANSWER, USER], "rejected": "b"}, "end with an assistant"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label"),
        ({"prompt": "q", "completion": 4, "label": 1}, "completion"),
    ],
)
def test_broken_records_say_why(record, reason):
    with pytest.raises(UserError, match=reason):
        parse_record(record, 1)


def test_bad_lines_are_set_aside_with_their_numbers(write):
    good = {"text": "fine"}
    path = write("a.jsonl", [good, "", good, '{"text": "cut', {"text": ""}, '{"text": "\\ud800"}', good])
    assert [r.line for r in read_records(path)] == [1, 3, 6, 7]  # the surrogate is the tokenizer's to refuse
    rejected = [json.loads(x) for x in (path.parent / "a.jsonl.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [r["line"] for r in rejected] == [4, 5]
    assert "broken JSON" in rejected[0]["reason"]
    assert rejected[0]["raw"] == '{"text": "cut'


def test_a_reader_that_stops_early_writes_nothing(write):
    path = write("a.jsonl", [{"text": "x"}, "{", {"text": "y"}, "["])
    complete = path.parent / "a.jsonl.rejected.jsonl"
    complete.write_text("all of them\n")
    assert [r.text for r in islice(read_records(path), 2)] == ["x", "y"]
    assert complete.read_text() == "all of them\n"


def test_strict_makes_line_7_fatal_and_writes_nothing(write):
    path = write("a.jsonl", [{"text": "x"}] * 6 + ["{"] + [{"text": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 7: broken JSON"):
        list(read_records(path, strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_errors_come_at_once(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="directory"):
        read_records(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"readable are .jsonl"):
        read_records(tmp_path / "a.csv")


def test_a_file_without_a_usable_record(write):
    with pytest.raises(UserError, match=r"all 2 lines are bad; the first, line 1: broken JSON"):
        list(read_records(write("a.jsonl", ["{", "]"])))
    with pytest.raises(UserError, match="is empty"):
        list(read_records(write("b.jsonl", ["", " "])))


def test_gzip_and_parquet_read_alike(write, tmp_path):
    records = [{"text": "fox", "source": "s"}, {"text": "狐"}, {"messages": [USER, ANSWER]}]
    expected = list(read_records(write("a.jsonl", records)))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    assert list(read_records(tmp_path / "a.jsonl.gz")) == expected
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = {key: [r.get(key) for r in records] for key in ("text", "source", "messages")}
    pyarrow.parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == expected


def test_damaged_containers_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="damaged gzip"):
        list(read_records(tmp_path / "a.jsonl.gz"))
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="parquet"):
        list(read_records(tmp_path / "a.parquet"))
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one word"]}), tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"one word", b"one\x80word"))  # no UTF-8
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file"):
        list(read_records(tmp_path / "a.parquet"))


def test_txt_keeps_every_paragraph_and_bounds_documents(tmp_path):
    paragraphs = [f"Paragraph {n} says something.\nIn two lines." for n in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n" + "\n\n".join(paragraphs) + "\n", encoding="utf-8")
    records = list(read_records(path))
    assert "\n\n".join(r.text for r in records) == "\n\n".join(paragraphs)
    assert all(4096 <= len(r.text) < 4200 for r in records[:-1])
    lines = path.read_text("utf-8").split("\n")
    assert all(lines[r.line - 1] == r.text.split("\n")[0] for r in records)
    path.write_text("x" * 200_000, encoding="utf-8")  # one endless line
    assert [len(r.text) for r in read_records(path)] == [65536, 65536, 65536, 3392]
