"""The tasks of the demo world: checkable answers, and held-out sets that share nothing with training."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

import make_demo
from demo_world import grammar, items, tasks, world
from demo_world.arguments import DemoDataArguments

SMALL = {
    "n_pretrain": 20_000, "n_valid": 600, "n_addition": 3000, "n_sorting": 3000, "n_counting": 3000,
    "n_translation": 2000, "n_facts": 2000, "n_multi_turn": 2000, "n_style": 1000, "n_sft_valid": 300,
    "n_writing": 500, "n_repeat": 500,
    "n_test": 60, "n_reason": 500, "n_reason_test": 50, "n_tools": 500, "n_tools_replay": 100, "n_tools_test": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return make_demo.make_files(DemoDataArguments(**SMALL))


@pytest.fixture(scope="module")
def source():
    return grammar.Source(world.make_world(42), items.Items(42))


def last_prompt(record):
    return record["conversations"][-2]["content"]


def answer(record):
    return record["conversations"][-1]["content"]


# ---- conversations


def is_right(task, prompt, said, facts):
    """Answer the prompt from scratch and compare."""
    if task == "addition":
        a, b = map(int, re.search(r"(\d\d)\+(\d\d)$", prompt).groups())
        return said == f"{a}+{b}={a + b}"
    if task == "sorting":
        digits = re.search(r"(\d+)$", prompt)[1]
        return said == f"{digits}={''.join(sorted(digits))}"
    if task == "counting":
        target, letters = re.search(r"([abcd]):((?: [abcd])+)=$", prompt).groups()
        return said == str(letters.count(target))
    if task == "translation":
        word, other = said.split("=")
        assert word == re.search(r"([^:]+)$", prompt)[1]
        return (word, other) in world.DICTIONARY or (other, word) in world.DICTIONARY
    return said in facts


def test_answers_are_right(demo):
    files, _ = demo
    told = set()
    for record in files["pretrain_train"]:
        if record["kind"] == "facts":
            told |= set(re.findall(r"[^。.]+[。.]", record["text"].replace(". ", ".")))
    n_checked = Counter()
    for name in ("sft_train", "sft_valid", "sft_test"):
        for record in files[name]:
            if record["task"] in ("multi_turn", *tasks.OPEN_TASKS):
                continue
            assert is_right(record["task"], last_prompt(record), answer(record), told), record
            n_checked[name, record["task"]] += 1
    assert len(n_checked) == 15


def test_multi_turn_answers_follow_from_the_first_turn(demo):
    for record in demo[0]["sft_train"] + demo[0]["sft_test"]:
        if record["task"] != "multi_turn":
            continue
        first, said = record["conversations"][0]["content"], answer(record)
        if record["group"] == "name":
            assert re.findall(r"[A-Z]\w+(?=\.)|小.", first) == re.findall(r"[A-Z]\w+(?=\.)|小.", said)
        else:
            a, b = int(re.search(r"\d+", first)[0]), int(re.search(r"\d+", last_prompt(record))[0])
            expected = first.replace("I buy", "You have").replace("我买了", "你有")
            assert said == expected.replace(str(a), str(a + b))


def test_direct_answers_are_to_the_same_problems(demo):
    files = demo[0]
    for reasoned, direct in zip(files["reason_train"], files["direct_train"], strict=True):
        question, answer = direct["conversations"]
        assert question == reasoned["conversations"][0]
        assert answer == {"role": "assistant", "content": reasoned["final"]}
        assert direct["final"] == reasoned["final"]


def test_reasoning_steps_are_right_and_lead_to_final(demo):
    for record in demo[0]["reason_train"] + demo[0]["reason_test"]:
        start, rest = re.fullmatch(r"mod:(\d)(.+)", last_prompt(record)).groups()
        value, steps = int(start), []
        for op, digit in re.findall(r"([-+*])(\d)", rest):
            result = eval(f"({value}{op}{digit}) % 10")
            steps.append(f"{value}{op}{digit}={result}")
            value = result
        assert len(steps) == 5
        assert record["final"] == str(value)
        body = "<think>\n" + ";".join(steps) + f"\n</think>\n<answer>\n{value}\n</answer>"
        assert answer(record) == body


def test_schema(demo):
    files, _ = demo
    for name, records in files.items():
        assert records, name
        for record in records:
            if name == "notes" or "tools" in record:
                continue  # test_tool_use.py looks at them
            if name.startswith("pretrain"):
                assert list(record) == ["text", "log_prob", "kind"]
                assert record["log_prob"] < 0
                continue
            if name.startswith("dpo"):
                assert list(record) == ["chosen", "rejected"]
                assert record["chosen"][:-1] == record["rejected"][:-1]
                full, terse = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
                assert full != terse
                assert terse in full
                continue
            roles = [m["role"] for m in record["conversations"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(m["content"] for m in record["conversations"])
            assert record["task"]
    assert {r["task"] for r in files["sft_train"]} == set(tasks.TASKS)
    groups = {(r["task"], r["group"]) for r in files["sft_test"]}
    assert {
        ("facts", "asked"),
        ("facts", "derived"),
        ("multi_turn", "amount"),
        ("multi_turn", "name"),
    } < groups


# ---- held out


def item(record):
    """What a record asks for, whatever the phrasing or language."""
    task, prompt = record["task"], last_prompt(record)
    if task == "addition":
        return task, tuple(sorted(re.search(r"(\d\d)\+(\d\d)$", prompt).groups()))
    if task == "counting":
        return task, *re.search(r"([abcd]):((?: [abcd])+)=$", prompt).groups()
    if task in ("sorting", "translation"):
        return task, frozenset(answer(record).split("="))
    if task == "facts":
        for fact in FACTS:
            if FACTS[fact][0] == answer(record) or FACTS[fact][1] == answer(record):
                return task, fact
    english_words = re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]+", record["conversations"][2]["content"])
    numbers = re.findall(r"\d+", " ".join(m["content"] for m in record["conversations"]))
    return task, record["conversations"][0]["content"], tuple(english_words[-1:]), tuple(numbers)


_WORLD = world.make_world(42)
FACTS = {fact: (_WORLD.statement(fact, "en"), _WORLD.statement(fact, "zh")) for fact in _WORLD.values}


def test_held_out_items_are_in_no_other_split(demo):
    files, _ = demo
    seen = {
        name: {item(r) for r in files[name] if r["task"] not in tasks.OPEN_TASKS and r["group"] != "asked"}
        for name in ("sft_train", "sft_valid", "sft_test")
    }
    asked = {item(r) for name in seen for r in files[name] if r["group"] == "asked"}
    assert not seen["sft_test"] & seen["sft_train"]
    assert not seen["sft_test"] & seen["sft_valid"]
    assert not seen["sft_valid"] & seen["sft_train"]
    assert not asked & (seen["sft_valid"] | seen["sft_test"])  # derived facts are never asked
    assert len({i for i in seen["sft_test"] if i[0] == "facts"}) > 10


def test_held_out_skill_items_are_in_no_pretraining_text(demo, source):
    sums = set(source.items.sums)
    for record in demo[0]["pretrain_train"]:
        text = record["text"]
        if record["kind"] == "addition":
            assert tuple(map(int, re.findall(r"\d+", text)[:2])) in sums
        elif record["kind"] == "sorting":
            digits = re.search(r"\d+", text)[0]
            assert source.items.is_list[len(digits)](digits)
        elif record["kind"] == "counting":
            target, letters = re.search(r"([abcd]):((?: [abcd])+)=", text).groups()
            letters = letters.replace(" ", "")
            assert source.items.is_string[target, len(letters)](letters)


def test_test_phrasings_are_new_and_their_words_are_not(demo):
    files, _ = demo
    trained = {last_prompt(r) for r in files["sft_train"] + files["sft_valid"]}
    words = set(re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]", " ".join(sorted(trained))))
    for record in files["sft_test"]:
        assert last_prompt(record) not in trained
        missing = set(re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]", last_prompt(record))) - words
        assert not missing or record["task"] == "translation"
    for task in ("addition", "sorting", "counting", "translation"):
        assert not set(tasks.PROMPTS[task]["train"]) & set(tasks.PROMPTS[task]["test"])
    prompts = ["\n".join(m["content"] for m in r["conversations"]) for r in files["sft_test"]]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("name", ["identity", "reason", "dpo"])
def test_later_stages_hold_out_what_they_test(demo, name):
    files, _ = demo
    key = "chosen" if name == "dpo" else "conversations"
    train = [r[key][0]["content"] for r in files[f"{name}_train"]]
    test = [r[key][0]["content"] for r in files[f"{name}_test"]]
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    if name == "identity":
        assert len(train) >= 60
        assert {r["group"] for r in files["identity_train"]} == {r["group"] for r in files["identity_test"]}
    if name == "dpo":
        assert not {r["chosen"][-1]["content"] for r in files["dpo_train"]} & {
            r["chosen"][-1]["content"] for r in files["dpo_test"]
        }


def test_words_that_later_stages_say_occur_in_pretraining(demo):
    files, _ = demo
    units = re.compile(r"[A-Za-z]+|[\u4e00-\u9fff]|\d|[^\w\s]")
    known = set()
    for record in files["pretrain_train"]:
        known |= set(units.findall(record["text"]))
    said = [answer(r) for n in ("identity", "reason") for p in ("train", "test") for r in files[f"{n}_{p}"]]
    pairs = files["dpo_train"] + files["dpo_test"]
    said += [pair[key][-1]["content"] for pair in pairs for key in ("chosen", "rejected")]
    said += [answer(r) for n in ("sft_train", "sft_test") for r in files[n] if r["task"] != "multi_turn"]
    control = re.compile(r"</?(think|answer)>")
    unknown = {unit for text in said for unit in units.findall(control.sub("", text))} - known
    assert not unknown
