"""How a picture looks, and how it is written: an SVG that carries the numbers that it shows.

A picture is a function of its numbers, so anyone can draw it again from its own file. Words are left out where symbols,
numbers and names of the code will do: one picture serves all languages.
"""

import contextlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_DIGITS = 4  # of a number that is drawn
WIDTH = 7.0  # inches; a page shows it about 700 pixels wide


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours; all series are told apart without red against green, and each is labelled where it is drawn."""

    name: str
    background: str
    text: str
    muted: str
    """Axes and remarks."""
    grid: str
    """Lines and areas that nobody has to read."""
    series: tuple[str, ...]
    """Of lines and bars."""
    ink: str
    """Of text on an area in a colour of ``series``."""

    def shade(self, share: float) -> str:
        """Return a colour between the background (0) and the first of the series (1)."""
        parts = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (self.background, self.series[0]))
        return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in zip(*parts, strict=True))


LIGHT = Theme(
    name="light", background="#ffffff", text="#1f2328", muted="#59636e", grid="#d1d9e0", ink="#ffffff",
    series=("#0068a8", "#b84a00", "#007a57", "#a1447c", "#8a6a00", "#5b5fc7", "#a3283a", "#4f6272"),
)  # fmt: skip
DARK = Theme(
    name="dark", background="#0d1117", text="#f0f6fc", muted="#9198a1", grid="#3d444d", ink="#0d1117",
    series=("#58b4f0", "#f0934d", "#3fc79a", "#e08fc0", "#e3c04a", "#a5a8ff", "#ff8a94", "#a9b8c6"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


def rounded(value: Any) -> Any:
    """Return ``value``, of lists and dicts, with floats of four digits: what is drawn and stored."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{N_DIGITS}g}") if math.isfinite(value) else None
    return value


@contextlib.contextmanager
def drawn(draw: Callable, numbers: dict, theme: Theme) -> Iterator:
    """Give the figure on which ``draw(figure, numbers, theme)`` has drawn, with the settings to save it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not those of this machine
        matplotlib.rcParams.update(_settings(theme))
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        draw(figure, numbers, theme)
        yield figure


def svg(draw: Callable, numbers: dict, theme: Theme) -> bytes:
    """Return a picture as SVG; the same numbers give the same bytes."""
    file, description = io.BytesIO(), json.dumps(numbers, separators=(",", ":"))
    with drawn(draw, numbers, theme) as figure:
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": description})
    return file.getvalue()


def numbers_in(picture: bytes) -> dict:
    """Return the numbers that an SVG of ``svg`` carries."""
    return json.loads(html.unescape(re.search(rb"<dc:description>(.*?)</dc:description>", picture, re.S)[1].decode()))


def drawn_by(picture: bytes) -> str:
    """Return the version of matplotlib that drew an SVG of ``svg``: another one draws the same with other bytes."""
    return re.search(rb"Matplotlib v([\w.]+)", picture)[1].decode()


def paths_of(name: str, folder: Path) -> dict[str, Path]:
    """Return the files of a picture by theme."""
    return {theme.name: folder / f"{name}.{theme.name}.svg" for theme in THEMES}


def label_end(axes, x: float, y: float, text: str, color: str, **options) -> None:
    """Write a line's name behind its end."""
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=color, **options)


def _settings(theme: Theme) -> dict:
    from matplotlib import cycler

    return {
        "font.size": 10, "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.fonttype": "path",
        "svg.hashsalt": "minillm", "figure.facecolor": theme.background, "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background, "text.color": theme.text, "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.muted, "axes.titlecolor": theme.text, "axes.titlesize": 10.5, "axes.labelsize": 10,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": theme.grid, "grid.linewidth": 0.7,
        "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8,
        "axes.prop_cycle": cycler(color=theme.series),
    }  # fmt: skip
