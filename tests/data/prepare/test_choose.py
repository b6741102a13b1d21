"""Exact duplicates, decontamination and mixtures against slow formulas."""

import random

import numpy as np
import pytest

from minillm.data.prepare.choose import SAMPLE, choose_by_size, random_keys
from minillm.data.prepare.exact import HASH, content_hash, first_equal
from minillm.data.prepare.near import mix_bits
from minillm.data.prepare.overlap import Overlap, read_questions
from minillm.data.prepare.units import split_units
from minillm.data.schema import parse_record
from minillm.errors import UserError


def hash_of(value: dict) -> bytes:
    return content_hash(parse_record(value, 1))


def test_equal_texts_have_equal_hashes():
    base = hash_of({"text": "Hello  world\n你好"})
    assert base == hash_of({"text": " hello world 你好", "source": "another"})
    assert base == hash_of({"text": "Ｈello WORLD 你好"})
    others = [{"text": "hello world"}, {"text": "helloworld 你好"}, {"text": "hello world, 你好"}]
    assert base not in map(hash_of, others)


def test_roles_kinds_and_labels_count():
    def talk(*turns):
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    values = [
        {"text": "a b"},
        talk(("user", "a"), ("assistant", "b")),
        talk(("user", "a b"), ("assistant", "c")),
        talk(("user", "a"), ("assistant", "b c")),
        talk(("system", "a"), ("assistant", "b")),
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "c", "rejected": "b"},
        {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "b", "tools": [{"name": "g"}]},
    ]
    assert len(set(map(hash_of, values))) == len(values)
    assert hash_of(values[1]) == hash_of({"instruction": "A", "output": "b"})


def test_first_equal_is_the_slow_search():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 200):
        hashes = np.zeros(n, HASH)
        hashes["high"], hashes["low"] = rng.integers(0, 9, n), rng.integers(0, 9, n)
        expected = [next(j for j in range(n) if hashes[j] == hashes[i]) for i in range(n)]
        assert first_equal(hashes).tolist() == expected


def test_mix_bits_is_splitmix64():
    """The first outputs of the published generator for seed 1234567 (its state grows by the same constant)."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    assert mix_bits(np.array(states, np.uint64)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def test_random_keys_depend_on_seed_purpose_and_content():
    hashes = np.array([(1, 2), (2, 1), (1, 2)], HASH)
    keys = random_keys(hashes, 1, SAMPLE)
    assert keys[0] == keys[2] != keys[1]
    assert not set(keys.tolist()) & set(random_keys(hashes, 2, SAMPLE).tolist())
    assert not set(keys.tolist()) & set(random_keys(hashes, 1, SAMPLE + 1).tolist())
    many = np.zeros(20_000, HASH)
    many["low"] = np.arange(20_000)
    assert abs(random_keys(many, 5, SAMPLE).astype(float).mean() / 2**64 - 0.5) < 0.01


def test_a_choice_by_size_is_the_nearest_prefix():
    rng = np.random.default_rng(1)
    for _ in range(100):
        keys, sizes = rng.permutation(9).astype(np.uint64), rng.integers(1, 9, 9)
        wanted = int(rng.integers(0, 60))
        chosen = choose_by_size(keys, sizes, wanted)
        order = sorted(range(9), key=lambda i: keys[i])
        errors = [abs(sum(sizes[i] for i in order[:n]) - wanted) for n in range(10)]
        assert chosen.tolist() == order[: errors.index(min(errors))]


# ---- decontamination ---------------------------------------------------------------------------------------------


def slow_overlap(text: str, question: str, n: int) -> bool:
    a, b = split_units(text), split_units(question)
    n = min(n, len(b))
    return n >= min(8, n) and any(a[i : i + n] == b[j : j + n] for i in range(len(a)) for j in range(len(b) - n + 1))


def test_overlap_equals_the_slow_search():
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        question = " ".join(rng.choice("a猫") for _ in range(rng.randrange(8, 20)))
        text = " ".join(rng.choice("a猫") for _ in range(60))
        overlap = Overlap([("q", question)], ngram=9)
        assert (overlap.find([split_units(text)]) is not None) == slow_overlap(text, question, 9)
        found += overlap.find([split_units(text)]) is not None
    assert 20 < found < 280


QUESTION = "下列关于光合作用的说法中正确的是哪一项"
ENGLISH = "Which of the following statements best explains why photosynthesis is the foundation of most food webs?"


@pytest.mark.parametrize(
    "text, is_found",
    [
        (f"前文。{QUESTION}？后文", True),
        ("前文。下列关于光合作用，的说法中正 确 的是！", True),  # 13 characters in a row
        ("前文。下列关于光合作用的说法中误", False),  # 12
        ("x " + ENGLISH.upper() + " y", True),
        ("following statements best explains why photosynthesis is the foundation of most food webs", True),  # 13 words
        ("following statements best explains why photosynthesis is the foundation of most food", False),  # 12
        ("the short one is here: 一二三四五六七八九", True),  # a whole question of 9 units
        ("一二三四五六七八", False),
        ("短问题", False),
    ],
)
def test_questions_are_found_inside_texts(text, is_found):
    overlap = Overlap([("a:1", QUESTION), ("b:2", ENGLISH), ("c:3", "一二三四五六七八九"), ("d:4", "短问题")])
    assert (overlap.find([["other"], split_units(text)]) is not None) == is_found
    assert (overlap.n_texts, overlap.n_too_short) == (4, 1)


def test_questions_of_every_kind_of_evaluation_file(write):
    path = write(
        "eval.jsonl",
        [
            {"id": "1", "question": "mc question", "choices": ["a", "b"], "answer": 0},
            {"instruction": "do", "input": "this", "output": "answer"},
            {"conversations": [{"from": "human", "value": "u1"}, {"from": "gpt", "value": "a1"}]},
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"text": "whole text"},
        ],
    )
    assert list(read_questions(path)) == [
        (f"{path}:1", "mc question"),
        (f"{path}:2", "do\nthis"),
        (f"{path}:3", "u1"),
        (f"{path}:4", "p"),
        (f"{path}:5", "whole text"),
    ]
    with pytest.raises(UserError, match=r"bad.jsonl, line 1: .*fit no schema"):
        list(read_questions(write("bad.jsonl", [{"foo": 1}])))
