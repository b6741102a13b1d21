"""A Markdown extension: formulas as GitHub writes them, ``$…$`` and ``$$…$$``.

They become MathML, which browsers draw themselves: no script, no network. latex2mathml translates; ``polish`` and
``space_row`` set as TeX does what it leaves to the browser.
"""

from html import unescape
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor

# As on GitHub: no blank inside the dollars of an inline formula, no digit behind them, and \$ is a dollar.
FORMULA = r"(?<![\\$])(?:\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$]*[^\s$\\])?)\$(?!\d))"
CAPITALS = set("ΓΔΘΛΞΠΣΥΦΨΩ")
CLOSING = {")", "]", "|", "!"}
THIN = "0.167em"  # of \\,


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML; ``display`` is ``inline`` or ``block``."""
    root = convert_to_element(latex, display=display)
    for element in root.iter():
        element.text = element.text and unescape(element.text)
        polish(element, limits_below=display == "block")
    for element in list(root.iter()):
        if element.tag in {"math", "mrow", "msqrt"}:
            space_row(element)
    return tostring(root, encoding="unicode")


def polish(element: Element, *, limits_below: bool) -> None:
    """Set names of functions, bars, slashes, capital Greek letters and limits."""
    text = element.text or ""
    is_name = text.isalpha() and len(text) > 1 and text != "mod"
    if element.tag == "mo" and (is_name or text in {"∂", "∇", "∞", "…"}):
        element.tag = "mi"
    if element.tag == "mo" and text in {"‖", "|", "/"} and "form" not in element.attrib:  # with a form it is \left|
        element.attrib |= {"stretchy": "false", "lspace": "0", "rspace": "0"}
    if element.tag == "mi" and text == "\\arg":
        element.text = "arg"
    if element.tag == "mi" and (text == "∇" or text in CAPITALS):
        element.set("mathvariant", "normal")
    if element.tag == "msub" and limits_below and element[0].text in {"min", "max"}:
        element.tag = "munder"


def space_row(row: Element) -> None:
    """Put thin spaces around names of functions, and none behind the minus of a negative number."""
    for index in reversed(range(len(row))):
        before = row[index - 1] if index > 0 else None
        after = row[index + 1] if index + 1 < len(row) else None
        if row[index].text == "−" and before is not None and before.tag == "mo" and before.text not in CLOSING:
            row[index].set("form", "prefix")
        if is_function(row[index]):
            if after is not None and after.tag not in {"mo", "mspace"}:
                row.insert(index + 1, Element("mspace", width=THIN))
            if before is not None and (before.tag not in {"mo", "mspace"} or before.text in CLOSING):
                row.insert(index, Element("mspace", width=THIN))


def is_function(element: Element) -> bool:
    """Tell whether an element is the name of a function, with an index or without: ln, log₂, max."""
    name = element[0] if element.tag in {"msub", "msup", "msubsup", "munder"} else element
    return name.tag == "mi" and (name.text or "").isalpha() and len(name.text) > 1


class Formula(InlineProcessor):
    """Replaces a formula by its MathML, which no later pattern touches."""

    def handleMatch(self, match, data):
        latex, display = match["display"] or match["inline"], "block" if match["display"] else "inline"
        return self.md.htmlStash.store(mathml(latex, display)), match.start(), match.end()


class Formulas(Extension):
    """Reads formulas behind code, but before backslashes and emphasis."""

    def extendMarkdown(self, md):
        md.inlinePatterns.register(Formula(FORMULA, md), "formula", 185)


def makeExtension(**options):
    """Return the extension: Python-Markdown calls this."""
    return Formulas(**options)
