"""The page of training runs: curves, samples, monitor and data of some of them, drawn again every few seconds."""

import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from minillm.compare.curves import COLORS, X_NAMES, panels_of
from minillm.compare.runs import RunRecord, differences, find_runs, read_run_file, read_runs
from minillm.data.report import data_lines
from minillm.reports.tracking import duration, read_metrics
from minillm.reports.watch import layer_table, medians_by_kind
from minillm.web import st
from minillm.web.session import Session
from minillm.web.words import PANELS_ZH, RESULTS_ZH, Words

REFRESH_S = 2.0
MAX_POINTS = 300  # of a curve: more than the screen shows
N_STEPS = 4  # of samples, next to each other
MONITOR = ("grad_ratio", "update_ratio", "delta_ratio", "effective_rank")  # figures of the adapter that are drawn


def draw_runs_page(t: Words, directory: Path, session: Session) -> None:
    """Draw the page of the runs in ``directory``; it refreshes by itself."""
    paths = sorted(find_runs(directory), key=_last_change, reverse=True)
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    with st.sidebar:
        is_live = st.toggle(t("live"), True, key="live", persist_state="session")
        x = st.segmented_control(
            t("x_axis"), list(X_NAMES), default="step", required=True, key="x", persist_state="session",
            format_func=lambda name: t("n_tokens" if name == "tokens" else name),
        )  # fmt: skip
    if not names:
        st.info(t("no_runs", directory=directory))
    else:
        newest = next(iter(names))
        chosen = st.multiselect(
            t("which_runs"), list(names), [newest], key="which_runs", persist_state="session", placeholder=t("choose")
        )
    draw = functools.partial(_draw_runs, t, {name: names[name] for name in chosen} if names else {}, x, session)
    st.fragment(draw, run_every=REFRESH_S if is_live else None)()


def _last_change(path: Path) -> float:
    metrics = path / "metrics.jsonl"
    return metrics.stat().st_mtime if metrics.is_file() else 0.0


def _draw_runs(t: Words, paths: dict[str, Path], x: str, session: Session) -> None:
    session.look()  # the answers on the other page go on
    if not paths:
        return
    runs = [_read(path, name, _signature(path)) for name, path in paths.items()]
    for run in runs:
        _draw_progress(t, run)
    heads = RESULTS_ZH if t.language == "zh" else {}
    results = [{t("run"): run.name} | {heads.get(k, k): text for k, text in run.results().items()} for run in runs]
    st.dataframe(results, hide_index=True)
    curves, samples, monitor, data, settings = st.tabs(
        [t(name) for name in ("curves", "samples", "monitor", "data", "settings")]
    )
    with curves:
        _draw_curves(t, runs, x)
    for tab, draw in ((samples, _draw_samples), (monitor, _draw_monitor), (data, _draw_data)):
        with tab:
            for run in runs:
                if len(runs) > 1:
                    st.subheader(run.name)
                draw(t, run)
    with settings:
        _draw_settings(t, runs)


def _signature(path: Path) -> tuple:
    """Return what changes when a run's files change."""
    files = [path / "metrics.jsonl", path / "run.yaml"]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files if file.is_file()))


@functools.lru_cache(maxsize=64)
def _read(path: Path, name: str, signature: tuple) -> RunRecord:
    return read_runs([path], [name])[0]


def _draw_progress(t: Words, run: RunRecord) -> None:
    """Draw how far a run is."""
    step = run.rows[-1]["step"] if run.rows else 0
    total = _total_steps(run)
    age = duration(max(0.0, time.time() - _last_change(run.path)))
    if total and step < total:
        seconds = run.rows[-1].get("seconds", 0.0) if run.rows else 0.0
        left = duration(seconds / step * (total - step)) if step else "?"
        st.progress(step / total, f"**{run.name}**: " + t("progress", step=step, total=total, left=left, age=age))
    elif total:
        st.progress(1.0, f"**{run.name}**: " + t("progress_over", step=step))
    else:
        st.caption(f"**{run.name}**: " + t("progress_unknown", step=step, age=age))


def _total_steps(run: RunRecord) -> int:
    text = run.settings.get("total_steps", "").replace(",", "")
    return int(text) if text.isdecimal() else 0


def _draw_curves(t: Words, runs: list[RunRecord], x: str) -> None:
    if len(runs) > 1:
        _draw_legend(run.name for run in runs)
    columns = st.columns(2)
    for number, (title, split, key, shown) in enumerate(panels_of(runs)):
        points = {run.name: run.points(split, key, x=x) if run in shown else [] for run in runs}  # each its colour
        x_name = t("n_tokens" if x == "tokens" else x)
        with columns[number % 2]:
            _draw_curve(_title(t, title, split, key), points, x_name, with_dots=split == "valid", is_loss=key == "loss")


def _title(t: Words, title: str, split: str, key: str) -> str:
    return PANELS_ZH.get((split, key), title) if t.language == "zh" else title


def _draw_curve(
    title: str, curves: dict[str, list[tuple]], x_name: str, *, with_dots: bool = False, is_loss: bool = False
) -> None:
    """Draw curves as a Vega-Lite chart; the next one in its place moves, because only the data differ.

    Args:
        is_loss: draw on a logarithmic scale if the first steps would flatten all that follows.
    """
    rows = [
        {"x": x, "y": y, "curve": name}
        for name, points in curves.items()
        for x, y in thinned([point for point in points if math.isfinite(point[1])])
    ]
    values = [row["y"] for row in rows]
    y_axis: dict = {"scale": {"zero": False}}
    if is_loss and values and max(values) > 3 * min(values) > 0:
        ticks = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)]
        y_axis = {"scale": {"type": "log"}, "axis": {"values": ticks, "format": "~g"}}
    spec = {
        "title": title,
        "height": 240,
        "mark": {"type": "line", "point": with_dots, "tooltip": True},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": x_name},
            "y": {"field": "y", "type": "quantitative", "title": None} | y_axis,
            "color": {
                "field": "curve",
                "type": "nominal",
                "scale": {"domain": list(curves), "range": [color for _, color in _colours(curves)]},
                "legend": None,  # one for all: _draw_legend
            },
        },
    }
    st.vega_lite_chart(rows, spec)


def _draw_legend(names: Iterable[str]) -> None:
    dots = (f'<span style="color:{color}">●</span> {escape(name)}' for name, color in _colours(names))
    st.html("&emsp;".join(dots))


def _colours(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    return zip(names, itertools.cycle(COLORS))


def thinned(points: list) -> list:
    """Return at most about ``MAX_POINTS`` of some points, evenly spaced, the last one among them."""
    stride = max(1, -(-len(points) // MAX_POINTS))
    return points[:-1][::stride] + points[-1:]


def _draw_samples(t: Words, run: RunRecord) -> None:
    rows = read_metrics(run.path / "samples.jsonl")
    if not rows:
        st.caption(t("no_samples"))
        return
    st.caption(t("samples_note"))
    st.dataframe(sample_table(t, rows), hide_index=True)


def sample_table(t: Words, rows: list[dict]) -> list[dict]:
    """Return a row per question: the answers at the last validations, newest first, and what was expected."""
    steps = sorted({row["step"] for row in rows}, reverse=True)[:N_STEPS]
    answers = {(row["step"], row.get("question")): row.get("answer") for row in rows}
    return [
        {t("question"): row.get("question")}
        | {f"{t('step')} {step:,}": answers.get((step, row.get("question"))) for step in steps}
        | {t("expected"): row.get("expected")}
        for row in rows
        if row["step"] == steps[0]
    ]


def _draw_monitor(t: Words, run: RunRecord) -> None:
    rows = [row for row in read_metrics(run.path / "monitor.jsonl") if row.get("layers")]
    if not rows:
        st.caption(t("no_monitor"))
        return
    for row in rows:
        for warning in row.get("warnings") or []:
            st.warning(f"{t('step')} {row['step']:,}: {warning}")
    _draw_legend(medians_by_kind(rows, MONITOR[0]))
    columns = st.columns(2)
    for number, key in enumerate(MONITOR):
        steps = [row["step"] for row in rows]
        curves = {kind: list(zip(steps, values, strict=True)) for kind, values in medians_by_kind(rows, key).items()}
        with columns[number % 2]:
            _draw_curve(t(key), curves, t("step"))
    head, *table = layer_table(rows[-1]["layers"])
    st.dataframe([dict(zip(head, line, strict=True)) for line in table], hide_index=True)


def _draw_data(t: Words, run: RunRecord) -> None:
    data = read_run_file(run.path).get("data")
    try:
        lines = data_lines(data["summary"])
    except (KeyError, TypeError):  # no summary, or one of another version
        st.caption(t("no_data"))
        return
    st.code("\n".join(lines), language=None, wrap_lines=True)


def _draw_settings(t: Words, runs: list[RunRecord]) -> None:
    if len(runs) > 1:
        shared, others = differences(runs)
        table = shared | others
    else:
        table = {name: [text] for name, text in runs[0].settings.items()}
    head = [run.name for run in runs]
    st.dataframe(
        [{t("settings"): name} | dict(zip(head, texts, strict=True)) for name, texts in table.items()], hide_index=True
    )
