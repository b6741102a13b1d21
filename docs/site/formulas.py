"""A Markdown extension: formulas as GitHub writes them.

``$…$`` and ``$$…$$`` become MathML, which browsers draw themselves: no script, no network.
"""

from latex2mathml.converter import convert
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor

# As on GitHub: no blank inside the dollars of an inline formula, no digit behind them, and \$ is a dollar.
FORMULA = r"(?<![\\$])(?:\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$]*[^\s$\\])?)\$(?!\d))"


class Formula(InlineProcessor):
    """Replaces a formula by its MathML, which no later pattern touches."""

    def handleMatch(self, match, data):
        latex, display = match["display"] or match["inline"], "block" if match["display"] else "inline"
        return self.md.htmlStash.store(convert(latex, display=display)), match.start(), match.end()


class Formulas(Extension):
    """Reads formulas behind code, but before backslashes and emphasis."""

    def extendMarkdown(self, md):
        md.inlinePatterns.register(Formula(FORMULA, md), "formula", 185)


def makeExtension(**options):
    """Return the extension: Python-Markdown calls this."""
    return Formulas(**options)
