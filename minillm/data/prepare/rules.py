"""The rules of cleaning: what changes a text, and what drops a record.

A change is a function from a text to a text. A measure is a function from the texts of a record, or from their units,
to a number, which ``drop_reason`` compares with the limits in the settings. All limits are off by default.

The repetition rules follow Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1), which drops documents with more
than 30 % of duplicate lines, and with more than 10 % of the text in repeated 10-grams.
"""

import html
import re
import unicodedata

from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.units import HAN, SplitTexts, ngrams

REPEATED_NGRAM = 10  # units; shorter runs repeat in ordinary text
CHANGES = ("control_characters", "html", "normalize")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_SCRIPTS = {
    "zh": re.compile(f"[{HAN}]"),
    "latin": re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]"),
}
_TAG_NAMES = (
    "a abbr article aside b blockquote body br button caption center code col dd div dl dt em embed figcaption figure "
    "font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input label li link main meta nav noscript ol "
    "option p path pre script section select small span strong style sub sup svg table tbody td textarea tfoot th "
    "thead title tr u ul video"
)
_TAG = re.compile(rf"</?(?:{'|'.join(_TAG_NAMES.split())})(?:\s[^<>]*)?/?>|<!--.*?-->|<!doctype[^<>]*>", re.I | re.S)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.I | re.S)


# ---- changes -----------------------------------------------------------------------------------------------------


def remove_control_characters(text: str) -> str:
    """Return the text with line ends as ``\\n``, and without control characters and byte order marks.

    Tabs stay. The two line separators of Unicode become line ends.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x85", "\n")
    return _CONTROL.sub(lambda match: "\n" if match[0] in "\u2028\u2029" else "", text)


def remove_html(text: str) -> str:
    """Return the text without HTML tags and comments, and with its entities as characters.

    Only tags that HTML knows count, so ``<think>`` and ``a < b`` stay; so does a text without any such tag.
    """
    if not _TAG.search(text):
        return text
    return html.unescape(_TAG.sub("", _HIDDEN.sub("", text))).strip()


def remove_control_from(value):
    """Return a raw record with ``remove_control_characters`` applied to every string in it."""
    if isinstance(value, str):
        return remove_control_characters(value)
    if isinstance(value, list):
        return [remove_control_from(item) for item in value]
    if isinstance(value, dict):
        return {key: remove_control_from(item) for key, item in value.items()}
    return value


def change_functions(settings: PrepareSettings) -> list[tuple[str, object]]:
    """Return (rule, function of a text) of the changes that are on, except for control characters (raw records)."""
    functions = [("html", remove_html)] if settings.strip_html else []
    if settings.normalize != "none":
        functions.append(("normalize", lambda text: unicodedata.normalize(settings.normalize.upper(), text)))
    return functions


# ---- measures ----------------------------------------------------------------------------------------------------


def duplicate_line_share(texts: list[str]) -> float:
    """Return the share of the lines that repeat an earlier one; blank lines and white space around lines do not count.

    A line of one text is not compared with those of another: two turns may begin alike.
    """
    n_lines = n_duplicates = 0
    for text in texts:
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        n_lines += len(lines)
        n_duplicates += len(lines) - len(set(lines))
    return n_duplicates / max(1, n_lines)


def duplicate_ngram_share(texts: list[list[str]], n: int = REPEATED_NGRAM) -> float:
    """Return the share of the units that lie in a run of ``n`` units that occurred before in the same text.

    Args:
        texts: the units of each text.
    """
    n_units = n_covered = 0
    for units in texts:
        n_units += len(units)
        seen: set[str] = set()
        covered_end = 0  # units before it are counted already
        for start, ngram in enumerate(ngrams(units, n)):
            if ngram in seen:
                n_covered += start + n - max(start, covered_end)
                covered_end = start + n
            seen.add(ngram)
    return n_covered / max(1, n_units)


def language_share(texts: list[str], language: str) -> float | None:
    """Return the share of the letters that are Chinese (``zh``) or Latin (``latin``); None without any letter."""
    n_letters = sum(sum(map(str.isalpha, text)) for text in texts)
    if not n_letters:
        return None
    return sum(len(_SCRIPTS[language].findall(text)) for text in texts) / n_letters


# ---- which records are dropped -----------------------------------------------------------------------------------


def drop_reason(split: SplitTexts, n_tokens: int | None, settings: PrepareSettings) -> tuple[str, str] | None:
    """Return (rule, reason) of the first rule that drops a record with these texts, or None.

    Args:
        n_tokens: of all texts together; None if no limit needs it.
    """
    texts = split.texts
    lengths = [("characters", sum(map(len, texts))), ("tokens", n_tokens)]
    for unit, length in lengths:
        shortest, longest = getattr(settings, f"min_{unit}"), getattr(settings, f"max_{unit}")
        if shortest and length < shortest:
            return f"min_{unit}", f"too short: {length:,} {unit}, at least {shortest:,} are needed"
        if longest and length > longest:
            return f"max_{unit}", f"too long: {length:,} {unit}, at most {longest:,} are allowed"
    if settings.language:
        share = language_share(texts, settings.language)
        if share is None:
            return "language", "another language: no letters at all"
        if share < settings.language_share:
            least = f"at least {settings.language_share:.0%} is needed"
            return "language", f"another language: {share:.1%} of the letters are {settings.language}, {least}"
    if settings.max_duplicate_lines < 1:
        share = duplicate_line_share(texts)
        if share > settings.max_duplicate_lines:
            most = f"at most {settings.max_duplicate_lines:.0%} is allowed"
            return "duplicate_lines", f"repeated lines: {share:.1%} of the lines repeat an earlier one, {most}"
    if settings.max_duplicate_ngrams < 1:
        share = duplicate_ngram_share(split.units)
        if share > settings.max_duplicate_ngrams:
            most = f"at most {settings.max_duplicate_ngrams:.0%} is allowed"
            return "duplicate_ngrams", f"repeated passages: {share:.1%} of the text repeats earlier passages, {most}"
    return None
