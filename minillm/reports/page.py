"""The pages that runs leave: one HTML file each, nothing loaded from elsewhere, readable on a phone."""

import base64
import contextlib
import html
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "h1,td,th,p{overflow-wrap:anywhere}img{max-width:100%;height:auto}svg{display:block}"
    ".large{max-width:none;width:1100px}.panels{display:flex;flex-wrap:wrap;gap:.5em 1em}.wide{overflow-x:auto}"
    "table{border-collapse:collapse}td,th{padding:.15em 1.2em .15em 0;text-align:left;vertical-align:top}"
    "th{font-weight:600}.facts th{overflow-wrap:normal;min-width:9em}"
    ".lines{font-size:14px}.lines tr{border-bottom:1px solid #e5e5e0}"
    ".lines td,.lines th{overflow-wrap:normal}.lines td{white-space:nowrap}"
    ".lines .long{white-space:normal;overflow-wrap:anywhere;min-width:16em}.note{color:#555;max-width:46em}"
    ".answers{font-size:14px}.answers td,.answers th{border:1px solid #ddd;padding:.4em .6em;white-space:pre-wrap;"
    "min-width:8em}"
    "pre{background:#f5f5f2;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 1em}"
    ".bar{display:inline-block;height:.8em;background:#3d7ea6}"
    "@media(max-width:600px){body{margin:1em auto}.panels img{width:auto}.facts td,.facts th{display:block;padding:0}"
    ".facts td{margin-bottom:.6em}}"
    "@media(prefers-color-scheme:dark){body{background:#181a1b;color:#ddd}.lines tr{border-color:#444}.note{color:#aaa}"
    ".answers td,.answers th{border-color:#444}pre{background:#26282a}"
    "img{filter:invert(.9) hue-rotate(180deg)}}"  # of matplotlib: dark paper, the same hues
)
LANGUAGES = {"en": "English", "zh": "中文"}
LANGUAGE_STYLE = ".right{float:right}body.en [data-l=zh],body.zh [data-l=en]{display:none!important}"
SPEAK = "function speak(name){document.body.className=name;document.documentElement.lang=name}"
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC",
)  # fmt: skip
SCALE = 0.8  # of a picture on a page; phones and sharp screens have more pixels than that


def page(title: str, *parts: str) -> str:
    """Return a page; ``parts`` are HTML."""
    return _document(title, f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body>", STYLE)


def language_page(titles: Mapping[str, str], *parts: str, language: str = "", style: str = "", script: str = "") -> str:
    """Return a page in English and Chinese, with a button for each; its parts are made with ``both``.

    Args:
        titles: by language. language: the one shown first; default: the browser's. style, script: the page's own.
    """
    buttons = " ".join(f"<button onclick=\"speak('{key}')\">{name}</button>" for key, name in LANGUAGES.items())
    first = f"'{language}'" if language else "navigator.language.startsWith('zh')?'zh':'en'"
    body = (
        f'<body class="{language or "en"}"><p class="right">{buttons}</p>{both("h1", titles)}{"".join(parts)}'
        f"<script>{SPEAK};speak({first});{script}</script></body>"
    )
    title = titles[language] if language else " · ".join(titles.values())
    return _document(title, body, STYLE + LANGUAGE_STYLE + style)


def _document(title: str, body: str, style: str) -> str:
    return (
        '<!doctype html><html><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>{body}</html>"
    )


def both(tag: str, texts: Mapping[str, str], css: str = "") -> str:
    """Return an element in each language, of which the page shows one; ``texts``, by language, are plain."""
    return both_html(tag, {language: html.escape(text) for language, text in texts.items()}, css)


def both_html(tag: str, contents: Mapping[str, str], css: str = "") -> str:
    """Return an element in each language, as ``both``; ``contents`` are HTML."""
    css = f' class="{css}"' if css else ""
    return "".join(f'<{tag}{css} data-l="{language}">{text}</{tag}>' for language, text in contents.items())


def facts_table(facts: dict[str, str]) -> str:
    """Return a table of names and texts; on a phone the text is below its name."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    return f'<table class="facts">{rows}</table>'


def wide_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of HTML cells that is moved sideways where the screen is narrower."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table class="lines"><tr>{cells}</tr>{lines}</table></div>'


def _cell(content: str) -> str:
    is_long = len(content) > 28 and not content.startswith("<")
    return f'<td class="long">{content}</td>' if is_long else f"<td>{content}</td>"


def note(text: str) -> str:
    """Return a paragraph that explains; ``text`` is plain."""
    return f'<p class="note">{html.escape(text)}</p>'


def pictures(pngs: Iterable[bytes], *, alt: str) -> str:
    """Return pictures side by side, or below each other where the screen is narrow."""
    images = (
        f'<img width="{round(SCALE * int.from_bytes(png[16:20], "big"))}" alt="{html.escape(alt)}" '  # PNG: its width
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for png in pngs
    )
    return f'<div class="panels">{"".join(images)}</div>'


def large_picture(png: bytes, *, alt: str) -> str:
    """Return a picture that keeps its size and is moved sideways where the screen is narrower."""
    return pictures([png], alt=alt).replace("<img ", '<img class="large" ').replace("panels", "wide")


def no_picture() -> str:
    """Return what stands in place of a picture without matplotlib."""
    return "<p>No picture: <code>pip install matplotlib</code></p>"


@contextlib.contextmanager
def drawing() -> Iterator:
    """Give pyplot, which draws into memory, with a font for Chinese names if the machine has one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": fonts}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield pyplot


def save_and_cut(figure, path, *, dpi: int) -> list[bytes]:
    """Save a matplotlib figure at ``path``, and return each of its axes as a PNG of its own, cut out of the whole."""
    from matplotlib.image import imsave

    figure.savefig(path, dpi=dpi)
    figure.set_dpi(dpi)
    figure.canvas.draw()
    pixels, cuts = np.asarray(figure.canvas.buffer_rgba()), []  # (height, width, 4)
    height, width, _ = pixels.shape
    for axis in figure.axes:
        box = axis.get_tightbbox().padded(8)
        rows = slice(max(0, height - round(box.y1)), min(height, height - round(box.y0)))
        columns = slice(max(0, round(box.x0)), min(width, round(box.x1)))
        file = io.BytesIO()
        imsave(file, pixels[rows, columns], format="png")
        cuts.append(file.getvalue())
    return cuts
