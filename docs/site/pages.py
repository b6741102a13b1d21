"""From a page as GitHub reads it to the page of one language's site: links, pictures, lists, lines of Chinese."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
PICTURES = {".png", ".svg", ".jpg", ".gif", ".webp"}
ENGLISH_ONLY = "*本页只有英文。*"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
COMMENT = re.compile(r"^<!--.*?-->\n", re.M | re.S)
TARGET = re.compile(r'(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<target>[^)"\s]+)(?P<after>[)"])')
# A whole link, which stays; or a file in backquotes, with a symbol behind it or not.
FILE = re.compile(
    r"\[[^\[\]]*\]\([^)]*\)|`(?P<file>[\w.-]+/[\w./-]+\.(?:py|yaml))`(?:, `(?P<symbol>\w[\w.]*)(?<!\.py)`)?"
)
PICTURE = re.compile(
    r'<picture>.*?srcset="(?P<dark>[^"]+)".*?<img(?P<a>[^>]*?)src="(?P<light>[^"]+)"(?P<b>[^>]*)>.*?</picture>', re.S
)
# A line of a paragraph in a list that happens to begin with a number: "batches of\n  10. The next".
NUMBER = re.compile(r"^(?! *\d+\. )(.+\n +(?!1\.)\d+)(?=\. )", re.M)
CJK, MARKS = r"[\u3001-\u303f\u4e00-\u9fff\uff00-\uffef]", r"[\u3001-\u303f\uff00-\uffef]"
CHINESE_LINES = re.compile(rf"(?<={CJK})\n *(?={CJK})|(?<={MARKS})\n *(?![*|>#\s-]|\d+\.|\$\$)")


@dataclass
class Site:
    """The pages of one language, and what they link to.

    Attributes:
        places: the file of each page → its place in this site (``course/05-loss.md``).
        elsewhere: the same for pages of the other language, seen from the root of this site.
        linked: source files, folders and pictures that pages link to; grows as pages are rewritten.
    """

    language: str
    places: dict[Path, str]
    elsewhere: dict[Path, str]
    linked: set[Path] = field(default_factory=set)

    def place(self, path: Path) -> str:
        """Return where a file is in this site; a source file or folder becomes a page, a picture is copied."""
        if found := self.places.get(path) or self.elsewhere.get(path):
            return found
        self.linked.add(path)
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in PICTURES:
            return name.removeprefix("docs/")
        return f"source/{name}/index.md" if path.is_dir() else f"source/{name}.md"

    def link(self, page: Path, target: str) -> str:
        """Return what a link of a page becomes."""
        name, mark, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return target
        place = self.place(Path(os.path.normpath(page.parent / name)))
        return os.path.relpath(place, PurePosixPath(self.places[page]).parent) + mark + anchor

    def link_to_code(self, page: Path, file: str, symbol: str | None) -> str:
        """Return a file's name, and a symbol behind it, as links to the code; as they are if there is no such file."""
        path = next((base / file for base in (ROOT, ROOT / "minillm") if (base / file).is_file()), None)
        if path is None:
            return f"`{file}`" + (f", `{symbol}`" if symbol else "")
        target = self.link(page, os.path.relpath(path, page.parent))
        text = f"[`{file}`]({target})"
        return f"{text}, [`{symbol}`]({target}#__codelineno-0-{line_of(path, symbol)})" if symbol else text

    def rewrite(self, page: Path, text: str) -> str:
        """Return the Markdown of a page as Python-Markdown reads it, with links that hold in this site."""
        text = COMMENT.sub("", re.sub(r"^```math\n(.*?)\n```$", r"$$\1$$", text, flags=re.M | re.S))
        parts = FENCE.split(text)  # prose, code, prose, ...
        parts[::2] = [self._rewrite_prose(page, part) for part in parts[::2]]
        if self.language == "zh" and not re.search(r"_zh\.md$|/zh/", page.as_posix()):
            parts[0] = parts[0].replace("\n", f"\n\n{ENGLISH_ONLY}\n", 1)
        return indent_blocks("".join(parts))

    def _rewrite_prose(self, page: Path, text: str) -> str:
        text = TARGET.sub(lambda m: m["before"] + self.link(page, m["target"]) + m["after"], text)
        text = FILE.sub(lambda m: self.link_to_code(page, m["file"], m["symbol"]) if m["file"] else m[0], text)
        text = PICTURE.sub(r'<img\g<a>src="\g<light>#only-light"\g<b>><img\g<a>src="\g<dark>#only-dark"\g<b>>', text)
        return CHINESE_LINES.sub("", NUMBER.sub(r"\1\\", text))


def line_of(path: Path, symbol: str) -> int:
    """Return the line that defines a function, class, method or name."""
    name = re.escape(symbol.rpartition(".")[2])
    lines = path.read_text(encoding="utf-8").splitlines()
    defines = re.compile(rf"\s*(async )?(def|class) {name}\b|\s*{name}\b.*=|\s*self\.{name}\b.*=")
    return next((number for number, line in enumerate(lines, 1) if defines.match(line)), 1)


def indent_blocks(text: str) -> str:
    """Indent what belongs to an item of a list by four, as Python-Markdown wants it; GitHub needs two or three."""
    lines, width, has_blocks = [], 0, False
    for line in text.split("\n"):
        if item := re.match(r"([*-]|\d+\.) +", line):
            if has_blocks and lines[-1]:
                lines.append("")  # otherwise the item continues the last block of the one before
            width, has_blocks = len(item[0]), False
        elif line and not line.startswith(" "):
            width, has_blocks = 0, False
        is_block = width and line.startswith(" " * width)
        has_blocks |= is_block and not lines[-1]
        lines.append(" " * max(4 - width, 0) + line if is_block else line)
    return "\n".join(lines)


def source_page(path: Path) -> str:
    """Return the page that shows a source file, or what is in a folder; not searched."""
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {name}\nhide: [navigation, toc]\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n"
    if path.is_dir():
        links = (f"* [`{file.name}`]({file.name}.md)" for file in sorted(path.iterdir()) if file.is_file())
        return head + "\n".join(links) + "\n"
    language = LANGUAGES.get(path.suffix, "text")
    return f'{head}`````` {{.{language} linenums="1"}}\n{path.read_text(encoding="utf-8")}``````\n'
