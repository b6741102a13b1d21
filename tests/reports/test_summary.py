"""The picture, the page and the card: made from the rows, safe to open, complete without matplotlib."""

import builtins
import html
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from minillm.checkpoints.outputs import WholeModel
from minillm.cli.arguments import PretrainArguments
from minillm.config import ModelConfig
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.model.sizes import size_of
from minillm.objectives.objective import Objective
from minillm.reports import summary
from minillm.training.describe import facts_of, run_file_of
from minillm.training.step import Progress
from minillm.training.validation import LossAlone

FLOOR = 1.2345
LAST_EVAL = {"loss": 1.5, "n_targets": 9.0, "bits_per_byte": 0.75, "floor": FLOOR}

pytestmark = pytest.mark.usefixtures("real_pictures")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that is over, with training rows, validation rows and a floor."""
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", "--data_path", "a b.jsonl"])
    rows = [{"step": s, "split": "train", "loss": 5 - s, "lr": 1e-3 / s, "grad_norm": 0.5 * s} for s in (1, 2, 3)]
    rows += [{"step": s, "split": "valid", "loss": 4.5 - s, "floor": FLOOR} for s in (2, 3)]
    (tmp_path / "pretrain_16").mkdir()
    (tmp_path / "pretrain_16" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    printed = []
    model = Transformer(ModelConfig(vocab_size=31, **shape))
    return SimpleNamespace(
        stage="pretrain",
        output=WholeModel(),
        directory=tmp_path / "pretrain_16",
        args=PretrainArguments(data_path="a b.jsonl", max_seq_len=24),
        model=model,
        size=size_of(model, 24),
        loader=SimpleNamespace(rows=SimpleNamespace(data_hash="ab" * 32, summary={"rows": np.int64(7), "t": (1, 2)})),
        ranks=SimpleNamespace(world_size=2),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        rows_per_step=6,
        total_steps=3,
        progress=Progress(step=3, tokens=1234, seconds=2.4, last_eval=LAST_EVAL),
        log=SimpleNamespace(print=printed.append, alarm=SimpleNamespace(messages=[])),
        printed=printed,
        objective=Objective(causal_lm_loss),
        metrics=LossAlone(),
        stops_early=False,
    )


def write_page(run, samples, sections=()):
    texts = {"tags": run.output.tags, "usage": run.output.usage, "stage": run.stage, "unit": run.objective.unit}
    summary.write_summary(
        run.directory,
        facts_of(run),
        samples,
        **texts,
        report=run.log.print,
        metrics=run.metrics.names,
        sections=sections,
    )


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are drawn, for a look at their axes."""
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), real(figure, *a, **k))[1])
    return figures


def lines_of(axis):
    """The curves of an axis by label, each as a list of (x, y)."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()}


def test_the_curves_are_the_rows(run, drawn):
    write_page(run, [])
    (figure,) = drawn
    loss, rate, norm = (lines_of(axis) for axis in figure.axes)
    assert loss["training"] == [(1, 4), (2, 3), (3, 2)]
    assert loss["validation"] == [(2, 2.5), (3, 1.5)]
    assert {y for _, y in loss[f"entropy floor {FLOOR:.3f}"]} == {FLOOR}
    assert list(rate.values()) == [[(1, 1e-3), (2, 5e-4), (3, 1e-3 / 3)]]
    assert list(norm.values()) == [[(1, 0.5), (2, 1.0), (3, 1.5)]]
    assert (run.directory / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_load_of_the_experts_is_drawn_below(drawn, tmp_path):
    """A row whose steps were all skipped has no share; a layer's busiest expert is told in fair shares."""
    rows = [
        {"step": step, "split": "train", "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "expert_share": share}
        for step, share in [(1, [[0.7, 0.1, 0.2], [1.0, 0.0, 0.0]]), (2, None), (3, [[0.2, 0.3, 0.5], [0.4, 0.3, 0.3]])]
    ]
    summary.draw_curves(rows, tmp_path / "x.png", title="t")
    *_, busiest, entropy = (lines_of(axis) for axis in drawn[0].axes)
    assert len(drawn[0].axes) == 5
    for label, (first, last) in {"layer 0": (2.1, 1.5), "layer 1": (3.0, 1.2)}.items():
        assert [step for step, _ in busiest[label]] == [1, 3]
        assert [load for _, load in busiest[label]] == pytest.approx([first, last])
    shares = np.array([0.2, 0.3, 0.5])
    assert entropy["layer 0"][1] == (3, pytest.approx(-(shares * np.log(shares)).sum() / np.log(3)))
    assert entropy["layer 1"][0] == (1, 0)


def test_facts_and_run_yaml_tell_the_active_share(run):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "scoring_func": "sigmoid", "n_shared_experts": 1, "moe_intermediate_size": 8}
    run.model = Transformer(ModelConfig(vocab_size=31, **shape, **experts))
    run.size = size_of(run.model, 24)
    total, active = run.model.config.num_parameters(), run.model.config.num_parameters(active=True)
    assert active == total - 2 * 3 * 16 * 8
    assert facts_of(run)["parameters"] == f"{total:,} ({active:,} active per token, {active / total:.0%})"
    summary.write_run_file(run.directory, run_file_of(run))
    content = yaml.safe_load((run.directory / "run.yaml").read_text(encoding="utf-8"))
    assert (content["n_parameters"], content["n_active_parameters"]) == (total, active)


@pytest.mark.parametrize("splits", [(), ("train",), ("valid",), ("train", "valid")])
def test_without_a_floor_there_is_no_line_and_any_rows_will_do(run, drawn, tmp_path, splits):
    rows = [{"step": 1, "split": split, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0} for split in splits]
    summary.draw_curves(rows, tmp_path / "x.png", title="t")
    labels = set(lines_of(drawn[0].axes[0]))
    assert not any("floor" in label for label in labels)
    assert ("validation" in labels) == ("valid" in splits)


def test_figures_are_closed(run):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    write_page(run, [])
    assert plt.get_fignums() == before


def test_the_page_escapes_what_models_and_users_write(run):
    nasty = "<script>alert('1')</script> & \"2\""
    run.args = PretrainArguments(data_path="<b>.jsonl")
    write_page(run, [(nasty, nasty + "\n<img>")])
    page = (run.directory / "summary.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>.jsonl" not in page
    assert page.count(html.escape(nasty)) == 2
    assert page.count("<img ") == 3  # the panels of the picture
    assert 'src="data:image/png;base64,' in page
    assert f"{FLOOR:.4f}" in page


def test_facts_say_what_was_done(run):
    facts = facts_of(run)
    assert facts["command"] == "python train_pretrain.py --data_path 'a b.jsonl'"  # can be pasted as it is
    assert facts["steps"] == "3 of 6 rows x 24 tokens"
    assert facts["tokens seen"] == "1,234"
    assert facts["training time"] == "2 s on cpu (bfloat16)"
    assert facts["parameters"] == f"{run.model.config.num_parameters():,}"
    assert facts["data"] == f"a b.jsonl (hash {'ab' * 8})"
    assert facts["validation loss (nats/token)"] == "1.5000"
    assert facts["bits per byte"] == "0.7500"
    assert "skipped steps (float16 overflow)" not in facts
    run.progress.skipped_steps, run.progress.last_eval = 3, {}
    facts = facts_of(run)
    assert facts["skipped steps (float16 overflow)"] == "3"
    assert not any("validation" in name for name in facts)


def test_the_model_card_has_metadata_facts_and_samples(run):
    write_page(run, [("a question", "an\nanswer"), ("  ", "after nothing")])
    card = (run.directory / "README.md").read_text(encoding="utf-8")
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for words in ("# pretrain_16", "stage `pretrain`", "| tokens seen | 1,234 |", "**a question**", "![curves]"):
        assert words in body
    assert "```\nan\nanswer\n```" in body
    assert "**(empty)**" in body


def test_a_sample_with_backticks_does_not_break_the_card(run):
    """The fence around a sample must be longer than any run of backticks within it."""
    write_page(run, [("code", "```\nprint(1)\n```\n# not a heading")])
    card = (run.directory / "README.md").read_text(encoding="utf-8")
    assert "````\n```\nprint(1)\n```\n# not a heading\n````" in card


def test_without_matplotlib_only_the_picture_is_missing(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    write_page(run, [("q", "a")])
    (line,) = run.printed
    assert "pip install matplotlib" in line
    page = (run.directory / "summary.html").read_text(encoding="utf-8")
    assert "pip install matplotlib" in page
    assert "<img" not in page
    assert "<pre>a</pre>" in page
    assert not (run.directory / "summary.png").exists()
    assert "summary.png" not in (run.directory / "README.md").read_text(encoding="utf-8")  # no link to nothing


def test_run_yaml_is_plain_and_complete(run):
    summary.write_run_file(run.directory, run_file_of(run))
    content = yaml.safe_load((run.directory / "run.yaml").read_text(encoding="utf-8"))
    assert content["resolved"] == {
        "device": "cpu", "dtype": "bfloat16", "ranks": 2, "rows_per_step": 6, "total_steps": 3
    }  # fmt: skip
    assert content["data"] == {"hash": "ab" * 32, "summary": {"rows": 7, "t": [1, 2]}}  # NumPy's numbers are plain
    assert content["arguments"]["max_seq_len"] == 24
    assert content["model"]["vocab_size"] == 31
    assert content["n_parameters"] == run.model.config.num_parameters()
    assert content["command"] == "train_pretrain.py --data_path 'a b.jsonl'"
    assert content["loss"] == {"name": run.objective.name, "unit": "token"}
    assert set(content["versions"]) == {"minillm", "torch", "python"}
    assert not [path for path in run.directory.iterdir() if ".tmp" in path.name]


def test_the_git_revision_is_one_or_none(monkeypatch):
    revision = summary.git_revision()
    assert revision is None or len(revision) == 40

    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(summary.subprocess, "run", no_git)
    assert summary.git_revision() is None


def test_preference_tuning_has_its_figures_below(run, drawn):
    rows = [{"step": s, "split": split, "loss": 1 / s, "lr": 1e-3, "grad_norm": 1.0, "accuracy": s / 4, "kl": 0.1 * s,
             "reward_chosen": s, "reward_rejected": -s, "log_prob_chosen": -9, "log_prob_rejected": None}
            for s in (1, 2, 3) for split in ("train", "valid")]  # fmt: skip
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.objective.unit, run.progress.last_eval = "pair", {"loss": 0.6, "accuracy": 0.75}
    write_page(run, [])
    (figure,) = drawn
    loss, _, _, accuracy, rewards, log_probs, distance = figure.axes
    assert loss.get_ylabel() == "nats per pair"
    assert lines_of(accuracy)["accuracy"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert lines_of(rewards)["rejected reply"] == [(1, -1), (2, -2), (3, -3)]
    assert set(lines_of(log_probs)) >= {"chosen reply"}
    assert "rejected reply" not in lines_of(log_probs)
    assert len(distance.get_lines()) == 2  # a line of training, dots of validation
    card = (run.directory / "README.md").read_text()
    assert "| validation loss (nats/pair) | 0.6000 |" in card
    assert "| pairs with the chosen reply ahead | 0.7500 |" in card


# ---- metrics and answers over time --------------------------------------------------------------------------------


def test_metrics_are_drawn_and_the_best_value_of_the_first_is_marked(run, drawn):
    run.metrics.names = ("exact", "loss", "bleu", "f1")
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    for row, exact, score in zip(rows[3:], (0.5, 0.25), (3.0, None), strict=True):
        row |= {"exact": exact, "bleu": score}
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(run, [])
    *_, exact, bleu = drawn[0].axes
    assert len(drawn[0].axes) == 5  # nothing has measured f1
    assert lines_of(exact) == {"exact": [(2, 0.5), (3, 0.25)], "best/": [(2, 0.5)]}
    assert lines_of(bleu) == {"bleu": [(2, 3.0)]}
    assert (exact.get_title(), bleu.get_title()) == ("exact of validation", "bleu of validation")


def test_answers_over_time_are_a_table(run):
    rows = [
        {"step": step, "question": question, "answer": f"<b>{question} {step}", "expected": f"{question}!"}
        for step in (1, 2, 5, 6, 7, 8, 9, 10, 11, 20)
        for question in ("a&b", "小明")
    ]
    rows[0]["question"] = "another question"  # asked before the run was resumed
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.directory / "samples.jsonl").write_text(text + '{"step": 20, "quest')  # cut short by a kill
    write_page(run, [])
    page = (run.directory / "summary.html").read_text(encoding="utf-8")
    steps = (1, 5, 7, 8, 10, 20)  # of ten six, with the first and the last
    head = "".join(f"<th>{name}</th>" for name in ("question", *(f"step {step}" for step in steps), "expected"))
    assert f"<tr>{head}</tr>" in page
    first, second = (
        [question, *(f"&lt;b&gt;{question} {step}" for step in steps), f"{question}!"]
        for question in ("a&amp;b", "小明")
    )
    first[1] = ""
    for cells in (first, second):
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in page
    assert "<b>" not in page


def test_without_answers_there_is_no_table(run):
    write_page(run, [])
    assert "Answers over time" not in (run.directory / "summary.html").read_text(encoding="utf-8")


def test_the_best_value_and_an_early_end_are_facts(run):
    run.progress = Progress(step=3, best_value=0.25, best_step=2, n_without_gain=1, last_eval=LAST_EVAL | {"f1": 0.2})
    run.metrics.names, run.args = ("f1",), PretrainArguments(data_path="x", patience=1)
    facts = facts_of(run)
    assert (facts["best/"], facts["f1"]) == ("f1 0.2500 at step 2", "0.2000")
    assert "stopped early" not in facts
    run.stops_early, run.total_steps = True, 9
    assert facts_of(run)["stopped early"].startswith(
        "stopped after step 3 of 9: f1 has not been better in 1 validation"
    )


def test_speed_memory_and_use_of_the_machine_are_drawn_last(run, drawn):
    rows = [{"step": s, "split": "train", "loss": 1 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 100.0 * s,
             "cpu_memory_gib": 0.5, "gpu_peak_gib": 2.0 * s, "gpu_percent": 90 if s > 1 else None, "cpu_percent": 101.0}
            for s in (1, 2, 3)]  # fmt: skip
    panels = summary.draw_curves(rows, run.directory / "x.png", title="t")
    (figure,) = drawn
    _, _, _, speed, memory, use = (lines_of(axis) for axis in figure.axes)
    assert list(speed.values()) == [[(1, 100), (2, 200), (3, 300)]]
    assert memory == {"GPU: tensors, peak": [(1, 2), (2, 4), (3, 6)], "CPU: resident": [(1, 0.5), (2, 0.5), (3, 0.5)]}
    assert use["GPU"] == [(2, 90), (3, 90)]
    assert len(panels) == 6
    assert figure.axes[4].get_ylim()[1] > 6  # the highest point is inside


def test_each_panel_is_cut_out_of_the_picture(run):
    from matplotlib.image import imread

    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    path = run.directory / "x.png"
    panels = summary.draw_curves(rows, path, title="名字 <&>")
    whole = imread(path)
    for number, panel in enumerate(panels):
        (run.directory / "panel.png").write_bytes(panel)
        cut = imread(run.directory / "panel.png")
        assert cut.shape[0] < whole.shape[0] + 1
        assert (0.4 if number == 0 else 0.15) < cut.shape[1] / whole.shape[1] < (0.6 if number == 0 else 0.35)
        corners = [cut[y, x, :3].min() for y in (0, -1) for x in (0, -1)]
        assert min(corners) == 1  # nothing is cut in two
        assert cut[..., :3].min() < 0.5


def test_the_page_can_be_read_on_a_phone_and_has_the_sections_with_their_pictures(run):
    write_page(run, [])
    page = (run.directory / "summary.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in page
    assert page.count("<img ") == 3
    monitor = run.directory / "monitor.png"
    section = summary.Section("The adapter", "Its <last> look.", [["matrix", "norm"], ["A", "0.5"]], monitor)
    for n_pictures in (3, 4):
        write_page(run, [], [section])
        page = (run.directory / "summary.html").read_text(encoding="utf-8")
        assert "<h2>The adapter</h2>" in page
        assert "Its &lt;last&gt; look." in page
        assert "<td>0.5</td>" in page
        assert page.count("<img ") == n_pictures
        monitor.write_bytes((run.directory / "summary.png").read_bytes())


@pytest.mark.parametrize("train, is_above", [(1.6, True), (1.4, False), (None, False)])
def test_a_training_loss_above_validation_is_explained(run, train, is_above):
    rows = [{"step": 1, "split": "train", "loss": train, "lr": 1e-3, "grad_norm": 1.0}] if train else []
    rows += [{"step": 1, "split": "valid", "loss": 1.5}]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(run, [])
    page = (run.directory / "summary.html").read_text(encoding="utf-8")
    assert ("Why is the training loss above" in page) == is_above
