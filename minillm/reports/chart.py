"""Curves as a small picture inside a page (SVG): sharp at any size, in the page's colours and languages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from minillm.reports.page import both

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 34  # margins, with room for the numbers of the axes
MAX_TICKS = 5
CHART_STYLE = (
    ".charts{display:grid;gap:1em;margin:1em 0;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}"
    ".chart{margin:0;font-size:14px;max-width:370px}.chart figcaption{font-weight:600}"
    ".chart svg{width:100%;height:auto}"
    ".chart text{font-size:11px;fill:currentColor;opacity:.75}.chart path{stroke:currentColor;opacity:.15}"
    ".key{display:inline-block;width:1.2em;border-top:3px solid;margin:0 .3em .25em 1em}"
    ".key.floor{border-top-style:dashed}"
    ".blue{color:#4f86c6}.red{color:#b3402a}.floor{color:#3b7d3b}.grey{color:#777}"
    "@media(prefers-color-scheme:dark){.blue{color:#7fa7d6}.red{color:#e58068}.floor{color:#7dbb7d}.grey{color:#aaa}}"
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve: points (x, y), what the legend calls it in each language, and its colour.

    Attributes:
        color: ``blue``, ``red``, ``grey``, or ``floor``, a dashed line.
        with_dots: whether each point has a dot.
    """

    points: Sequence[tuple[float, float]]
    names: Mapping[str, str]
    color: str
    with_dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from ``low`` to ``high`` on a line from ``start`` to ``end`` of the picture."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return where a value is."""
        low, high, value = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        """Return a few round values on the axis."""
        if not self.is_log:
            return _round_values(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) <= MAX_TICKS:
                break
        return ticks if len(ticks) > 1 else _round_values(self.low, self.high)


def axis_of(values: Sequence[float], *, start: float, end: float, is_log: bool = False) -> Axis:
    """Return an axis for some values, not all of them alike; equal ones are in its middle."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    return Axis(low=low, high=high, start=start, end=end, is_log=is_log)


def polyline(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Return the points of a curve as SVG has them."""
    return " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)


def is_wide(values: Sequence[float]) -> bool:
    """Return whether a linear axis would flatten most of some values."""
    return bool(values) and max(values) > 3 * min(values) > 0


def chart(
    titles: Mapping[str, str],
    curves: Sequence[Curve],
    *,
    x_names: Mapping[str, str],
    log_x: bool = False,
    log_y: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> str:
    """Return a figure of curves with axes, and a legend if there are several; without any point, an empty text.

    Args:
        titles, x_names: by language.
        log_x, log_y: logarithmic axes, for values above 0. y_limits: of a figure whose range is known.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    points = [point for curve in curves for point in curve.points]
    x = axis_of([a for a, _ in points], start=LEFT, end=WIDTH - RIGHT, is_log=log_x)
    y = axis_of(y_limits or [b for _, b in points], start=HEIGHT - BOTTOM, end=TOP, is_log=log_y)
    parts = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}"/><text x="{LEFT - 5}" y="{at}" dy="4" ')
        parts.append(f'text-anchor="end">{_text(value)}</text>')
    for value in x.ticks():
        at = x.at(value)
        anchor = "end" if at > WIDTH - 24 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{_text(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    for language, name in x_names.items():
        parts.append(
            f'<text data-l="{language}" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(name)}</text>'
        )
    for curve in curves:
        dashes = ' stroke-dasharray="5 4"' if curve.color == "floor" else ""
        parts.append(f'<g class="{curve.color}" fill="none" stroke="currentColor" stroke-width="1.8"{dashes}>')
        parts.append(f'<polyline points="{polyline(curve.points, x, y)}"/>')
        if curve.with_dots or len(curve.points) == 1:
            dots = (f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3"/>' for a, b in curve.points)
            parts.append(f'<g fill="currentColor" stroke="none">{"".join(dots)}</g>')
        parts.append("</g>")
    label = escape(" · ".join(titles.values()), quote=True)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    keys = (f'<span class="key {curve.color}"></span>{both("span", curve.names)}' for curve in curves)
    legend = "".join(keys) if len(curves) > 1 else ""
    return f'<figure class="chart">{both("figcaption", titles)}{picture}<div>{legend}</div></figure>'


def _round_values(low: float, high: float) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, a few of them."""
    least = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [float(f"{n * step:.10g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
