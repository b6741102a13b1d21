"""The tours name files and symbols that exist, the same ones in both languages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"^\| \d+ \| `([\w/]+\.py)` \| `([\w.]+)` \|", re.M)


def steps_of(page: str) -> list[tuple[str, str]]:
    return STEP.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def test_both_languages_take_the_same_steps():
    assert steps_of("tour.md") == steps_of("tour_zh.md")
    assert len(steps_of("tour.md")) > 30


@pytest.mark.parametrize("file, symbol", dict.fromkeys(steps_of("tour.md")))
def test_every_step_exists(file, symbol):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in symbol.split("."):
        (found,) = [node for node in body if getattr(node, "name", None) == name]
        body = found.body
