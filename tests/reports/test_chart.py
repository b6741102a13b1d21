"""Curves as SVG: each point where its axes say, round numbers beside them, no crash on little data."""

import re

import pytest

from minillm.reports.chart import MAX_TICKS, Axis, Curve, axis_of, chart, is_wide
from minillm.reports.page import both, language_page, page

NAMES = {"en": "loss", "zh": "损失"}
STEP = {"en": "step", "zh": "步数"}


def draw(*curves, **settings):
    return chart(
        NAMES, [Curve(points=points, names=NAMES, color="blue") for points in curves], x_names=STEP, **settings
    )


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.93, 1.02, [0.94, 0.96, 0.98, 1.0, 1.02]), (-3, 4, [-2, 0, 2, 4])],
)
def test_numbers_beside_an_axis_are_round(low, high, expected):
    assert Axis(low=low, high=high, start=0, end=1).ticks() == expected


@pytest.mark.parametrize("low, high", [(1e-5, 1), (0.8, 7), (2.1, 2.4), (1, 1000), (3e-8, 5e-8)])
def test_a_logarithmic_axis_has_a_few_numbers(low, high):
    axis = Axis(low=low, high=high, start=100, end=0, is_log=True)
    ticks = axis.ticks()
    assert 1 < len(ticks) <= MAX_TICKS + 1
    assert all(low <= tick <= high and 0 <= axis.at(tick) <= 100 for tick in ticks)
    assert axis.at((low * high) ** 0.5) == pytest.approx(50)


def test_points_are_between_the_axes():
    picture = draw([(1, 2.0), (3, 1.0), (5, 4.0)], [(2, 3.0)])
    lines = [
        [tuple(map(float, pair.split(","))) for pair in text.split()] for text in re.findall('points="(.*?)"', picture)
    ]
    assert lines == [[(48, 113.3), (190, 166), (332, 8)], [(119, 60.7)]]  # (4 - 2) / 3 of the height below the top
    assert picture.count("<circle") == 1  # a single point is no line


def test_equal_values_and_no_values():
    assert draw([]) == ""
    (line,) = re.findall('points="(.*?)"', draw([(1, 2.0), (2, 2.0)]))
    assert line == "48.0,87.0 332.0,87.0"  # in the middle
    (line,) = re.findall('points="(.*?)"', draw([(1, 1.0), (2, 1.0)], y_limits=(0.0, 1.0)))
    assert line == "48.0,8.0 332.0,8.0"
    assert axis_of([0.0], start=0, end=10).at(0.0) == 5


def test_when_an_axis_should_be_logarithmic():
    assert is_wide([1.0, 2.0, 3.5])
    assert not is_wide([1.0, 2.9])
    assert not is_wide([0.0, 5.0])
    assert not is_wide([])


def test_a_page_has_both_languages_and_starts_with_one():
    parts = [both("p", {"en": "a < b", "zh": "甲"}, "note")]
    text = language_page(NAMES, *parts, language="zh", script="later()")
    assert '<p class="note" data-l="en">a &lt; b</p><p class="note" data-l="zh">甲</p>' in text
    assert "<title>损失</title>" in text
    assert '<body class="zh">' in text
    assert "speak('zh');later()" in text
    assert "navigator.language" in language_page(NAMES)
    assert "<title>loss · 损失</title>" in language_page(NAMES)


def test_pages_follow_the_colours_of_the_browser():
    assert all("prefers-color-scheme:dark" in text for text in (page("a"), language_page(NAMES)))
