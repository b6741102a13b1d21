"""Runs next to each other: of any stage, whole or not, with whatever their files hold."""

import base64
import html.parser
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from minillm.compare.__main__ import main
from minillm.compare.curves import draw_runs, panels_of, small_curve
from minillm.compare.runs import differences, find_runs, is_run, read_runs, runs_of, unique_names
from minillm.errors import UserError

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"learning_rate": 5e-4, "epochs": 2, "use_moe": False, "run_name": "", "from_weight": ""}


def rows_of(losses, *, valid=(), **more):
    rows = [
        {"step": 10 * n, "split": "train", "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": 1000 * n,
         "seconds": 2.0 * n, "tokens_per_s": 500.0, "cpu_memory_gib": 0.25 * n}
        for n, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    rows += [
        {"step": 10 * n, "split": "valid", "loss": loss, "tokens": 1000 * n, "seconds": 2.0 * n, "n_targets": 9.0}
        | more
        for n, loss in valid
    ]
    return rows


@pytest.fixture
def make_run(tmp_path):
    """Call it with a path below tmp_path: makes a run directory there and returns it."""

    def make_run(name, rows, *, stage="pretrain", **arguments):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        content = {
            "stage": stage, "command": "python x.py", "arguments": ARGUMENTS | arguments,
            "resolved": {"total_steps": 30, "dtype": "bfloat16"}, "model": {"hidden_size": 64}, "n_parameters": 12345,
            "data": {"hash": "ab" * 32}, "versions": {"torch": "2.13.0"}, "git_revision": None,
        }  # fmt: skip
        (path / "run.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return path

    return make_run


def read(*paths):
    paths = list(paths)
    return read_runs(paths, unique_names(paths))


class Page(html.parser.HTMLParser):
    """Collects texts and attributes, and checks that tags close."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.attributes, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def drawn(monkeypatch):
    """Spare the drawing of pages, which takes seconds: a panel is the name of its axis. All axes come back."""
    axes = []

    def draw(runs, path, *, x):
        axes.append(x)
        path.write_bytes(x.encode())
        return [x.encode()] * len(panels_of(runs))

    monkeypatch.setattr("minillm.compare.__main__.draw_runs", draw)
    return axes


# ---- which runs --------------------------------------------------------------------------------------------------


def test_all_runs_below_a_directory_and_nothing_else(make_run, tmp_path):
    rows = rows_of([2.0])
    wanted = [make_run(name, rows) for name in ("a", "a/earlier-1", "lora/cook_512", "z")]
    for name in ("a/best", "a/checkpoints/step-00000001", "a/wandb/run", ".token_cache/x"):
        make_run(name, rows)
    (tmp_path / "tokenizer").mkdir()
    assert find_runs(tmp_path) == wanted
    assert runs_of([str(tmp_path)]) == wanted
    assert is_run(wanted[0])
    assert not is_run(tmp_path)


def test_a_run_named_twice_is_one(make_run, tmp_path):
    a, b = make_run("a", rows_of([2.0])), make_run("b", rows_of([2.0]))
    (tmp_path / "link").symlink_to(a)
    assert runs_of([str(a), str(tmp_path / "link"), str(b), str(b) + "/"]) == [a, b]


def test_names_are_as_long_as_it_takes(tmp_path):
    paths = [tmp_path / name for name in ("out/x/run", "out/y/run", "other/y/run", "out/fast")]
    assert unique_names(paths) == ["x/run", "out/y/run", "other/y/run", "fast"]
    assert unique_names([tmp_path / "one"]) == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such directory"),
        ("file", r"is a file; name the directory that it is in"),
        ("empty", r"is not a run and holds none: a run has metrics\.jsonl and run\.yaml"),
    ],
)
def test_what_is_no_run_is_one_clear_line(tmp_path, capsys, content, message):
    path = tmp_path / "x"
    if content == "file":
        path.write_text("hello")
    elif content == "empty":
        path.mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(path)])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert re.search(f"^error: .*{message}", told.err)


def test_a_run_without_rows_cannot_be_compared_but_is_listed(make_run, tmp_path, capsys):
    good, empty = make_run("out/good", rows_of([2.0])), make_run("out/empty", [])
    (empty / "metrics.jsonl").write_bytes(b'\x00\xff not json\n{"step": "3"}\n[1]\n')
    with pytest.raises(SystemExit):
        main([str(good), str(empty)])
    assert f"error: {empty}: metrics.jsonl has no row" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("compare*"))
    main([str(tmp_path / "out")])
    assert "empty" in Page(tmp_path / "out" / "index.html").texts


# ---- what they tell ----------------------------------------------------------------------------------------------


def test_results_are_those_of_the_rows(make_run):
    (run,) = read(make_run("a", rows_of([4.0, 3.0, 2.5], valid=[(1, 2.2), (2, 2.0), (3, 2.1)])))
    results = run.results()
    assert results["training loss"] == "2.5000"
    assert results["validation loss"] == "2.1000"
    assert results["lowest loss"] == "2.0000 at step 20"
    assert (results["steps"], results["tokens"], results["training time"]) == ("30", "3,000", "0:06")
    assert (results["tokens/s"], results["memory"], results["nats per"]) == ("500", "0.75 GiB", "token")
    assert run.points("valid", "loss", x="tokens") == [(1000, 2.2), (2000, 2.0), (3000, 2.1)]


def test_rows_that_others_wrote_badly_cost_only_themselves(make_run):
    """NaN, none, texts, true, no split, no time; not in order, as after two processes wrote at once."""
    rows = rows_of([4.0, 3.0])[::-1]
    rows += [
        {"step": 30, "split": "train", "loss": float("nan")}, {"step": 31, "split": "train", "loss": None},
        {"step": 32, "split": "train", "loss": "2"}, {"step": 33, "split": "train", "loss": True},
        {"step": 34, "loss": 1.0}, {"step": 35, "split": "hardware"}, {"step": 12, "split": "valid", "loss": 3.5},
    ]  # fmt: skip
    (run,) = read(make_run("a", rows))
    assert run.points("train", "loss") == [(10, 4.0), (20, 3.0)]
    assert run.points("valid", "loss", x="seconds") == []
    results = run.results()
    assert (results["training loss"], results["validation loss"]) == ("3.0000", "3.5000")
    assert results["steps"] == "33 of 30"
    assert results["training time"] == "–"


def test_only_settings_that_differ_are_shown(make_run):
    a = make_run("a", rows_of([2.0]), run_name="x", from_weight="文")
    b = make_run("b", rows_of([2.0]), run_name="y", learning_rate=1e-3, use_moe=True)
    c = make_run("c", rows_of([2.0]), stage="lora", lora_rank=8)
    shared, others = differences(read(a, b, c))
    assert shared == {
        "stage": ["pretrain", "pretrain", "lora"],
        "--learning_rate": ["0.0005", "0.001", "0.0005"],
        "--use_moe": ["no", "yes", "no"],
        "--from_weight": ["文", "none", "none"],
    }
    assert others == {"--lora_rank": ["–", "–", "8"]}
    assert differences(read(a, a)) == ({}, {})


@pytest.mark.parametrize("content", [None, "a: [", "- 1\n", "arguments: 3\nresolved: null\ndata: x\nloss: 2\n", "\x00"])
def test_a_run_file_that_is_missing_or_broken_costs_only_its_settings(make_run, capsys, drawn, content):
    a, b = make_run("a", rows_of([2.0])), make_run("b", rows_of([3.0]), learning_rate=1.0)
    c = make_run("c", rows_of([1.0]), learning_rate=2.0)
    (a / "run.yaml").unlink()
    if content is not None:
        (a / "run.yaml").write_text(content)
    runs = read(a, b, c)
    assert runs[0].points("train", "loss") == [(10, 2.0)]
    shared, _ = differences(runs)
    assert shared == {"--learning_rate": ["–", "1", "2"]}
    main([str(a), str(b)])
    assert f"{a}: no readable run.yaml" in capsys.readouterr().out


# ---- curves ------------------------------------------------------------------------------------------------------


def of_preference(losses):
    figures = {"accuracy": 0.75, "reward_chosen": 0.5, "reward_rejected": -0.5}
    return rows_of(losses, valid=[(1, 0.6), (2, 0.5)], **figures)


def test_losses_of_tokens_and_of_pairs_are_in_panels_of_their_own(make_run):
    runs = read(
        make_run("pretrain", rows_of([4.0, 3.0], valid=[(2, 2.9)], bits_per_byte=1.5)),
        make_run("rlhf", of_preference([0.69, 0.5]), stage="rlhf"),
        make_run("sft", rows_of([2.0, 1.5]), stage="full_sft"),  # no validation
    )
    panels = {
        title: [run.name for run in shown if run.points(split, key)] for title, split, key, shown in panels_of(runs)
    }
    assert panels["training loss, nats per token"] == ["pretrain", "sft"]
    assert panels["validation loss, nats per token"] == ["pretrain"]
    assert panels["training loss, nats per pair"] == ["rlhf"]
    assert panels["validation: share of replies on the right side"] == ["rlhf"]
    assert panels["validation: reward of the chosen reply"] == ["rlhf"]
    assert panels["validation: bits per byte"] == ["pretrain"]
    assert panels["learning rate"] == ["pretrain", "rlhf", "sft"]
    assert not any("GPU" in title for title in panels)


@pytest.mark.parametrize("x, at", [("step", [10, 20]), ("tokens", [1000, 2000]), ("seconds", [2.0, 4.0])])
def test_the_curves_are_the_rows(make_run, tmp_path, monkeypatch, x, at):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), real(figure, *a, **k))[1])
    runs = read(make_run("a", rows_of([4.0, 3.0])), make_run("b" * 60, rows_of([5.0, 1.0], valid=[(2, 2.0)])))
    cuts = draw_runs(runs, tmp_path / "x.png", x=x)
    (figure,) = figures
    lines = [list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].get_lines()]
    assert lines == [list(zip(at, [4.0, 3.0], strict=True)), list(zip(at, [5.0, 1.0], strict=True))]
    assert len(cuts) == len(figure.axes) == len(panels_of(runs))
    assert all(cut.startswith(b"\x89PNG") for cut in cuts)
    assert all(len(text.get_text()) <= 40 for text in figure.axes[0].get_legend().get_texts())


def test_a_small_curve_has_the_points_within_it(make_run):
    (run,) = read(make_run("a", rows_of([4.0, 3.0, 2.0], valid=[(3, 2.5)])))
    numbers = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", small_curve(run))]
    assert numbers == [(2, 2), (70, 18), (138, 34), (138, 26)]
    (constant,) = read(make_run("b", rows_of([2.0])))
    assert "70.0,18.0" in small_curve(constant)  # in the middle
    (empty,) = read(make_run("c", []))
    assert small_curve(empty) == ""


# ---- pages -------------------------------------------------------------------------------------------------------


def test_the_comparison_is_one_file_with_all_three_axes(make_run, tmp_path, capsys, drawn):
    a = make_run("out/a", rows_of([4.0, 3.0], valid=[(2, 2.75)]))
    b = make_run("out/<b> & 文", of_preference([0.7, 0.6]), stage="rlhf", learning_rate=1e-5)
    main([str(a), str(b)])
    told = capsys.readouterr().out
    assert f"saved {tmp_path / 'out' / 'compare.html'}" in told
    assert drawn == ["tokens", "seconds", "step"]
    assert (tmp_path / "out" / "compare.png").read_bytes() == b"step"
    page = Page(tmp_path / "out" / "compare.html")
    for text in ("a", "<b> & 文", "2.7500 at step 20", "--learning_rate", "1e-05", "reward of the chosen reply"):
        assert text in page.texts
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    panels = [base64.b64encode(x.encode()).decode() for x in drawn for _ in panels_of(read(a, b))]
    assert [image["src"] for image in images] == [f"data:image/png;base64,{panel}" for panel in panels]
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.attributes
    checked = [attributes["id"] for tag, attributes in page.attributes if tag == "input" and "checked" in attributes]
    assert checked == ["by_step"]
    outside = [v for _, each in page.attributes for k, v in each.items() if k in ("href", "src") and "data:" not in v]
    assert outside == []


def test_the_index_leads_to_the_pages_of_the_runs(make_run, tmp_path):
    make_run("out/a b", rows_of([4.0, 3.0]))
    adapter = make_run("out/lora/<cook>_64", rows_of([2.0]), stage="lora")
    (adapter / "summary.html").write_text("x")
    main([str(tmp_path / "out")])
    page = Page(tmp_path / "out" / "index.html")
    (link,) = [attributes["href"] for tag, attributes in page.attributes if tag == "a"]
    assert (tmp_path / "out" / link).resolve() == adapter / "summary.html"
    for text in ("a b", "lora/<cook>_64", "20 of 30", "3.0000"):
        assert text in page.texts
    main([str(tmp_path / "out"), "--output", str(tmp_path / "elsewhere")])
    (link,) = [each["href"] for tag, each in Page(tmp_path / "elsewhere" / "index.html").attributes if tag == "a"]
    assert (tmp_path / "elsewhere" / link).resolve() == adapter / "summary.html"


def test_without_matplotlib_only_the_curves_are_missing(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    main([str(make_run("out/a", rows_of([4.0])))])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert "4.0000" in Page(tmp_path / "out" / "compare.html").texts
    assert not (tmp_path / "out" / "compare.png").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(make_run, tmp_path):
    run = make_run("out/a", rows_of([4.0]))
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to .*taken: .*; choose another --output"):
        main.__wrapped__([str(run), "--output", str(tmp_path / "taken")])


def test_as_a_process_that_needs_no_argument(make_run, tmp_path, python):
    make_run("out/a", rows_of([4.0]))
    done = subprocess.run(
        [python, "-m", "minillm.compare"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "saved out/index.html" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "index.html", "metrics.jsonl", "run.yaml",
    ]  # fmt: skip
