"""Every word of the pages exists in both languages, with the same braces, and is used."""

import re
from pathlib import Path

from minillm.compare.curves import X_NAMES
from minillm.web.runs_page import MONITOR
from minillm.web.settings import SLIDERS
from minillm.web.words import LANGUAGES, WORDS, Words

CODE = "\n".join(
    path.read_text() for path in Path(__file__).parents[2].glob("minillm/web/*.py") if path.name != "words.py"
)


def test_every_word_is_used_and_every_used_word_exists():
    used = set(re.findall(r'\bt\(\s*"(\w+)"', CODE)) | {"tokens"}
    kept = set(re.findall(r'_kept\(st\.\w+, t, "(\w+)"', CODE)) | {"model"} | set(SLIDERS)
    used |= kept | {f"{name}_note" for name in kept} | set(X_NAMES)
    used |= {"n_tokens", "thoughts", "stopped", "length"}  # chosen between two
    used |= {*MONITOR, "curves", "samples", "monitor", "data", "settings"}  # the tabs of a run
    assert used == set(WORDS)


def test_both_languages_say_the_same():
    for name, texts in WORDS.items():
        assert len(list(filter(None, texts))) == len(LANGUAGES), name
        english, chinese = (sorted(re.findall(r"\{[^}]*\}", text)) for text in texts)
        assert english == chinese, name
        assert not re.search("[\u4e00-\u9fff]", texts[0]), name
    assert Words("zh")("stop") == "停止"
    assert Words("en")("called", name="clock") == "Called clock"
