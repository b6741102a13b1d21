"""A Markdown extension: formulas as GitHub writes them, ``$…$`` and ``$$…$$``.

They become MathML, which browsers draw themselves: no script, no network. latex2mathml translates; ``polish`` sets what it
leaves to the browser as TeX sets it.
"""

from html import unescape
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor

# As on GitHub: no blank inside the dollars of an inline formula, no digit behind them, and \$ is a dollar.
FORMULA = r"(?<![\\$])(?:\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$]*[^\s$\\])?)\$(?!\d))"
LIMITS = {"min", "max"}


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML; ``display`` is ``inline`` or ``block``."""
    root = convert_to_element(latex, display=display)
    for element in root.iter():
        element.text = element.text and unescape(element.text)
    for element in list(root.iter()):
        polish(element, limits_below=display == "block")
    return tostring(root, encoding="unicode")


def polish(element: Element, *, limits_below: bool) -> None:
    """Set names of functions, bars, fractions in a line and capital Greek letters as TeX does."""
    text = element.text or ""
    if element.tag == "mo" and (text.isalpha() and len(text) > 1 and text != "mod" or text in {"∂", "∇", "∞"}):
        element.tag = "mi"
    if text == "\\arg":
        element.text = "arg"
    if text == "∇" or len(text) == 1 and "Α" <= text <= "Ω":
        element.set("mathvariant", "normal")
    if element.tag == "mo" and text in {"‖", "|"} and not element.attrib:
        element.set("stretchy", "false")
    if element.tag == "mo" and text == "/":
        element.set("lspace", "0")
        element.set("rspace", "0")
    if element.tag == "msub" and limits_below and element[0].text in LIMITS:
        element.tag = "munder"
    if element.tag in {"math", "mrow", "msqrt"}:
        for index in reversed(range(len(element))):
            if element[index].text == "−" and index > 0 and element[index - 1].tag in {"mo", "mspace"}:
                if element[index - 1].text not in {")", "]", "|", "!"}:
                    element[index].set("form", "prefix")
            if is_function(element[index]):
                if index + 1 < len(element) and element[index + 1].tag not in {"mo", "mspace"}:
                    element.insert(index + 1, Element("mspace", width="0.167em"))
                if index > 0 and element[index - 1].tag not in {"mo", "mspace"}:
                    element.insert(index, Element("mspace", width="0.167em"))


def is_function(element: Element) -> bool:
    """Tell whether an element is the name of a function, with an index or without: ln, log₂, max."""
    name = element[0] if element.tag in {"msub", "msup", "msubsup", "munder"} else element
    return name.tag in {"mi", "mo"} and (name.text or "").isalpha() and len(name.text) > 1


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
