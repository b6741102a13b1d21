"""Comparing result files, and the tables and pictures of suites."""

import json

import pytest

from minillm.evaluation import compare_scores
from minillm.evaluation.suites.report import describe, draw_radar, line, markdown


def score(correct, *, chance=0.25, n_truncated=0, **more):
    n = len(correct)
    questions = [{"id": f"q{number}", "correct": bool(value)} for number, value in enumerate(correct)]
    values = {"n": n, "accuracy": sum(correct) / n, "interval": [0.2, 0.9], "chance": chance, "style": "texts"}
    values |= {"subject_average": 0.5, "accuracy_normalized": 0.4, "n_shot": 0, "seconds": 1.25}
    return values | {"n_truncated": n_truncated, "questions": questions} | more


FIRST, SECOND = [1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1]


@pytest.fixture
def files(tmp_path):
    contents = {
        "a.json": {"suites": {"mmlu": score(FIRST), "piqa": score([1, 0], chance=0.5), "own": score([1])}},
        "b.json": {"suites": {"piqa": score([0, 0], chance=0.5), "mmlu": score(SECOND)}},
        "other.json": {"suites": {"cmath": score([1])}},
        "shots.json": {"suites": {"mmlu": score(FIRST, n_shot=5)}},
        "none.json": {"suites": {}},
        "bare.json": {"perplexity": 1},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def run(capsys, *argv):
    try:
        compare_scores.main([str(word) for word in argv])
        code = 0
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_differences(files, capsys):
    code, shown, _ = run(capsys, files / "a.json", files / "b.json", "--output", files / "c.md", "--picture",
                         files / "c.png")  # fmt: skip
    assert code == 0
    assert shown.endswith(f"wrote {files / 'c.md'}\nwrote {files / 'c.png'}\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in shown.splitlines() if row.startswith("|")]
    assert ["mmlu", "25.0%", "50.0% (20.0% to 90.0%)", "83.3% (20.0% to 90.0%)"] in rows
    assert ["own", "25.0%", "100.0% (20.0% to 90.0%)", "-"] in rows
    (mmlu,) = [row for row in rows if row[0] == "mmlu" and len(row) == 7]
    assert (mmlu[1:3], mmlu[4:]) == (["6", "+33.3%"], ["1", "3", "0.62"])  # 2·(1 + 4)/2⁴
    (together,) = [row for row in rows if row[0] == "all questions"]
    assert (together[1:3], together[4:]) == (["8", "+12.5%"], ["2", "3", "1"])
    assert (files / "c.md").read_text() in shown
    assert (files / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.json"], ["1 result file", "at least two"]),
        (["a.json", "missing.json"], ["missing.json", "no such file"]),
        (["a.json", "broken.json"], ["broken.json"]),
        (["a.json", "bare.json"], ["bare.json", "suites"]),
        (["a.json", "none.json"], ["none.json", "no suites"]),
        (["a.json", "other.json"], ["no suite in common"]),
        (["a.json", "shots.json"], ["mmlu", "n_shot is 0 and 5"]),
    ],
)
def test_what_cannot_be_compared(files, capsys, names, words):
    code, _, err = run(capsys, *(files / name for name in names))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err


def test_tables():
    scores = {"MMLU": score(FIRST, random={"accuracy": 0.2}, n_truncated=3), "GSM8K": score([0], style="number")}
    head, row = line(), line("MMLU", scores["MMLU"])
    assert len(head) == len(row)
    for text in ("50.0%", "20.0% to 90.0%", "40.0%", "25.0%", "20.0%", "1.2"):
        assert text in row
    page = markdown("a model", scores)
    assert page.startswith("# a model\n\n| suite |")
    assert "| GSM8K | 1 | 0.0% | 20.0% to 90.0% | 50.0% | - |" in page
    assert "MMLU 3" in describe(scores)
    assert "Not better than chance" in describe(scores)
    assert describe({"x": score(FIRST, chance=0.1)}) == ""


@pytest.mark.parametrize("n", [1, 2, 4])
def test_pictures(tmp_path, n):
    scores = {f"suite {number}": score(FIRST, random={"accuracy": 0.2}) for number in range(n)}
    draw_radar(tmp_path / "x.png", {"one": scores, "two": {"suite 0": score(SECOND)}})
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written(files, capsys):
    code, _, err = run(capsys, files / "a.json", files / "b.json", "--picture", files / "missing/x.png")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "missing/x.png: No such file or directory" in err
