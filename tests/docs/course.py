"""The course's pages as data: their commands, what they promise, and whether it comes true.

A command that is run stands in a code block behind a comment, and what it must print in comments behind the block:

    <!-- run: seconds=20 -->
    ```bash
    python docs/course/code/ch05_loss.py
    ```
    <!-- expect: "loss at the start" 6.93 ± 0.05 -->
    <!-- expect: "done" -->

The first number behind the quoted text must lie in the band. ``needs=demo``: it reads what ``make demo`` leaves.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "docs" / "course"
_RUN = re.compile(
    r"<!-- run:(?P<options>[^>]*?)-->\s*```bash\n(?P<command>.*?)```(?P<after>(?:\s*<!-- expect:.*?-->)*)", re.S
)
_EXPECT = re.compile(r'<!-- expect: "(?P<text>.*?)"(?: (?P<value>-?[\d.,e+-]+) ± (?P<band>[\d.e+-]+))? -->')
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Expected:
    """A text that a command prints, and the number behind it."""

    text: str
    value: float | None
    band: float | None


@dataclass(frozen=True)
class Example:
    """A command of a chapter with what it must print."""

    command: str
    seconds: float
    needs: str
    expected: tuple[Expected, ...]


def chapters(language: str) -> list[Path]:
    """Return the chapters in their order."""
    return sorted((COURSE / language).glob("[0-9][0-9]-*.md"))


def examples(page: Path) -> list[Example]:
    """Return the commands of a chapter that are run."""
    found = []
    for match in _RUN.finditer(page.read_text(encoding="utf-8")):
        options = dict(part.split("=") for part in match["options"].split())
        expected = tuple(
            Expected(
                e["text"], *(None if e[key] is None else float(e[key].replace(",", "")) for key in ("value", "band"))
            )
            for e in _EXPECT.finditer(match["after"])
        )
        command = " ".join(match["command"].replace("\\\n", " ").split())
        found.append(Example(command, float(options["seconds"]), options.get("needs", ""), expected))
    return found


def run(example: Example, python: str = sys.executable) -> str:
    """Run a command from the root with a Python; return what it prints, errors included."""
    words = [python if word == "python" else word for word in shlex.split(example.command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # this checkout, whichever is installed
    limit = 60 + 10 * example.seconds
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{example.command} ended with {done.returncode}:\n{output[-2000:]}"
    return output


def check(example: Example, output: str) -> None:
    """Raise AssertionError where the output is not what the chapter promises."""
    for expected in example.expected:
        _, found, after = output.partition(expected.text)
        assert found, f"{example.command} does not print {expected.text!r}:\n{output[-2000:]}"
        if expected.value is not None:
            number = _NUMBER.search(after)
            assert number, f"no number behind {expected.text!r}"
            value = float(number[0].replace(",", ""))
            promised = f"{expected.value} ± {expected.band}"
            is_near = abs(value - expected.value) <= expected.band
            assert is_near, f"{example.command} prints {expected.text!r} {value}; the chapter says {promised}"
