"""The course's pictures: each is on a page in both languages, can be read, and is what the library computes.

``make test`` computes those without training again; ``make docs-check`` (``MINILLM_DOCS=1``) computes all of them.
"""

import re
import sys
from itertools import combinations
from pathlib import Path

import pytest

from tests.docs.course import COURSE, chapters
from tests.docs.test_course import ALL

sys.path.insert(0, str(COURSE))
import pictures
from figures.style import THEMES, drawn, drawn_by, numbers_in, paths_of, rounded, svg

NAMES = list(pictures.PICTURES)
TRAINED = {"loss", "attention", "experts", "lora", "dpo"}
SHOWN = re.compile(
    r'<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\n'
    r'  <img src="([^"]+)" width="700" alt="([^"]+)">\n</picture>\n\n((?:.+\n)+)'
)
MAX_BYTES = 2_000_000


def stored(name: str, theme: str = "light") -> bytes:
    """Return a picture as it lies in the repository."""
    return paths_of(name, pictures.FOLDER)[theme].read_bytes()


def series_of(numbers, path: str = "") -> dict[str, list]:
    """Return the numbers and texts of a picture as lists, by where they stand."""
    if isinstance(numbers, dict):
        parts = [series_of(value, f"{path}.{key}") for key, value in numbers.items()]
    elif isinstance(numbers, list) and any(isinstance(value, list | dict) for value in numbers):
        parts = [series_of(value, f"{path}.{n}") for n, value in enumerate(numbers)]
    else:
        return {path: numbers if isinstance(numbers, list) else [numbers]}
    return {key: value for part in parts for key, value in part.items()}


def check_same(computed: dict, found: dict, tolerance: float) -> None:
    """Compare all series; the mean difference of numbers may be ``tolerance`` of the largest."""
    computed, found = series_of(computed), series_of(found)
    assert computed.keys() == found.keys()
    for path, values in computed.items():
        pairs = list(zip(values, found[path], strict=True))
        if all(isinstance(value, int | float) for pair in pairs for value in pair):
            error = sum(abs(a - b) for a, b in pairs) / max(len(pairs), 1)
            assert error <= tolerance * max((abs(b) for _, b in pairs), default=0), path
        else:
            assert values == found[path], path


# ---- on the pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_picture_is_on_one_page(language):
    names = []
    for page in chapters(language):
        text = page.read_text(encoding="utf-8")
        found = SHOWN.findall(text)
        assert len(found) == text.count("<picture") == text.count("pictures/course/") / 2, page.name
        for dark, light, _, caption in found:
            name = Path(light).name.removesuffix(".light.svg")
            paths = {theme: (page.parent / path).resolve() for theme, path in (("light", light), ("dark", dark))}
            assert paths == paths_of(name, pictures.FOLDER)
            assert f"`python docs/course/pictures.py {name}`" in " ".join(caption.split()), page.name
            names.append(name)
    assert sorted(names) == sorted(NAMES)


def test_both_languages_show_them_in_the_same_chapters():
    pages = [[(page.name, [found[1] for found in SHOWN.findall(page.read_text(encoding="utf-8"))])
              for page in chapters(language)] for language in ("en", "zh")]  # fmt: skip
    assert pages[0] == pages[1]


def test_the_folder_holds_these_pictures_and_is_small():
    wanted = [path for name in NAMES for path in paths_of(name, pictures.FOLDER).values()]
    assert sorted(pictures.FOLDER.iterdir()) == sorted(wanted)
    assert sum(path.stat().st_size for path in wanted) < MAX_BYTES


# ---- what is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_what_its_numbers_make(name):
    """The code that draws has not changed since: the bytes are the same, if matplotlib is."""
    version = pytest.importorskip("matplotlib").__version__
    files = {theme.name: stored(name, theme.name) for theme in THEMES}
    numbers = numbers_in(files["light"])
    assert numbers_in(files["dark"]) == numbers
    for theme in THEMES:
        again = svg(pictures.PICTURES[name].draw, numbers, theme)
        if drawn_by(files[theme.name]) == version:
            assert again == files[theme.name], f"run python docs/course/pictures.py {name}"


@pytest.mark.timeout(900)  # some train, and other work may run next to them
@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_library(name):
    if name in TRAINED and not ALL:
        pytest.skip("trains for seconds: make docs-check does it")
    check_same(pictures.compute(name), numbers_in(stored(name)), 0.05 if name in TRAINED else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_large_and_neither_overlap_nor_leave_the_picture(name, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    texts, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (texts.append(text), draw(text, renderer)))
    with drawn(pictures.PICTURES[name].draw, numbers_in(stored(name)), THEMES[0]) as figure:
        FigureCanvasAgg(figure).draw()
        shown = [text for text in texts if text.get_text().strip() and text.get_visible()]
        boxes = {text: text.get_window_extent() for text in shown}
        for text, box in boxes.items():
            assert text.get_fontsize() >= 8, text
            is_inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert is_inside, text
        for (first, box), (second, other) in combinations(boxes.items(), 2):
            assert not box.padded(-1).overlaps(other.padded(-1)), (first, second)


# ---- what the captions say -----------------------------------------------------------------------------------------


def numbers_of(name: str) -> dict:
    return numbers_in(stored(name))


def test_the_loss_ends_at_the_floor_and_not_below():
    numbers = numbers_of("loss")
    first, *_, floor = (value for _, value in numbers["levels"])
    assert abs(numbers["losses"][0] - first) < 0.4
    assert -0.03 < numbers["losses"][-1] - floor < 0.1


def test_one_head_looks_back_one_place_and_the_other_behind_the_same_token():
    numbers = numbers_of("attention")
    tokens, maps = numbers["tokens"], [found["weights"] for found in numbers["maps"]]
    period = next(n for n in range(1, len(tokens)) if tokens[n] == tokens[0])
    assert sum(maps[0][t][t - 1] for t in range(1, len(tokens))) / (len(tokens) - 1) > 0.5
    copied = [maps[1][t][t - period + 1] for t in range(period, len(tokens))]
    assert sum(copied) / len(copied) > 0.5


def test_the_bias_evens_out_the_load():
    alone, balanced = (run["loads"] for run in numbers_of("experts")["runs"])
    assert max(loads[-1] for loads in alone) > 1.5
    assert max(loads[-1] for loads in balanced) < 1.3


def test_an_adapter_has_as_many_singular_values_as_its_rank():
    curves = numbers_of("lora")["curves"]
    assert {name: len(values) for name, values in curves.items() if name != "full"} == {"R = 2": 2, "R = 8": 8}
    assert len(curves["full"]) == 64


def test_the_loss_of_preferences_lets_both_rewards_fall():
    plain, held = numbers_of("dpo")["runs"]
    assert plain["reward_chosen"][0] == plain["reward_rejected"][0] == 0
    assert 0 > plain["reward_chosen"][-1] > plain["reward_rejected"][-1] + 1
    assert held["reward_chosen"][-1] > 0


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pictures.main(["packing", "--output", str(tmp_path / "new")])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"packing.light.svg", "packing.dark.svg"}
    assert "packing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "choose from tokens, packing"),
        (["packing", "--save_dir", "."], "choose from loss, attention"),
        (["--save_dir", "nowhere"], "nowhere has no pretrain_128, full_sft_128"),
    ],
)
def test_a_wrong_command_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        pictures.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_other_numbers_are_noticed():
    numbers = {"a": [1.0, 2.0], "b": {"c": "text"}, "d": [[1], [2]]}
    check_same(numbers, rounded(numbers), 1e-3)
    for other in ({"a": [1.0, 2.1]}, {"b": {"c": "word"}}, {"d": [[1], [3]]}, {"a": [1.0]}):
        with pytest.raises((AssertionError, ValueError)):
            check_same(numbers | other, numbers, 1e-3)


def test_a_number_is_stored_with_four_digits():
    assert rounded({1: (0.123456, float("nan")), "n": 123456}) == {"1": [0.1235, None], "n": 123456}
