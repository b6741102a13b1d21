"""The course: both languages say the same, and its commands print what the chapters promise.

``make test`` runs the commands of up to three seconds; ``make docs-check`` (``MINILLM_DOCS=1``) runs all of them.
"""

import importlib.util
import os
import re
import sys

import pytest

from tests.docs.course import COURSE, ROOT, Example, Expected, chapters, check, examples, run

ALL = os.environ.get("MINILLM_DOCS") == "1"
SHORT = 3.0  # seconds
PAIRS = [(page, COURSE / "zh" / page.name) for page in chapters("en")]
EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{index}")
    for page in chapters("en")
    for index, example in enumerate(examples(page))
]
HEADINGS = (
    "The question",
    "Your prediction",
    "The mathematics",
    "In the code",
    "Run it",
    "If yours differs",
    "Exercises",
)
HEADINGS_ZH = ("问题", "先猜一猜", "数学", "代码在哪里", "动手运行", "结果不一样？", "练习")


def test_both_languages_have_the_same_chapters():
    assert [page.name for page in chapters("en")] == [page.name for page in chapters("zh")]


def test_contents_and_neighbours_are_up_to_date():
    spec = importlib.util.spec_from_file_location("contents", COURSE / "contents.py")
    contents = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contents)
    stale = [str(path) for path, text in contents.written().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python docs/course/contents.py"


def _common(found: object) -> str:
    """Return what both languages share of a match: without comments of commands and words in formulas."""
    return re.sub(r"#[^\n]*|/(en|zh)/|\\text\{[^}]*\}|_zh", "", str(found))


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: page.stem)
def test_both_languages_say_the_same(english, chinese):
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    for name, pattern in {
        "commands and comments": r"```\w*\n(.*?)```|(<!--.*?-->)",
        "links": r"\]\(([^)#]+)[^)]*\)",
        "files and symbols": r"`([\w/]+\.py(?:`, `\w[\w.]*)?)`",
        "formulas": r"\$\$(.+?)\$\$",
    }.items():
        first, second = (sorted(map(_common, re.findall(pattern, text, flags=re.S))) for text in texts)
        assert first == second, name


@pytest.mark.parametrize(
    "page", [page for pair in PAIRS for page in pair], ids=lambda page: f"{page.parent.name}-{page.stem}"
)
def test_a_chapter_has_its_parts(page):
    headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    wanted = HEADINGS if page.parent.name == "en" else HEADINGS_ZH
    assert [heading for heading in headings if heading in wanted] == list(wanted)
    assert examples(page), "nothing to run"
    assert all(example.expected for example in examples(page)), "a command without an expectation"


@pytest.fixture
def interpreter(request) -> str:
    """A Python that has torch imported, which takes longer than a short command; for ``ALL`` that of a reader."""
    return sys.executable if ALL else request.getfixturevalue("python")


@pytest.mark.parametrize("example", EXAMPLES)
def test_commands_print_what_the_chapters_say(example, interpreter):
    if example.seconds > SHORT and not ALL:
        pytest.skip("longer than three seconds: make docs-check runs it")
    if example.needs == "demo" and not (ROOT / "out/demo/full_sft_128").is_dir():
        pytest.skip("needs out/demo: run make demo")
    check(example, run(example, interpreter))


def test_a_wrong_number_is_found():
    example = Example("x", 1.0, "", (Expected("loss", 6.93, 0.05),))
    check(example, "loss: 6.95 nats")
    with pytest.raises(AssertionError, match=r"6\.93 ± 0\.05"):
        check(example, "loss: 7.95 nats")
    with pytest.raises(AssertionError, match="does not print 'loss'"):
        check(example, "6.93")
