"""Units of text, the words that all rules compare: one Chinese or Japanese character, or a run of other letters.

    "GPT-2 于2019年发布。"  ->  gpt 2 于 2019 年 发 布

So "13 units in a row" are 13 words of English and 13 characters of Chinese, in mixed texts too. Upper case, white space
and punctuation do not count, so texts that differ only in them have equal units.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SINGLE = HAN + "\u3005\u3007\u3040-\u30ff"  # also kana, which are written without spaces
_UNIT = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")


def split_units(text: str) -> list[str]:
    """Return the units of ``text`` in order; none for a text without letters and digits."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


class SplitTexts:
    """The texts of a record and their units, which are computed once, when the first rule needs them.

    Attributes:
        texts: as they are.
    """

    def __init__(self, texts: list[str]):
        self.texts = texts

    @cached_property
    def units(self) -> list[list[str]]:
        """The units of each text."""
        return [split_units(text) for text in self.texts]


def ngrams(units: list[str], n: int) -> Iterator[str]:
    """Yield every run of ``n`` units as one string, in order; none if there are fewer units."""
    return (" ".join(units[start : start + n]) for start in range(len(units) - n + 1))
