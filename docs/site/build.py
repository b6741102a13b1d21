"""Builds the documentation site, ``out/site/index.html``: python docs/site/build.py

The Markdown files stay as GitHub reads them. They are copied to ``out/site-pages``, one folder per language, and
changed on the way (``pages.py``); Zensical makes a site of each folder. A page has the same path in both languages, so
the switch between them is a link (``theme/``). ``site.yml`` has the navigation and the settings, ``formulas.py`` the
formulas.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import PICTURES, ROOT, Site, source_page  # noqa: E402

SITE = yaml.safe_load((HERE / "site.yml").read_text(encoding="utf-8"))
OTHER = {"en": "zh", "zh": "en"}
START = """<!doctype html><meta charset="utf-8"><title>minillm</title>
<script>location.replace(navigator.language.startsWith("zh") ? "zh/index.html" : "en/index.html")</script>
<p><a href="en/index.html">English</a> · <a href="zh/index.html">中文</a></p>
"""


def english_pages(section: dict) -> list[Path]:
    """Return the English files of a section of the navigation."""
    return [path for pattern in section["pages"] for path in sorted(ROOT.glob(pattern))]


def in_language(page: Path, language: str) -> Path:
    """Return a page's file in a language: the English one where there is no other."""
    if language == "zh":
        name = page.relative_to(ROOT).as_posix()
        for chinese in (name.replace("/en/", "/zh/"), name.replace(".md", "_zh.md")):
            if chinese != name and (ROOT / chinese).is_file():
                return ROOT / chinese
    return page


def place_of(page: Path) -> str:
    """Return the place of a page in the site of each language: ``course/05-loss.md``, ``index.md``."""
    name = page.relative_to(ROOT).as_posix().removeprefix("docs/").replace("course/en/", "course/")
    # An index.md is the first page of its section in the navigation; another README is a page like others.
    return re.sub(r"/README\.md$", ".md", re.sub(r"^(course/)?README\.md$", r"\1index.md", name))


def places(language: str) -> dict[Path, str]:
    """Return the file of each page with its place."""
    pages = [page for section in SITE["navigation"] for page in english_pages(section)]
    return {in_language(page, language): place_of(page) for page in pages}


def make_site(language: str) -> Site:
    """Return the site of a language, which knows the pages of the other one."""
    other = OTHER[language]
    there = {page: f"../{other}/{place.replace('.md', '.html')}" for page, place in places(other).items()}
    return Site(language, places(language), there)


def settings(language: str) -> dict:
    """Return Zensical's settings for one language, with the navigation."""

    def label(page: Path) -> str:
        return in_language(page, language).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")

    navigation = [
        {section["title"][language]: [{label(page): place_of(page)} for page in english_pages(section)]}
        for section in SITE["navigation"]
    ]
    modules = [{f"minillm.{name}": f"reference/{name}.md"} for name in SITE["reference"]["modules"]]
    navigation.append({SITE["reference"]["title"][language]: modules})
    other = OTHER[language]
    alternate = {"name": SITE["languages"][other], "link": f"../{other}/index.html", "lang": other}
    own = {"docs_dir": f"site-pages/{language}", "site_dir": f"site/{language}", "nav": navigation}
    own["extra"] = {"alternate": [alternate], "homepage": "index.html"}
    # The search needs a worker, and from disk this script instead; Zensical would fetch one from the network.
    own["extra"]["polyfills"] = ["assets/iframe-worker.js"]
    own["theme"] = SITE["settings"]["theme"] | {"language": language, "custom_dir": str(HERE / "theme")}
    return SITE["settings"] | own


def write_pages(site: Site, texts: dict[str, str], linked: set[Path], out: Path) -> None:
    """Write what Zensical reads for one language: pages, sources and pictures that are linked, the reference."""
    folder = out / "site-pages" / site.language
    texts = texts | {f"reference/{m}.md": f"# minillm.{m}\n\n::: minillm.{m}\n" for m in SITE["reference"]["modules"]}
    inside = {file for path in linked if path.is_dir() for file in path.iterdir() if file.is_file()}
    for path in linked | inside:
        if path.suffix in PICTURES:
            (folder / site.place(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / site.place(path))
        else:
            texts[site.place(path)] = source_page(path)
    for place, text in texts.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
    shutil.copytree(HERE / "assets", folder / "assets")
    with as_file(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf") as font:  # the package is there for its font
        shutil.copyfile(font, folder / "assets" / "math.ttf")
    config = yaml.safe_dump(settings(site.language), allow_unicode=True, sort_keys=False)
    (out / f"site-{site.language}.yml").write_text(config, encoding="utf-8")


def main(out: Path = ROOT / "out") -> None:
    """Write the pages, build both sites, and the first page, which chooses one."""
    for name in ("site", "site-pages"):
        shutil.rmtree(out / name, ignore_errors=True)
    sites = [make_site(language) for language in OTHER]
    texts = [
        {place: site.rewrite(page, page.read_text(encoding="utf-8")) for page, place in site.places.items()}
        for site in sites
    ]
    linked = set.union(*(site.linked for site in sites))  # both sites have all, for the switch of languages
    for site, pages in zip(sites, texts, strict=True):
        write_pages(site, pages, linked, out)
        config = out / f"site-{site.language}.yml"
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(config)]
        path = f"{HERE}{os.pathsep}{ROOT}"  # formulas.py, and the code of the reference
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
    (out / "site" / "index.html").write_text(START, encoding="utf-8")
    print(f"the site: {out / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
