"""Each rule of cleaning against a slow formula, or against texts whose answer is seen by eye."""

import random
import unicodedata
from dataclasses import replace

import pytest

from minillm.data.prepare.contents import change_texts, texts_of, to_json
from minillm.data.prepare.near import shingles
from minillm.data.prepare.one_record import Cleaner, RawRecord, shingle_set
from minillm.data.prepare.overlap import Overlap, read_questions
from minillm.data.prepare.rules import (
    drop_reason,
    duplicate_line_share,
    duplicate_ngram_share,
    language_share,
    remove_control_characters,
    remove_control_from,
    remove_html,
)
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.units import SplitTexts, ngrams, split_units
from minillm.data.schema import parse_record

OFF = PrepareSettings(data_path="a.jsonl", output="b.jsonl")


def test_units_are_words_and_chinese_characters():
    assert split_units("GPT-2 于2019年发布。🙂") == ["gpt", "2", "于", "2019", "年", "发", "布"]
    assert split_units("ＧＰＴ don't ça_va カナ 한국어 𠀀𠀁") == [
        "gpt", "don", "t", "ça", "va", "カ", "ナ", "한국어", "𠀀", "𠀁",
    ]  # fmt: skip
    assert split_units("!?… 🙂") == []
    assert list(ngrams(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(ngrams(["a"], 2)) == []


def test_units_of_joined_texts_are_those_of_each():
    """So a record's texts are split once, for all rules; final sigma and combining marks look over their borders."""
    rng = random.Random(3)
    for _ in range(300):
        texts = ["".join(rng.choice("aΣσ\u0301\u0323é猫ｶﾞ \n.") for _ in range(rng.randrange(9))) for _ in range(4)]
        assert shingle_set(SplitTexts(texts).units) == shingles(split_units("\n".join(texts)))


def test_a_records_texts_are_split_once(write, monkeypatch):
    pytest.importorskip("rensa")
    seen = []
    monkeypatch.setattr("minillm.data.prepare.units.split_units", lambda text: seen.append(text) or split_units(text))
    questions = write("eval.jsonl", [{"text": "some question that is long enough to be looked for"}])
    settings = PrepareSettings(
        data_path="x", output="y.jsonl", near_duplicates="drop", max_duplicate_ngrams=0.5, eval_files=str(questions)
    )
    cleaner = Cleaner(settings, kind="chat", questions=Overlap(read_questions(questions)))
    outcome = cleaner(RawRecord(0, "x", 1, RAW["chat"], None, False, False))
    assert not outcome.rule
    assert seen == ["问 1", "想", "答"]


def test_control_characters_go_and_line_ends_are_one():
    text = "\ufeffa\x00b\r\nc\rd\te\u2028f\x85g\x1b[0m\x7f 🙂\u200d"
    assert remove_control_characters(text) == "ab\nc\nd\te\nf\ng[0m 🙂\u200d"
    for code in range(0x20):
        kept = {9: "\t", 10: "\n", 13: "\n"}.get(code, "")
        assert remove_control_characters(f"x{chr(code)}y") == f"x{kept}y"
    assert remove_control_from({"a": ["\x00b", {"c": "\x01"}], "n": 3, "z": None}) == {
        "a": ["b", {"c": ""}], "n": 3, "z": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<p>一&nbsp;段 <b>粗体</b></p>", "一\xa0段 粗体"),
        ("x<br/>y<BR>z", "xyz"),
        ('<a href="x?a=1&b=2">link</a><!-- note -->', "link"),
        ("<script>if (a < b) {}</script>text<style>p {}</style>", "text"),
        ("<think>\n1 < 2 && 3 > 2\n</think>", "<think>\n1 < 2 && 3 > 2\n</think>"),
        ("a &amp; b without a tag", "a &amp; b without a tag"),
        ("vector<int> v; x <y", "vector<int> v; x <y"),
    ],
)
def test_html_goes_and_other_brackets_stay(text, expected):
    assert remove_html(text) == expected


def slow_duplicate_ngram_share(text: str, n: int) -> float:
    """Mark every unit of every run that stood earlier; the share of marked units."""
    units = split_units(text)
    marked = [False] * len(units)
    for start in range(len(units) - n + 1):
        if any(units[earlier : earlier + n] == units[start : start + n] for earlier in range(start)):
            marked[start : start + n] = [True] * n
    return sum(marked) / max(1, len(units))


def test_repeated_passages_equal_the_slow_formula():
    rng = random.Random(0)
    shares = set()
    for _ in range(200):
        text = " ".join(rng.choice(["a", "b", "猫"]) for _ in range(rng.randrange(40)))
        share = duplicate_ngram_share([split_units(text)], n=3)
        assert share == pytest.approx(slow_duplicate_ngram_share(text, 3))
        shares.add(round(share, 2))
    assert len(shares) > 20
    assert duplicate_ngram_share([["a", "b", "c"]] * 2, n=3) == 0  # turns are not compared with each other


def test_repeated_lines_equal_the_slow_formula():
    rng = random.Random(1)
    for _ in range(100):
        lines = [rng.choice(["", "  ", "a", " a", "b", "c", "今天"]) for _ in range(rng.randrange(12))]
        full = [line.strip() for line in lines if line.strip()]
        expected = sum(line in full[:i] for i, line in enumerate(full)) / max(1, len(full))
        assert duplicate_line_share(["\n".join(lines)]) == expected


def test_language_share_equals_counting_by_character_name():
    text = "Ça va? 你好，世界 2024! Привет ｱ ª"
    letters = [c for c in text if c.isalpha()]
    for language, word in (("zh", "CJK UNIFIED"), ("latin", "LATIN")):
        expected = sum(unicodedata.name(c).startswith(word) for c in letters) + (language == "latin")  # ª
        assert language_share([text], language) == pytest.approx(expected / len(letters))
    assert language_share(["123 🙂"], "zh") is None
    assert language_share(["龍", "a"], "zh") == 0.5


@pytest.mark.parametrize(
    "flags, texts, n_tokens, rule",
    [
        ({"min_characters": 5}, ["四个字呢"], None, "min_characters"),
        ({"min_characters": 5}, ["四个", "字呢吗"], None, None),
        ({"max_characters": 5}, ["六个字的文本"], None, "max_characters"),
        ({"max_characters": 6}, ["六个字的文本"], None, None),
        ({"min_tokens": 3}, ["x"], 2, "min_tokens"),
        ({"max_tokens": 3}, ["x"], 4, "max_tokens"),
        ({"language": "zh"}, ["中文 abc"], None, "language"),
        ({"language": "zh", "language_share": 0.4}, ["中文 abc"], None, None),
        ({"language": "zh"}, ["🙂"], None, "language"),
        ({"max_duplicate_lines": 0.3}, ["a\na\nb"], None, "duplicate_lines"),
        ({"max_duplicate_lines": 0.34}, ["a\na\nb"], None, None),
        ({"max_duplicate_ngrams": 0.1}, ["春天来了我们去公园里玩吧" * 2], None, "duplicate_ngrams"),
        ({}, ["a\na\na"], None, None),
    ],
)
def test_limits(flags, texts, n_tokens, rule):
    reason = drop_reason(SplitTexts(texts), n_tokens, replace(OFF, **flags))
    assert (reason and reason[0]) == rule


MESSAGES = [{"role": "user", "content": "问 1"}, {"role": "assistant", "content": "答", "reasoning_content": "想"}]
RAW = {
    "text": {"text": "a", "log_prob": -1.5, "source": "book"},
    "chat": {"conversations": MESSAGES, "final": "3", "tools": []},
    "alpaca": {"instruction": "i", "input": "x", "output": "o", "id": 7},
    "with text": {"messages": MESSAGES, "text": "问 1", "lang": "zh"},
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "s"},
    "judged": {"prompt": "p", "completion": "c", "label": False, "score": 1},
    "system": {"system": "s", "question": "q", "answer": "a"},
    "tools": {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}], "id": 1},
    "tools of pairs": {"prompt": "p", "chosen": "c", "rejected": "r", "functions": [{"name": "f"}]},
}


@pytest.mark.parametrize("name", RAW)
def test_our_layout_reads_as_the_same_record(name):
    record = parse_record(RAW[name], 3)
    again = parse_record(to_json(record), 3)
    dropped_keys = {"text"} if name == "with text" else set()
    expected = replace(record, extra={k: v for k, v in record.extra.items() if k not in dropped_keys})
    assert again == expected


@pytest.mark.parametrize("name", RAW)
def test_a_change_reaches_every_text_and_no_other_key(name):
    record = parse_record(RAW[name], 3)
    changed = change_texts(record, lambda text: text + "!")
    assert texts_of(changed) == [text + "!" for text in texts_of(record)]
    assert (changed.extra, changed.label, changed.log_prob) == (record.extra, record.label, None)
    assert change_texts(record, lambda text: text) is record
