"""The documentation site: every page is in it, links hold after pages are moved, and it builds without a warning."""

import html
import importlib.util
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.test_pages import PAGES, ROOT, text_of

SITE = ROOT / "docs" / "site"
LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def build():
    """docs/site/build.py, which needs none of the site's packages to be imported."""
    spec = importlib.util.spec_from_file_location("build_site", SITE / "build.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def is_chinese(page: Path) -> bool:
    return page.stem.endswith("_zh") or "zh" in page.parts


# ---- the navigation ----------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_once(build):
    for section in build.SITE["navigation"]:
        assert set(section["title"]) == set(LANGUAGES)
        for pattern in section["pages"]:
            assert list(ROOT.glob(pattern)), f"{pattern} matches no page"
    listed = [page for section in build.SITE["navigation"] for page in build.english_pages(section)]
    assert len(set(listed)) == len(listed)
    shown = set(build.places("en")) | set(build.places("zh"))
    missing = [str(page.relative_to(ROOT)) for page in PAGES if page not in shown]
    assert not missing, "add them to the navigation in docs/site/site.yml, or give a Chinese page its English one"
    assert shown == set(PAGES)


def test_a_chinese_page_has_the_place_of_its_english_one(build):
    english, chinese = build.places("en"), build.places("zh")
    assert sorted(english.values()) == sorted(chinese.values())
    assert len(set(english.values())) == len(english)
    assert not [page for page in english if is_chinese(page)]
    assert chinese[ROOT / "docs/data_zh.md"] == english[ROOT / "docs/data.md"] == "data.md"
    assert chinese[ROOT / "docs/course/zh/05-loss.md"] == english[ROOT / "docs/course/en/05-loss.md"]
    assert chinese[ROOT / "README_zh.md"] == english[ROOT / "README.md"] == "index.md"


def test_titles_are_those_of_the_pages(build):
    sections = {language: build.settings(language)["nav"] for language in LANGUAGES}
    course = {language: next(iter(sections[language][1].values())) for language in LANGUAGES}
    assert {"5 Loss, entropy and its floor": "course/05-loss.md"} in course["en"]
    assert list(sections["zh"][1]) == ["课程"]
    assert [list(entry.values()) for entry in course["en"]] == [list(entry.values()) for entry in course["zh"]]


def test_the_reference_is_of_modules_that_export(build):
    for name in build.SITE["reference"]["modules"]:
        assert "__all__" in (ROOT / "minillm" / name / "__init__.py").read_text(encoding="utf-8")


# ---- what is changed in pages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewrite(build):
    """Rewrites a text as if it stood in a page."""
    return lambda page, text, language="en": build.make_site(language).rewrite(ROOT / page, text)


@pytest.mark.parametrize(
    ("page", "language", "link", "wanted"),
    [
        ("README.md", "en", "docs/course/en/05-loss.md#run-it", "course/05-loss.md#run-it"),
        ("docs/course/en/05-loss.md", "en", "../../results.md", "../results.md"),
        ("docs/course/en/README.md", "en", "../zh/README.md", "../../zh/course/index.html"),
        ("docs/course/zh/README.md", "zh", "../../exercises/README_zh.md", "../exercises.md"),
        ("docs/course/zh/05-loss.md", "zh", "README.md", "index.md"),
        ("docs/guide_zh.md", "zh", "guide.md", "../en/guide.html"),
        ("docs/guide_zh.md", "zh", "architecture.md", "architecture.md"),  # in English only
        ("docs/guide.md", "en", "../minillm/plan", "source/minillm/plan/index.md"),
        ("docs/course/en/05-loss.md", "en", "../../../train_sft.py", "../source/train_sft.py.md"),
        ("README.md", "en", "docs/pictures/demo_pretrain.png", "pictures/demo_pretrain.png"),
        ("README.md", "en", "https://example.org/a.md#b", "https://example.org/a.md#b"),
        ("README.md", "en", "#try-it", "#try-it"),
    ],
)
def test_links(rewrite, page, language, link, wanted):
    for form in ("[text]({})", '<img src="{}" alt="">'):
        assert form.format(wanted) in rewrite(page, form.format(link), language)


def test_files_and_symbols_become_links_to_their_lines(rewrite):
    names = "`minillm/lora/core.py`, `LoRA`: `lora/core.py`, `train_sft.py`, `a/b.py`"
    text = rewrite("docs/course/en/18-lora.md", names)
    found = re.match(
        r"\[`minillm/lora/core\.py`\]\((\S+)\), \[`LoRA`\]\((\S+)#__codelineno-0-(\d+)\): "
        r"\[`lora/core\.py`\]\(\1\), `train_sft\.py`, `a/b\.py`$",
        text,
    )
    assert found, text
    assert found[1] == found[2] == "../source/minillm/lora/core.py.md"
    lines = (ROOT / "minillm/lora/core.py").read_text(encoding="utf-8").splitlines()
    assert lines[int(found[3]) - 1].startswith("class LoRA")
    linked = "[`minillm/lora/core.py`](https://example.org)"
    assert rewrite("README.md", linked) == linked


def test_code_is_left_alone(rewrite):
    code = "```bash\ncat [a](docs/guide.md) `minillm/lora/core.py` # 中\n文\n```"
    assert rewrite("README.md", f"text\n\n{code}\n") == f"text\n\n{code}\n"


def test_formulas_comments_pictures_lists_and_lines_of_chinese(rewrite):
    assert rewrite("README.md", "```math\na\n= b\n```") == "$$a\n= b$$"
    assert rewrite("README.md", "<!-- run: seconds=1 -->\n```bash\nls\n```") == "```bash\nls\n```"
    picture = (
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="docs/a-dark.svg">\n'
        '  <img alt="x" src="docs/a.svg" width="9">\n</picture>'
    )
    assert rewrite("README.md", picture) == (
        '<img alt="x" src="a.svg#only-light" width="9"><img alt="x" src="a-dark.svg#only-dark" width="9">'
    )
    assert rewrite("README.md", "1. a\n\n   ```\n   b\n   ```\n* c\n\n  d\n\ne") == (
        "1. a\n\n    ```\n    b\n    ```\n\n* c\n\n    d\n\ne"
    )
    assert rewrite("README.md", "1. a\n\n   b\n2. c\n3. d") == "1. a\n\n    b\n\n2. c\n3. d"
    assert rewrite("README.md", "* a\n  10. b\n  1. c") == "* a\n    10\\. b\n    1. c"
    chinese = "甲，\n乙\nGPU\n丙：\n\n* 丁。\n  戊\n* 己\n"
    assert rewrite("README_zh.md", chinese, "zh") == "甲，乙\nGPU\n丙：\n\n* 丁。戊\n* 己\n"


def test_a_page_without_chinese_says_so(rewrite, build):
    assert rewrite("docs/architecture.md", "# A\n\nb", "zh").startswith("# A\n\n*本页只有英文。*\n\nb")
    assert "只有英文" not in rewrite("docs/guide_zh.md", "# A\n\nb", "zh") + rewrite("docs/architecture.md", "# A\n\nb")


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_files_that_pages_want_exist(build, language):
    site = build.make_site(language)
    for page in site.places:
        site.rewrite(page, text_of(page))
    assert len(site.linked) > 50
    assert not [path for path in site.linked if not path.exists()]


# ---- formulas ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def markdown():
    """Turns Markdown into HTML with docs/site/formulas.py."""
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("formulas", SITE / "formulas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: pytest.importorskip("markdown").markdown(text, extensions=[module.Formulas()])


def test_formulas_become_mathml(markdown):
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">' in markdown("so $a_1*b_1$ and $x*y$")
    assert "<em>" not in markdown("so $a_1*b_1$ and $x*y$")
    assert 'display="block"' in markdown("$$a\n= b$$")
    for text in ("`$a$`", "from $5 to $6", r"\$a$", "a $ b $ c"):
        assert "<math" not in markdown(text), text


@pytest.mark.parametrize(
    ("latex", "wanted"),
    [
        (r"p\ln q", '<mi>p</mi><mspace width="0.167em" /><mi>ln</mi><mspace width="0.167em" /><mi>q</mi>'),
        (r"\ln(p)", '<mi>ln</mi><mo stretchy="false">(</mo>'),
        (r"(p)\ln q", '<mo stretchy="false">)</mo><mspace width="0.167em" /><mi>ln</mi>'),
        (r"L = -x", '<mo>=</mo><mo form="prefix">−</mo><mi>x</mi>'),
        (r"(a) - x", '<mo stretchy="false">)</mo><mo>−</mo><mi>x</mi>'),
        (r"\partial L / \partial x", '<mi>∂</mi><mi>L</mi><mo stretchy="false" lspace="0" rspace="0">/</mo><mi>∂</mi>'),
        (r"\lVert x \rVert", '<mo stretchy="false" lspace="0" rspace="0">‖</mo><mi>x</mi><mo stretchy="false"'),
        (r"\left|x\right|", '<mo stretchy="true" fence="true" form="prefix">|</mo>'),
        (r"\Delta x", '<mi mathvariant="normal">Δ</mi>'),
        (r"a < b", "<mo>&lt;</mo>"),
    ],
)
def test_formulas_are_set_as_tex_sets_them(markdown, latex, wanted):
    assert wanted in markdown(f"${latex}$")


def test_limits_stand_below_where_there_is_room(markdown):
    assert "<munder><mi>min</mi>" in markdown(r"$$\min_x f$$")
    assert "<msub><mi>min</mi>" in markdown(r"$\min_x f$")


# ---- the site itself ---------------------------------------------------------------------------------------------

LOADED = re.compile(r'<(?:script|img|source|iframe)\b[^>]*?\s(?:src|srcset)="([^"]+)"|<link\b[^>]*?\shref="([^"]+)"')
LINKED = re.compile(r'<a\b[^>]*?\shref="([^"]*)"')
MARKUP = re.compile(r"\$\$|```|\\(?:frac|sum|text|ln)\b")  # of Markdown and formulas, where it was not understood


def faults(page: Path, text: str, anchors: dict[Path, set[str]]) -> list[str]:
    """Return what a page of the site loads from elsewhere, links that lead nowhere, and markup that is still there."""
    found = []
    for target in {html.unescape(a or b) for a, b in LOADED.findall(text)}:
        is_local = target.startswith("data:") or (page.parent / unquote(urlsplit(target).path)).is_file()
        found += [] if is_local else [f"loads {target}"]
    for url in {urlsplit(html.unescape(link)) for link in LINKED.findall(text)}:
        if not url.scheme:
            aim = (page.parent / unquote(url.path)).resolve() if url.path else page
            holds = aim.is_file() and unquote(url.fragment) in anchors.get(aim, set()) | {"", "__skip"}
            found += [] if holds else [f"links to {url.geturl()}"]
    if "source" not in page.parts:
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", text, flags=re.S)
        found += [f"shows {markup}" for markup in MARKUP.findall(prose)]
    return [f"{page.name} {fault}" for fault in found]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_and_its_links_hold(build, tmp_path):
    for package in ("zensical", "mkdocstrings", "latex2mathml", "ziamath"):
        pytest.importorskip(package)
    build.main(tmp_path)
    site = tmp_path.resolve() / "site"
    # A server shows 404.html for any address, so its links are absolute.
    texts = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'\sid="([^"]+)"', text)) for page, text in texts.items()}
    assert len(texts) > 200
    assert not [fault for page, text in texts.items() for fault in faults(page, text, anchors)]
    chapter = texts[site / "zh/course/05-loss.html"]
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in chapter
    assert '<html lang="zh"' in chapter
    assert '../../en/course/05-loss.html" hreflang="en"' in chapter  # the switch of languages
    assert 'id="minillm.lora.apply_lora"' in texts[site / "en/reference/lora.html"]
    index = json.loads((site / "zh/search.json").read_text(encoding="utf-8"))["items"]
    assert any("注意力" in item["title"] + item["text"] for item in index)
    assert not [item for item in index if item["location"].startswith("source/")]
