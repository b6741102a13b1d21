"""Whole preparations: counts, contents, determinism, errors."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm.data import read_records
from minillm.data.prepare import run
from minillm.data.prepare.__main__ import main
from minillm.data.prepare.run import prepare
from minillm.data.prepare.settings import PrepareSettings
from minillm.errors import UserError

ROOT = Path(__file__).parents[3]


def sentence(rng: random.Random, n: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(n)) + "。"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_dropped(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@pytest.fixture
def go(tmp_path):
    """go(data_path, **settings) → report; the output is out/a.jsonl."""

    def go(data_path, **settings):
        settings = {"output": str(tmp_path / "out" / "a.jsonl"), "data_path": str(data_path)} | settings
        report = prepare(PrepareSettings(**settings))
        leftovers = [path.name for path in Path(settings["output"]).parent.iterdir() if path.name.startswith(".")]
        assert not leftovers
        return report

    return go


def files_of(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


RNG = random.Random(0)
LONG = sentence(RNG, 300)
TEXTS = [
    {"text": "你好，世界 🙂", "source": "a"},
    {"text": "  你好，世界 🙂 "},  # an exact duplicate
    "{broken",
    {"text": LONG},
    {"text": LONG[30:150] + "，" + LONG[150:] + "完"},  # a near duplicate
    {"text": "a\x00b\r\nc"},
    {"text": "🙂🙂"},
    {"text": "🙂🙃"},  # no letters, so it resembles nothing
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"text": "同一行\n同一行\n同一行\n别的"},
    {"text": "前面。下列关于光合作用的说法中正确的是哪一项？后面"},
    {"text": "\ud83d lone"},
    {"text": "x" * 3_000_000},  # a huge line
]


@pytest.fixture
def everything(write):
    """Flags that use every rule, on a file that meets most of them."""
    pytest.importorskip("rensa")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in TEXTS]
    questions = [{"question": "下列关于光合作用的说法中正确的是哪一项", "choices": ["甲"], "answer": 0}]
    return {
        "data_path": str(write("raw.jsonl", lines)),
        "near_duplicates": "drop",
        "max_duplicate_lines": 0.3,
        "max_characters": 1_000_000,
        "eval_files": str(write("eval.jsonl", questions)),
    }


def test_every_rule_counts_what_it_drops(go, everything, tmp_path):
    report = go(**everything)
    expected = {
        "unreadable": 2, "other_kind": 1, "max_characters": 1, "duplicate_lines": 1, "contaminated": 1,
        "exact_duplicate": 1, "near_duplicate": 1,
    }  # fmt: skip
    assert report["dropped"] == expected
    assert report["changed"] == {"control_characters": 1}
    assert report["read"] == 13
    kept = read(tmp_path / "out" / "a.jsonl")
    assert kept == [TEXTS[0], TEXTS[3], {"text": "ab\nc"}, TEXTS[6], TEXTS[7]]
    dropped = read_dropped(tmp_path / "out" / "a.dropped.jsonl.gz")
    assert [entry["line"] for entry in dropped] == [2, 3, 5, 9, 10, 11, 12, 13]
    assert {rule: sum(entry["rule"] == rule for entry in dropped) for rule in expected} == expected
    by_line = {entry["line"]: entry for entry in dropped}
    assert (by_line[2]["duplicate_of"]["line"], by_line[2]["record"]) == (1, TEXTS[1])
    assert by_line[5]["duplicate_of"]["line"] == 4
    assert 0.8 <= by_line[5]["similarity"] < 1
    assert by_line[3]["raw"] == "{broken"
    assert "broken JSON" in by_line[3]["reason"]
    assert "eval.jsonl:1" in by_line[11]["reason"]
    assert report == json.loads((tmp_path / "out" / "a.report.json").read_text(encoding="utf-8"))
    assert report["examples"]["control_characters"][0]["line"] == 6
    assert report["questions"] == {"looked_for": 1, "too_short": 0}


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_bytes_do_not_depend_on_processes(go, everything, tmp_path, monkeypatch, shuffle):
    settings = everything | {"valid_ratio": 0.3, "shuffle": shuffle}
    go(**settings)
    first = files_of(tmp_path)
    assert set(first) == {"a.jsonl", "a_valid.jsonl", "a.dropped.jsonl.gz", "a.report.json"}
    monkeypatch.setattr("minillm.data.prepare.first_pass.CHUNK_RECORDS", 2)
    for n_workers in (0, 1, 3):
        go(**settings, num_workers=n_workers, overwrite=True)
        assert files_of(tmp_path) == first


def numbered(write, name: str, n: int, length: int = 30) -> Path:
    rng = random.Random(name)
    return write(name, [{"text": sentence(rng, length + i % 7), "id": f"{name}-{i}"} for i in range(n)])


def test_shuffle_is_a_permutation_through_any_number_of_buckets(go, write, tmp_path, monkeypatch):
    path = numbered(write, "n.jsonl", 300)
    go(path, shuffle=True)
    once = (tmp_path / "out/a.jsonl").read_bytes()
    ids = [record["id"] for record in read(tmp_path / "out/a.jsonl")]
    original = [record["id"] for record in read(path)]
    assert sorted(ids) == sorted(original) != ids
    positions = [original.index(name) for name in ids]
    assert sum(abs(a - b) for a, b in enumerate(positions)) / 300 == pytest.approx(100, abs=15)  # uniform: a third
    monkeypatch.setattr("minillm.data.prepare.write.BUCKET_BYTES", 500)
    go(path, shuffle=True, overwrite=True)
    assert (tmp_path / "out/a.jsonl").read_bytes() == once
    go(path, shuffle=True, overwrite=True, seed=1)
    assert sorted(once.splitlines()) == sorted((tmp_path / "out/a.jsonl").read_bytes().splitlines())
    assert (tmp_path / "out/a.jsonl").read_bytes() != once


@pytest.mark.parametrize("unit", ["characters", "bytes", "records"])
@pytest.mark.parametrize("size, repeats", [("smallest", (1, 0.2)), ("largest", (5, 1)), ("by number", (2.5, 0.5))])
def test_a_mixture_has_its_shares(go, write, tmp_path, unit, size, repeats):
    """A file of 100 records for 0.5 and one of 500 for 0.5, all of about one length."""
    small, large = numbered(write, "small.jsonl", 100), numbered(write, "large.jsonl", 500)
    per_record = {"characters": 33.985, "bytes": 33.985 * 3, "records": 1}[unit]
    mix_size = str(round(500 * per_record)) if size == "by number" else size
    report = go(f"{small}:2,{large}:2", weight_unit=unit, mix_size=mix_size)
    ids = [record["id"] for record in read(tmp_path / "out/a.jsonl")]
    for entry, name, n, expected in zip(report["mixture"], ("small", "large"), (100, 500), repeats, strict=True):
        copies = [ids.count(f"{name}.jsonl-{i}") for i in range(n)]
        assert sum(copies) / n == pytest.approx(expected, rel=0.03)
        assert max(copies) - min(copies) <= 1  # all records equally often, up to one
        assert entry["repeats"] == pytest.approx(sum(copies) / n, rel=0.03)
        assert entry["written_share"] == pytest.approx(0.5, abs=0.005)
    assert report["outputs"][str(tmp_path / "out/a.jsonl")]["records"] == len(ids)
    assert ids != sorted(ids)


def test_a_mixture_by_tokens(go, write, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    chinese, english = (
        numbered(write, "zh.jsonl", 60),
        write("en.jsonl", [{"text": f"the little fox {i}"} for i in range(60)]),
    )
    report = go(
        f"{chinese}:0.6,{english}:0.4", weight_unit="tokens", tokenizer_path=str(tmp_path / "tokenizer"), max_tokens=500
    )
    sums = dict.fromkeys(("zh", "en"), 0)
    for record in read(tmp_path / "out/a.jsonl"):
        sums["en" if "fox" in record["text"] else "zh"] += len(tokenizer.encode(record["text"]))
    assert [entry["written"] for entry in report["mixture"]] == [sums["zh"], sums["en"]]
    assert sums["zh"] / sum(sums.values()) == pytest.approx(0.6, abs=0.02)


def test_a_sample_does_not_depend_on_the_order(go, write, tmp_path):
    records = read(numbered(write, "n.jsonl", 200))
    ids = []
    for order in (records, records[::-1], records + records):
        report = go(write("order.jsonl", order), max_records=30, overwrite=True)
        ids.append({record["id"] for record in read(tmp_path / "out/a.jsonl")})
        assert report["dropped"]["not_sampled"] == 170
    assert len(ids[0]) == 30
    assert ids[0] == ids[1] == ids[2]
    go(write("order.jsonl", records), max_records=60, overwrite=True)
    assert ids[0] < {record["id"] for record in read(tmp_path / "out/a.jsonl")}


def test_the_split_is_that_of_training(go, write, tmp_path):
    from minillm.data import DataFiles

    path = numbered(write, "n.jsonl", 200)
    report = go(path, valid_ratio=0.2)
    side = DataFiles(path, valid_ratio=0.2, side="valid")
    expected = [record.extra["id"] for record in read_records(path) if side.takes(record)]
    assert [record["id"] for record in read(tmp_path / "out/a_valid.jsonl")] == expected
    assert 20 < len(expected) < 60
    assert len(read(tmp_path / "out/a.jsonl")) + len(expected) == 200
    assert report["leakage"]["exact"] == 0


def test_leakage_is_counted_where_duplicates_stay(go, write, tmp_path):
    """Records that differ in white space may fall on two sides."""
    texts = [f"文本 {i}" for i in range(60)]
    path = write("n.jsonl", [{"text": text + end} for text in texts for end in ("", " ", "\n")])
    report = go(path, valid_ratio=0.3, exact_duplicates="keep")
    train, valid = ([r["text"].strip() for r in read(tmp_path / f"out/{name}.jsonl")] for name in ("a", "a_valid"))
    assert report["leakage"]["exact"] == sum(text in valid for text in train) > 10
    assert go(path, valid_ratio=0.3, overwrite=True)["leakage"]["exact"] == 0


def test_records_of_other_files_are_kept_out(go, write, tmp_path):
    pytest.importorskip("rensa")
    records = read(numbered(write, "n.jsonl", 20, length=200))
    reference = write("valid.jsonl", [records[3], {"text": records[7]["text"] + "改"}, "{broken"])
    report = go(tmp_path / "n.jsonl", against=str(reference))
    assert report["dropped"] == {"leaked": 1}
    report = go(tmp_path / "n.jsonl", against=str(reference), near_duplicates="drop", overwrite=True)
    assert report["dropped"] == {"leaked": 2}
    assert [entry["duplicate_of"] for entry in read_dropped(tmp_path / "out/a.dropped.jsonl.gz")] == [
        {"file": str(reference), "line": 1}, {"file": str(reference), "line": 2},
    ]  # fmt: skip
    assert len(read(tmp_path / "out/a.jsonl")) == 18
    assert (report["read"], report["reference"]) == (20, 3)


# ---- foreign formats ---------------------------------------------------------------------------------------------

FOREIGN = {
    "alpaca.json": ('[{"instruction": "翻译", "input": "dog", "output": "狗", "id": 1}]', {"id": 1}),
    "sharegpt.jsonl": (
        '{"id": 1, "conversations": [{"from": "human", "value": "翻译\\ndog"}, {"from": "gpt", "value": "狗"}]}\n',
        {"id": 1},
    ),
    "openai.jsonl": (
        '{"messages": [{"role": "user", "content": "翻译\\ndog"}, {"role": "assistant", "content": "狗"}]}\n',
        {},
    ),
    "table.csv": ('question,answer,note\r\n"翻译\ndog",狗,x\r\n', {"note": "x"}),
    "table.tsv": ("query\tresponse\n翻译\\ndog\t狗\n", {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_conversations_become_ours(go, tmp_path, name):
    content, extra = FOREIGN[name]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    go(tmp_path / name)
    (record,) = read(tmp_path / "out/a.jsonl")
    question = "翻译\\ndog" if name == "table.tsv" else "翻译\ndog"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "狗"}]
    assert record == {"conversations": turns, **extra}


def test_parquet_pairs_and_judged_replies(go, write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"question": ["q1", "q2"], "chosen": ["好", "c"], "rejected": ["坏", "r"], "n": [1, None]})
    parquet.write_table(table, tmp_path / "pairs.parquet")
    report = go(tmp_path / "pairs.parquet")
    assert report["kind"] == "preference"
    question = {"role": "user", "content": "q1"}
    assert read(tmp_path / "out/a.jsonl")[0] == {
        "chosen": [question, {"role": "assistant", "content": "好"}],
        "rejected": [question, {"role": "assistant", "content": "坏"}],
        "n": 1,
    }
    judged = write("judged.jsonl", [{"prompt": "p", "completion": "c", "kto_tag": 1, "why": "x"}])
    assert go(judged, overwrite=True)["kind"] == "judged"
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    assert read(tmp_path / "out/a.jsonl") == [{"messages": turns, "label": True, "why": "x"}]


def test_reasoning_keeps_its_thoughts_and_its_answer(go, write, tmp_path):
    answer = "<think>\n1 < 2\n</think>\n<answer>\n<b>3</b>\n</answer>"
    record = {
        "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}],
        "final": "3",
    }
    go(write("r.jsonl", [record]), strip_html=True)
    (kept,) = read(tmp_path / "out/a.jsonl")
    assert kept["final"] == "3"
    assert kept["conversations"][1]["content"] == answer.replace("<b>", "").replace("</b>", "")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_other_encodings(go, tmp_path, encoding, is_packed):
    text = '{"text": "繁體中文測試"}\n{"text": "第二行"}\n'
    path = tmp_path / ("a.jsonl.gz" if is_packed else "a.jsonl")
    path.write_bytes(gzip.compress(text.encode(encoding)) if is_packed else text.encode(encoding))
    report = go(path, encoding=encoding)
    assert [record["text"] for record in read(tmp_path / "out/a.jsonl")] == ["繁體中文測試", "第二行"]
    assert report["inputs"][0]["path"] == str(path)
    with pytest.raises(UserError, match=r"is not big5hkscs text|is not utf-16 text|is not ascii text"):
        go(path, encoding="ascii", overwrite=True)


def test_normalisation_and_html_are_counted(go, write, tmp_path):
    path = write("a.jsonl", [{"text": "<p>ＡＢＣ</p>"}, {"text": "cafe\u0301", "log_prob": -2.0}, {"text": "<br>"}])
    report = go(path, strip_html=True, normalize="nfkc")
    assert read(tmp_path / "out/a.jsonl") == [{"text": "ABC"}, {"text": "café"}]
    assert report["changed"] == {"html": 1, "normalize": 2}
    assert report["dropped"] == {"emptied": 1}


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output": "a.json"}, "--output a.json: must end in .jsonl"),
        ({"min_characters": -1}, "--min_characters -1: must be at least 0"),
        ({"min_characters": 9, "max_characters": 3}, "--min_characters 9: is above --max_characters 3"),
        ({"language_share": 1.5}, "--language_share 1.5: is a share"),
        ({"near_threshold": 0.0}, "--near_threshold 0.0"),
        ({"valid_ratio": 1.0}, "--valid_ratio 1.0"),
        ({"mix_size": "huge"}, "--mix_size huge: allowed: smallest, largest"),
        ({"max_tokens": 5}, "give --tokenizer_path"),
        ({"encoding": "klingon"}, "--encoding klingon: unknown"),
        ({"encoding": "undefined"}, "--encoding undefined: unknown"),
        ({"data_path": "FILE:1", "mix_size": "1"}, "--mix_size 1: is less than half of any record"),
        ({"columns": "x"}, "--columns"),
        ({"data_path": "missing.jsonl"}, "no such data file"),
        ({"data_path": "FILE:0.5,FILE"}, "has no share"),
        ({"data_path": "FILE:0,FILE:1"}, "must be above 0"),
        ({"data_path": "FILE,FILE"}, "twice"),
        ({"data_path": "FILE:1", "max_records": 3}, "--weight_unit records --mix_size 3"),
        ({"data_path": "EMPTY"}, "is empty"),
        ({"min_characters": 1000}, "no record of .* is left: .*most of all min_characters"),
        ({"kind": "chat"}, "most of all other_kind"),
        ({"valid_ratio": 0.0001}, r"holds out none of .*: raise it \(no file was written\)"),
        ({"data_path": "FILE:1", "mix_size": "1000000000"}, "would be repeated"),
        ({"eval_files": "EMPTY"}, "is empty"),
        ({"eval_files": "PIQA"}, "line 1: no question found .*goal.*minillm.evaluation.harness tasks"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(write, tmp_path, settings, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"FILE": str(numbered(write, "n.jsonl", 20)), "EMPTY": str(write("empty.jsonl", []))}
    names["PIQA"] = str(write("piqa.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}]))
    settings = {"data_path": "FILE", "output": "out/a.jsonl"} | settings
    for name, path in names.items():
        settings = {k: v.replace(name, path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message):
        prepare(PrepareSettings(**settings))
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


def test_existing_files_need_overwrite(go, write, tmp_path):
    path = numbered(write, "n.jsonl", 20)
    go(path, valid_ratio=0.3)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        go(path)
    assert files_of(tmp_path) == before
    go(path, overwrite=True)  # the held-out file of the earlier run would be wrong now
    assert set(files_of(tmp_path)) == {"a.jsonl", "a.dropped.jsonl.gz", "a.report.json"}
    with pytest.raises(UserError, match="is also read"):
        go(tmp_path / "out/a.jsonl", overwrite=True)


def test_a_full_disk_changes_nothing(go, write, tmp_path, monkeypatch):
    path = numbered(write, "n.jsonl", 20)
    go(path)
    before = files_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("minillm.data.prepare.write.Output.write", full)
    with pytest.raises(UserError, match=r"cannot write x: No space left on device; make room"):
        go(path, overwrite=True)
    assert files_of(tmp_path) == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_nothing_half(write, tmp_path, python, number, code):
    path = tmp_path / "pipe.jsonl"
    path.write_text('{"text": "a"}\n' * 400_000)
    output = tmp_path / "out/a.jsonl"
    command = [
        python,
        "-m",
        "minillm.data.prepare",
        "--data_path",
        str(path),
        "--output",
        str(output),
        "--num_workers",
        "1",
    ]
    if number == signal.SIGKILL:  # the fast one is not itself the process that works
        command[0] = sys.executable
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("out/.*/lines.bin")) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error.decode()
    assert not list(tmp_path.glob("out/[!.]*"))
    if number == signal.SIGKILL:
        assert len(list(tmp_path.glob("out/.*"))) == 2  # the next run removes them
        prepare(PrepareSettings(data_path=str(write("b.jsonl", [{"text": "b"}])), output=str(output)))
    assert not list(tmp_path.glob("out/.*"))


def test_a_missing_package_is_named(go, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"--near_duplicates needs the optional package 'rensa'.*pip install rensa"):
        go(numbered(write, "n.jsonl", 3), near_duplicates="drop")


def test_the_command_prints_the_table(write, tmp_path, capsys):
    path = write("n.jsonl", [{"text": "一"}, {"text": "一"}, {"text": "二"}])
    report = main(["--data_path", str(path), "--output", str(tmp_path / "o/a.jsonl"), "--shuffle"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["read", "3", "100.00%"]
    assert lines[1].split() == ["exact_duplicate", "1", "33.33%", "dropped"]
    assert lines[2].split()[1:] == ["2", "66.67%", "written,", "32", "bytes"]
    assert lines[3:] == [f"each dropped record and the reason: {tmp_path / 'o/a.dropped.jsonl.gz'}"]
    assert report["settings"]["shuffle"] is True


def test_the_package_that_computes_signatures_is_in_the_report(go, write):
    pytest.importorskip("rensa")
    assert go(numbered(write, "n.jsonl", 3))["packages"] == {}
    assert set(go(numbered(write, "n.jsonl", 3), near_duplicates="drop", overwrite=True)["packages"]) == {"rensa"}
    assert run.RULES[0] == ""
