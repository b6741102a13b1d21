"""Writes the lists of chapters, and each chapter's links to its neighbours: run it after adding a chapter.

python docs/course/contents.py
"""

import re
from pathlib import Path

COURSE = Path(__file__).parent
CONTENTS = {"en": "Contents", "zh": "目录"}


def title_of(page: Path) -> str:
    """Return the first line of a chapter, without its mark: ``5 Loss, entropy and its floor``."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def with_neighbours(pages: list[Path], index: int, language: str) -> str:
    """Return the text of a chapter with the links of its third line."""
    links = [f"[{CONTENTS[language]}](README.md)"]
    if index > 0:
        links.insert(0, f"[← {title_of(pages[index - 1])}]({pages[index - 1].name})")
    if index + 1 < len(pages):
        links.append(f"[{title_of(pages[index + 1])} →]({pages[index + 1].name})")
    lines = pages[index].read_text(encoding="utf-8").split("\n")
    lines[2] = " · ".join(links)
    return "\n".join(lines)


def with_links(text: str, pages: list[Path]) -> str:
    """Return the contents with a link for each chapter that is there."""
    for page in pages:
        number, _, title = title_of(page).partition(" ")
        text = re.sub(rf"^{number}\. .*$", f"{number}. [{title}]({page.name})", text, flags=re.M)
    return text


def written() -> dict[Path, str]:
    """Return all files with what they should say."""
    texts = {}
    for language in CONTENTS:
        pages = sorted((COURSE / language).glob("[0-9][0-9]-*.md"))
        texts |= {page: with_neighbours(pages, index, language) for index, page in enumerate(pages)}
        contents = COURSE / language / "README.md"
        texts[contents] = with_links(contents.read_text(encoding="utf-8"), pages)
    return texts


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
