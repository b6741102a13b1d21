"""Writes the results of the demo as one page: ``python dataset/demo_report.py [--save_dir out/demo]``

The page is a single file in English and Chinese: the table of ``demo_table.py``, and for each stage its curves and
samples before and after it; the times, the data and its tokens. A stage that is missing or was shortened is named.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from demo_table import Line, all_lines, read_result  # noqa: E402
from demo_words import FILES, KINDS, METRICS_ZH, OTHER_RUNS, STAGES, UNITS, WORDS, in_languages, texts  # noqa: E402
from demo_world.arguments import DemoDataArguments  # noqa: E402

from minillm.cli.command_line import parse, script  # noqa: E402
from minillm.compare.runs import NONE, RunRecord, read_run_file, read_runs  # noqa: E402
from minillm.data import read_records  # noqa: E402
from minillm.data.report import data_report, open_rows  # noqa: E402
from minillm.errors import UserError  # noqa: E402
from minillm.files import replace_text  # noqa: E402
from minillm.hub import open_model  # noqa: E402
from minillm.inference.samples import sample_completions  # noqa: E402
from minillm.model import Transformer  # noqa: E402
from minillm.reports.chart import CHART_STYLE, Curve, chart, is_wide  # noqa: E402
from minillm.reports.page import LANGUAGES, both, both_html, language_page, wide_table  # noqa: E402
from minillm.reports.tracking import duration  # noqa: E402
from minillm.tokenizer import load_tokenizer  # noqa: E402

N_SAMPLES = 6
STYLE = (
    ".results{font-size:15px;width:100%;max-width:46em}.results td,.results th{border-bottom:1px solid #8883}"
    ".results .number,.results th+th{text-align:right;white-space:nowrap;padding-right:.4em}"
    ".results .stage th{padding-top:.9em}.state{font-weight:400;font-size:14px;color:#777}"
    ".state.bad,.wrong{color:#c2571a}.right-answer{color:#3b7d3b}.contents a{margin-right:1.2em;white-space:nowrap}"
    ".samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:.8em;margin:1em 0}"
    ".sample{border:1px solid #8884;border-radius:6px;padding:.6em .8em;font-size:14px;min-width:0}"
    ".sample b{display:block;white-space:pre-wrap;overflow-wrap:anywhere}"
    ".sample pre{margin:.1em 0 .4em;padding:.3em .5em}"
    ".sample span{color:#777}.corpora{display:grid;gap:0 2em;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}.corpora>div{min-width:0}"
    "h2{margin-top:2em;border-top:1px solid #8884;padding-top:.6em}.bars td{padding:.05em .8em .05em 0;font-size:14px}"
    ".percent{display:inline-block;width:4em}"
    "@media(max-width:600px){.lines td{white-space:normal}.lines td,.lines th{padding-right:.7em}"
    ".lines .long{min-width:0}}"
    "@media(prefers-color-scheme:dark){.state,.sample span{color:#aaa}.state.bad,.wrong{color:#e9a06b}"
    ".right-answer{color:#7dbb7d}}"
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the page of a demo's stages."""

    save_dir: str = "out/demo"
    """Directory of the demo's runs, with the folder results that eval_model.py writes."""
    data_dir: str = "dataset/demo"
    """Directory of the demo's data."""
    output: str = ""
    """The page (default: SAVE_DIR/report.html)."""
    started: int = 0
    """When the demo began, in seconds since 1970, for the time of the whole (0: not shown)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the demo: its name in the table, its run and what it is compared with, below the demo's directory.

    Attributes:
        config: its file in configs/demo. chapters: numbers of the course's.
        before, after: where the answers of its samples are: the name of a result file, and keys.
    """

    name: str
    run: str
    config: str
    chapters: tuple[int, ...]
    others: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


TASKS, THINKING = ("exact_match",), ("reasoning", "thinking")
PIPELINE = (
    Stage(name="pretrain", run="pretrain_128", config="pretrain", chapters=(3, 5, 12, 13)),
    Stage(name="full_sft", run="full_sft_128", config="sft", chapters=(17, 24),
          before=("pretrain", *TASKS), after=("full_sft", *TASKS)),
    Stage(name="lora", run="lora/identity_128", config="lora", chapters=(18,), others=("lora/identity_alone_128",),
          before=("full_sft_identity_test", *TASKS), after=("identity_identity_test", *TASKS)),
    Stage(name="dpo", run="rlhf_128", config="dpo", chapters=(19,),
          before=("full_sft", "preference"), after=("rlhf", "preference")),
    Stage(name="distill", run="distill_64", config="distill", chapters=(20,), others=("pretrain_64",)),
    Stage(name="reason", run="reason_128", config="reason", chapters=(21,), others=("direct/full_sft_128",),
          before=("direct", *THINKING), after=("reason", *THINKING)),
    Stage(name="tools", run="tools/full_sft_128", config="tools", chapters=(28,),
          before=("full_sft_tools_test", *TASKS), after=("tools_tools_test", *TASKS)),
)  # fmt: skip
CONFIG_OF_OTHERS = {"lora/identity_alone_128": "lora", "pretrain_64": "distill", "direct/full_sft_128": "sft"}
BEFORE = {"pretrain": "before_random", "distill": "before_hard", "reason": "before_direct"}
AFTER = {"distill": "after_teacher", "reason": "after_steps"}
# Validation figures that are drawn: a picture's name, and what is in it.
FIGURES = (
    ("bits_per_byte", ("bits_per_byte",)), ("accuracy", ("accuracy",)),
    ("rewards", ("reward_chosen", "reward_rejected")), ("kl", ("kl",)),
)  # fmt: skip


@script
def main(argv: list[str] | None = None) -> Path:
    args = parse(Arguments, argv)
    root, data = Path(args.save_dir), Path(args.data_dir)
    runs = read_demo(root)
    if not any(run.rows for run in runs.values()):
        raise UserError(f"--save_dir {args.save_dir}: no runs there; make demo trains them")
    path = Path(args.output) if args.output else root / "report.html"
    replace_text(path, report(root, data, runs, folder=path.parent, started=args.started))
    print(f"report: {path}")
    return path


def read_demo(root: Path) -> dict[str, RunRecord]:
    """Return the runs of all stages by their directory; a missing one has no rows."""
    names = [name for stage in PIPELINE for name in (stage.run, *stage.others)]
    return dict(zip(names, read_runs([root / name for name in names], names), strict=True))


def report(root: Path, data: Path, runs: dict[str, RunRecord], *, folder: Path, started: int = 0) -> str:
    """Return the page; ``folder`` is where it will be, for its links."""
    lines = list(all_lines(root))
    parts = [_introduction(runs), _contents(), *_table(lines, runs), _read_more((23,), folder)]
    for number, stage in enumerate(PIPELINE, 1):
        parts += _stage(number, stage, root, data, runs, folder)
    parts += [*_times(runs, started), *_data(root, data, folder)]
    return language_page(texts("title"), *parts, style=CHART_STYLE + STYLE)


# ---- the table ---------------------------------------------------------------------------------------------------


def _introduction(runs: dict[str, RunRecord]) -> str:
    parameters = next((run.settings["n_parameters"] for run in runs.values() if "n_parameters" in run.settings), NONE)
    date = time.strftime("%Y-%m-%d %H:%M")
    return both("p", texts("intro", parameters=parameters, time=duration(_seconds(runs.values())), date=date), "note")


def _contents() -> str:
    titles = {"table": texts("table")} | {stage.name: _title(stage) for stage in PIPELINE}
    titles |= {"times": texts("times"), "data": texts("data")}
    links = (f'<a href="#{name}">{both("span", title)}</a>' for name, title in titles.items())
    return f'<nav class="contents">{" ".join(links)}</nav>'


def _title(stage: Stage) -> dict[str, str]:
    return in_languages(STAGES[stage.name][0])


def state_of(run: RunRecord, config: str) -> tuple[dict[str, str], bool]:
    """Return how far a run came, in each language, and whether it is whole.

    Args:
        config: the file in configs/demo that says how many steps are usual.
    """
    if not run.rows:
        return texts("missing", run=run.path), False
    content = read_run_file(run.path)
    total = content.get("resolved", {}).get("total_steps")
    usual = yaml.safe_load((HERE.parent / "configs" / "demo" / f"{config}.yaml").read_text(encoding="utf-8"))
    asked = content.get("arguments", {}).get("max_steps", 0)
    values = {"steps": f"{run.rows[-1]['step']:,}", "time": duration(_seconds([run]))}
    if total is not None and run.rows[-1]["step"] < total:
        return texts("unfinished", total=f"{total:,}", **values), False
    if asked and asked != usual.get("max_steps", 0):
        return texts("shortened", **values), False
    return texts("complete", **values), True


def _state(run: RunRecord, config: str, *, is_measured: bool = True) -> str:
    state, is_whole = state_of(run, config)
    if run.rows and not is_measured:
        state, is_whole = {name: text + texts("not_measured")[name] for name, text in state.items()}, False
    return both("span", state, "state" if is_whole else "state bad")


def _table(lines: list[Line], runs: dict[str, RunRecord]) -> Iterator[str]:
    """Yield the table of all stages: a heading for each, then its lines."""
    yield f'<h2 id="table">{both("span", texts("table"))}</h2>{both("p", texts("table_note"), "note")}'
    head = "".join(f"<th>{both('span', texts(name))}</th>" for name in ("metric", "before", "after"))
    rows = [f"<tr>{head}</tr>"]
    for number, stage in enumerate(PIPELINE, 1):
        own = [line for line in lines if line.stage == stage.name]
        state = _state(runs[stage.run], stage.config, is_measured=any(line.after is not None for line in own))
        name = f'<a href="#{stage.name}">{number}. {both("span", _title(stage))}</a>'
        rows.append(f'<tr class="stage"><th colspan="3">{name} {state}</th></tr>')
        for line in own:
            _, metric, before, after = line.cells()
            names = both("span", {"en": metric, "zh": METRICS_ZH[metric]})
            numbers = "".join(f'<td class="number">{cell}</td>' for cell in (before, f"<b>{after}</b>"))
            rows.append(f"<tr><td>{names}</td>{numbers}</tr>")
    yield f'<table class="results">{"".join(rows)}</table>'


# ---- a stage -----------------------------------------------------------------------------------------------------


def _stage(
    number: int, stage: Stage, root: Path, data: Path, runs: dict[str, RunRecord], folder: Path
) -> Iterator[str]:
    run = runs[stage.run]
    yield f'<h2 id="{stage.name}">{number}. {both("span", _title(stage))}</h2>'
    yield both("p", in_languages(STAGES[stage.name][1]), "note")
    yield f"<p>{_state(run, stage.config)}{_run_page(run, folder)}</p>"
    yield _charts(run, has_teacher=stage.name == "distill")
    for other in stage.others:
        state = f"<p>{_state(runs[other], CONFIG_OF_OTHERS[other])}{_run_page(runs[other], folder)}</p>"
        title = both("span", texts("compared", run=OTHER_RUNS[other]))
        yield f"<details><summary>{title}</summary>{state}{_charts(runs[other])}</details>"
    if run.rows:
        yield f"<h3>{both('span', texts('samples'))}</h3>{_samples(stage, root, data)}"
    yield _read_more(stage.chapters, folder)


def _run_page(run: RunRecord, folder: Path) -> str:
    """Return a link to the run's own page, if there is one."""
    page = run.path / "summary.html"
    link = f' <a href="{_link(page, folder)}">{both("span", texts("run_page"))}</a>'
    return link if page.is_file() else ""


def _charts(run: RunRecord, *, has_teacher: bool = False) -> str:
    """Return the curves of a run: its loss with the floor, what its validations measured, its learning rate.

    Args:
        has_teacher: the training loss is the distance from a teacher, and has a picture of its own.
    """
    train, valid, floors = run.points("train", "loss"), run.points("valid", "loss"), run.points("valid", "floor")
    curves = [
        Curve(points=train, names=texts("training"), color="blue"),
        Curve(points=valid, names=texts("validation"), color="red", with_dots=True),
    ]
    if floors:
        floor, steps = floors[-1][1], [step for step, _ in train + valid]
        points = [(min(steps), floor), (max(steps), floor)]
        curves.append(Curve(points=points, names=texts("floor", value=floor), color="floor"))
    pictures = []
    if has_teacher:
        distance, *curves = curves
        pictures.append(chart(texts("distance"), [distance], x_names=texts("step"), log_y=_is_wide([distance])))
    loss = texts("loss", unit=UNITS[run.unit])
    pictures.insert(0, chart(loss, curves, x_names=texts("step"), log_y=_is_wide(curves)))
    for name, keys in FIGURES:
        curves = [
            Curve(points=run.points("valid", key), names=texts(key if len(keys) > 1 else "validation"), color=color,
                  with_dots=True)
            for key, color in zip(keys, ("blue", "red") if len(keys) > 1 else ("red",), strict=True)
        ]  # fmt: skip
        limits = (0.0, 1.0) if name == "accuracy" else None
        pictures.append(chart(texts(name), curves, x_names=texts("step"), y_limits=limits))
    rates = Curve(points=run.points("train", "lr"), names=texts("training"), color="grey")
    pictures.append(chart(texts("lr"), [rates], x_names=texts("step")))
    return f'<div class="charts">{"".join(pictures)}</div>'


def _is_wide(curves: Sequence[Curve]) -> bool:
    return is_wide([value for curve in curves if curve.color != "floor" for _, value in curve.points])


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said, and whether that is right; None where nothing says so."""

    text: str
    is_right: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question with the replies before and after a stage."""

    question: str
    before: Reply | None
    after: Reply
    expected: str = ""


def samples_of(stage: Stage, root: Path, data: Path) -> list[Sample]:
    """Return samples of a stage, taken evenly from its test file; for stages that learn texts, continuations."""
    if not stage.after:
        return _continuations(stage, root, data)
    before, after = (_replies(root, *place) for place in (stage.before, stage.after))
    if stage.name == "dpo":
        questions = _pair_questions(data)
    else:
        questions = [(row["question"], row["expected"]) for row, _ in after]
    if not after or len(questions) != len(after):
        return []
    samples = []
    for index in np.linspace(0, len(after) - 1, min(N_SAMPLES, len(after))).round().astype(int).tolist():
        (question, expected), (row, reply) = questions[index], after[index]
        earlier_row, earlier = before[index] if index < len(before) else ({}, None)
        is_same = earlier_row.get("question") == row.get("question")
        samples.append(Sample(question=question, before=earlier if is_same else None, after=reply, expected=expected))
    return samples


def _replies(root: Path, name: str, *keys: str) -> list[tuple[dict, Reply]]:
    """Return the rows of answers in a result file, each with its reply."""
    rows = read_result(root, name, *keys, "answers") or []
    calls = read_result(root, name, "tool_calls", "answers") or []
    replies = []
    for number, row in enumerate(rows):
        is_right = row["correct"] if "correct" in row else row.get("like_chosen")
        text = row["texts"][0] if "texts" in row else row["answer"]
        if number < len(calls):
            text, expected = (_with_calls(calls[number][side], row[side]) for side in ("answer", "expected"))
            row = row | {"expected": expected}
        replies.append((row, Reply(text=text, is_right=is_right[0] if isinstance(is_right, list) else is_right)))
    return replies


def _with_calls(calls: str, answer: str) -> str:
    """Return the calls of functions, as JSON, and the answer below them."""
    return answer if calls == "[]" else f"{calls}\n{answer}"


def _pair_questions(data: Path) -> list[tuple[str, str]]:
    """Return the question and the chosen reply of each pair of the test; the result files have only the answers."""
    path = data / "dpo_test.jsonl"
    records = read_records(path) if path.is_file() else []
    return [(record.messages[-1]["content"], record.chosen[-1]["content"]) for record in records]


def _continuations(stage: Stage, root: Path, data: Path) -> list[Sample]:
    """Return how a model continues texts, and how it did with random weights, or the run that it is compared with."""
    path = data / "pretrain_valid.jsonl"
    if not path.is_file():
        return []
    try:
        model, tokenizer = open_model(root / stage.run, device="cpu", save_dir=str(root))
    except UserError:
        return []
    after = sample_completions(model, tokenizer, [str(path)])
    if stage.others:
        try:
            other, _ = open_model(root / stage.others[0], device="cpu", save_dir=str(root))
        except UserError:
            other = None
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = Transformer(model.config).eval()
    before = sample_completions(other, tokenizer, [str(path)]) if other is not None else [None] * len(after)
    return [
        Sample(question=beginning, before=old and Reply(text=old[1]), after=Reply(text=text))
        for old, (beginning, text) in zip(before, after, strict=True)
    ]


def _samples(stage: Stage, root: Path, data: Path) -> str:
    samples = samples_of(stage, root, data)
    if not samples:
        return both("p", texts("no_samples"), "note")
    names = texts(BEFORE.get(stage.name, "before")), texts(AFTER.get(stage.name, "after"))
    cards = []
    for sample in samples:
        replies = [*zip(names, (sample.before, sample.after), strict=True)]
        if sample.expected:
            replies.append((texts("expected"), Reply(text=sample.expected)))
        nothing = f"<i>{both('span', texts('empty'))}</i>"
        shown = (f"<div>{_heading(name, reply)}<pre>{escape(reply.text) or nothing}</pre></div>"
                 for name, reply in replies if reply is not None)  # fmt: skip
        cards.append(f'<div class="sample"><b>{escape(sample.question)}</b>{"".join(shown)}</div>')
    explained = both("p", texts("samples_note" if stage.after else "texts_note"), "note")
    return f'{explained}<div class="samples">{"".join(cards)}</div>'


def _heading(name: dict[str, str], reply: Reply) -> str:
    marks = {True: ' <i class="right-answer">✓</i>', False: ' <i class="wrong">✗</i>', None: ""}
    return both("span", name) + marks[reply.is_right]


def _read_more(chapters: Sequence[int], folder: Path) -> str:
    """Return links to chapters of the course in each language; a chapter that is not there is left out."""
    links = {}
    for number, language in enumerate(LANGUAGES):
        course = HERE.parent / "docs" / "course" / language
        pages = [page for chapter in chapters for page in sorted(course.glob(f"{chapter:02}-*.md"))]
        named = [(page, page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")) for page in pages]
        found = [f'<a href="{_link(page, folder)}">{escape(title)}</a>' for page, title in named]
        links[language] = WORDS["read_more"][number] + WORDS["separator"][number].join(found)
    return both_html("p", links)


def _link(path: Path, folder: Path) -> str:
    return escape(os.path.relpath(path.resolve(), folder.resolve()), quote=True)


# ---- times -------------------------------------------------------------------------------------------------------


def _seconds(runs) -> float:
    """Return how long some runs trained."""
    return sum(run.rows[-1].get("seconds") or 0.0 for run in runs if run.rows)


def _times(runs: dict[str, RunRecord], started: int) -> Iterator[str]:
    yield f'<h2 id="times">{both("span", texts("times"))}</h2>'
    names = {stage.run: STAGES[stage.name][0] for stage in PIPELINE} | OTHER_RUNS
    rows = []
    for name, run in runs.items():
        results = run.results()
        numbers = (results[key] for key in ("steps", "tokens", "training time", "tokens/s"))
        rows.append([both("span", in_languages(names[name])), *(map(escape, numbers) if run.rows else [NONE] * 4)])
    rows.append([both("b", texts("all_training")), "", "", f"<b>{duration(_seconds(runs.values()))}</b>", ""])
    if started:
        whole = duration(time.time() - started)
        rows.append([both("b", texts("whole")), "", "", f"<b>{whole}</b>", ""])
    yield wide_table([both("span", texts(key)) for key in ("run", "steps", "tokens", "time", "tokens_per_s")], rows)
    if started:
        yield both("p", texts("whole_note"), "note")


# ---- the data ----------------------------------------------------------------------------------------------------


def _data(root: Path, data: Path, folder: Path) -> Iterator[str]:
    yield f'<h2 id="data">{both("span", texts("data"))}</h2>'
    path = data / "meta.json"
    if path.is_file():
        yield from _counts(json.loads(path.read_text(encoding="utf-8")))
    else:
        yield both("p", texts("no_data", path=data), "state bad")
    yield f"<h3>{both('span', texts('distribution'))}</h3>{both('p', texts('distribution_note'), 'note')}"
    corpora = [("texts", "pretrain_train", "text"), ("chats", "sft_train", "chat")]
    shown = [_tokens(name, root, data / f"{file}.jsonl", kind) for name, file, kind in corpora]
    yield f'<div class="corpora">{"".join(shown)}</div>' if any(shown) else both("p", texts("no_tokens"), "state bad")
    yield _read_more((2, 4), folder)


def _counts(meta: dict) -> Iterator[str]:
    """Yield the numbers of records, and the kinds of text with their floors."""
    yield both("p", texts("data_note", seed=meta["seed"]), "note")
    n, usual = meta["records"]["pretrain_train"], DemoDataArguments().n_pretrain
    if n != usual:
        yield both("p", texts("data_small", n=f"{n:,}", usual=f"{usual:,}"), "state bad")
    rows = [[name, f"{n:,}", both("span", in_languages(FILES[name]))] for name, n in meta["records"].items()]
    yield wide_table([both("span", texts(key)) for key in ("file", "records", "content")], rows)
    shares = meta["document_shares"]
    total = sum(shares.values())
    rows = []
    for kind, share in shares.items():
        floor = meta["floor"].get(kind, {}).get("nats_per_byte")
        name = both("span", in_languages(KINDS.get(kind, (kind, kind))))
        rows.append([name, _bar(share / total), NONE if floor is None else f"{floor:.4f}"])
    yield f"<h3>{both('span', texts('kinds'))}</h3>{both('p', texts('kinds_note'), 'note')}"
    yield wide_table([both("span", texts(key)) for key in ("kind", "share", "floor_per_byte")], rows)


def _tokens(name: str, root: Path, path: Path, kind: str) -> str:
    """Return what is known of a file's tokens; empty without the file or the tokenizer."""
    try:
        tokenizer = load_tokenizer(root / "tokenizer")
        packing = "stream" if kind == "text" else "none"  # it does not matter here; these are quick
        settings = {"max_seq_len": 128, "packing": packing, "cache_dir": root / ".token_cache"}
        rows = open_rows(str(path), tokenizer, kind=kind, **settings)
        found = data_report(rows, tokenizer, n_frequent=12)
    except UserError:
        return ""
    numbers = {
        "targets": f"{found['targets']:,}",
        "records": f"{found['records']:,}",
        "bytes": found["bytes_per_target"],
    }
    counts = np.sort(rows.target_counts)[::-1]
    shares = (counts[counts > 0] / counts.sum()).tolist()
    ranks = [0, *np.unique(np.geomspace(1, len(shares), 60).round().astype(int) - 1).tolist()]  # evenly on its axis
    curve = Curve(points=[(rank + 1, shares[rank]) for rank in dict.fromkeys(ranks)], names=texts(name), color="blue")
    most = shares[0]
    frequent = [[escape(text), _bar(share, of=most)] for _, text, share in found["frequent_targets"]]
    n_records = sum(n for _, _, n in found["histogram"])
    lengths = [[f"{low:,} – {high:,}", _bar(n / n_records)] for low, high, n in found["histogram"]]
    parts = [
        f"<h4>{both('span', texts(name))}</h4>",
        both("p", texts("corpus", vocabulary=f"{tokenizer.vocab_size:,}", **numbers)),
        chart(texts("ranks"), [curve], x_names=texts("rank"), log_x=True, log_y=True),
        f"<p>{both('span', texts('frequent'))}</p>{_bars(frequent)}",
        f"<p>{both('span', texts('lengths'))}</p>{_bars(lengths)}",
    ]
    return f"<div>{''.join(parts)}</div>"


def _bars(rows: list[list[str]]) -> str:
    lines = "".join(f"<tr><td>{name}</td><td>{bar}</td></tr>" for name, bar in rows)
    return f'<table class="bars">{lines}</table>'


def _bar(share: float, *, of: float = 1.0) -> str:
    """Return a share as a number and a bar, which is longest at ``of``."""
    return f'<span class="percent">{share:.1%}</span><span class="bar" style="width:{10 * share / of:.2f}em"></span>'


if __name__ == "__main__":
    main()
