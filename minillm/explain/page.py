"""The explanation as one HTML file: both languages, attention of every layer and head, values at a touch."""

import html
import json

from minillm.explain.text import COLUMNS, next_note, row, shown, total_row
from minillm.explain.trace import Trace
from minillm.explain.words import WORDS
from minillm.reports.page import both, language_page

OWN_STYLE = (
    ".token{display:inline-block;border:1px solid #8888;border-radius:4px;padding:0 .35em;margin:.1em}"
    ".token{font-family:monospace}"
    ".token small{color:#777;margin-left:.4em}"
    "#map td{width:1.1em;height:1.1em;padding:0;border:0}#map th{font:12px monospace;padding:0 .3em;text-align:right}"
    "#map th.up{writing-mode:vertical-rl;text-align:left;padding:.3em 0}"
    "@media(prefers-color-scheme:dark){.token small{color:#aaa}}"
)
SCRIPT = """
const state = {layer: 0, head: -1};
function draw() {
  const layer = data.attention[state.layer], n = data.tokens.length;
  const mean = (i, j) => layer.reduce((sum, head) => sum + head[i][j], 0) / layer.length;
  const at = (i, j) => state.head >= 0 ? layer[state.head][i][j] : mean(i, j);
  const table = document.getElementById("map");
  table.replaceChildren();
  document.getElementById("value").textContent = "";
  const head = table.insertRow();
  head.append(document.createElement("th"));
  for (const token of data.tokens) {
    const cell = document.createElement("th"); cell.className = "up"; cell.textContent = token; head.append(cell);
  }
  for (let i = 0; i < n; i++) {
    const line = table.insertRow(), name = document.createElement("th");
    name.textContent = data.tokens[i]; line.append(name);
    for (let j = 0; j <= i; j++) {
      const value = at(i, j), cell = line.insertCell();
      cell.style.background = `rgba(61,126,166,${value})`;
      cell.title = `${data.tokens[i]} → ${data.tokens[j]}: ${(100 * value).toFixed(1)} %`;
      cell.onclick = () => document.getElementById("value").textContent = cell.title;  // phones cannot point
    }
  }
}
function choose(what, value) { state[what] = Number(value); draw(); }
draw();
"""


def as_page(trace: Trace, tokenizer, config, language: str) -> str:
    """Return the page; ``language`` is the one shown first."""
    tokens = [shown(tokenizer, token) for token in trace.ids]
    attention = [part.probabilities for part in trace.parts if part.kind == "attention"]
    numbers = [[[[round(v, 4) for v in line] for line in head] for head in layer.tolist()] for layer in attention]
    data = json.dumps({"tokens": tokens, "attention": numbers}, ensure_ascii=False).replace("<", "\\u003c")
    titles = {name: words["title"] for name, words in WORDS.items()}
    sections = [
        _both("h2", lambda words: words["tokens"]),
        _both("p", lambda words: words["tokens_note"], "note"),
        "<p>" + "".join(_token(token, text) for token, text in zip(trace.ids, tokens, strict=True)) + "</p>",
        _both("h2", lambda words: words["way"]),
        _both("p", lambda words: words["way_note"].format(hidden=config.hidden_size), "note"),
        *(f'<div data-l="{name}">{_way(trace, tokenizer, words)}</div>' for name, words in WORDS.items()),
        _both("h2", lambda words: words["attention_maps"]),
        _both("p", lambda words: words["attention_note"], "note"),
        *(f'<p data-l="{name}">{_choices(len(numbers), len(numbers[0]), words)}</p>' for name, words in WORDS.items()),
        '<div class="wide"><table id="map"></table></div><p id="value"></p>',
        *_experts(trace, tokens),
        _both("h2", lambda words: words["next"]),
        _both("p", lambda words: next_note(trace, config, words), "note"),
        _candidates(trace, tokenizer),
    ]
    script = f"const data = {data};{SCRIPT}"
    return language_page(titles, *sections, language=language, style=OWN_STYLE, script=script)


def _both(tag: str, text, css: str = "") -> str:
    """Return the same element in every language; the page shows one of them."""
    return both(tag, {name: text(words) for name, words in WORDS.items()}, css)


def _token(token: int, text: str) -> str:
    return f'<span class="token">{html.escape(text)}<small>{token}</small></span>'


def _way(trace: Trace, tokenizer, words: dict[str, str]) -> str:
    """Return the table of all parts; a row's details are under the mouse."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(words[name])}</th>" for name in COLUMNS) + "</tr>"]
    for part in trace.parts:
        lengths = "" if part.stream_norms is None else ", ".join(f"{value:.2f}" for value in part.stream_norms.tolist())
        details = f"{part.name}: {part.n_parameters:,} | {part.flops:,.0f} FLOPs | {part.n_bytes:,} B | {lengths}"
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row(part, tokenizer, words))
        lines.append(f'<tr title="{html.escape(details)}">{cells}</tr>')
    lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in total_row(trace, words)) + "</tr>")
    return f'<div class="wide"><table class="lines">{"".join(lines)}</table></div>'


def _choices(n_layers: int, n_heads: int, words: dict[str, str]) -> str:
    """Return the two menus above the map."""
    layers = "".join(f'<option value="{n}">{words["layer"]} {n}</option>' for n in range(n_layers))
    heads = f'<option value="-1">{words["all_heads"]}</option>'
    heads += "".join(f'<option value="{n}">{words["head"]} {n}</option>' for n in range(n_heads))
    return (
        f"<select onchange=\"choose('layer', this.value)\">{layers}</select> "
        f"<select onchange=\"choose('head', this.value)\">{heads}</select>"
    )


def _experts(trace: Trace, tokens: list[str]) -> list[str]:
    """Return which experts each token went to, layer by layer; nothing for a dense model."""
    sparse = [part for part in trace.parts if part.experts is not None]
    if not sparse:
        return []
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(token)}</th>" for token in tokens) + "</tr>"]
    for part in sparse:
        cells = "".join(f"<td>{' '.join(map(str, sorted(chosen)))}</td>" for chosen in part.experts.tolist())
        lines.append(f"<tr><th>{part.name}</th>{cells}</tr>")
    table = f'<div class="wide"><table class="lines">{"".join(lines)}</table></div>'
    return [_both("p", lambda words: words["experts_note"], "note"), table]


def _candidates(trace: Trace, tokenizer) -> str:
    lines = [
        f'<tr title="{probability:.6f}"><td>{html.escape(shown(tokenizer, token))}</td><td>{probability:.2%}</td>'
        f'<td><span class="bar" style="width:calc({probability:.4f} * min(20em, 45vw))"></span></td></tr>'
        for token, probability in trace.candidates
    ]
    return f"<table>{''.join(lines)}</table>"
