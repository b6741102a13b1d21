"""The demo world: files, exact probabilities, and a grammar that says every text in one way only."""

import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

import make_demo
from demo_world import grammar, items, world
from demo_world.arguments import DemoDataArguments

from minillm.errors import UserError

SMALL = {
    "n_pretrain": 12_000, "n_valid": 600, "n_addition": 3000, "n_sorting": 3000, "n_counting": 3000,
    "n_translation": 2000, "n_facts": 2000, "n_multi_turn": 2000, "n_style": 1000, "n_sft_valid": 300,
    "n_writing": 500, "n_repeat": 500,
    "n_test": 60, "n_reason": 500, "n_reason_test": 50, "n_tools": 100, "n_tools_replay": 100, "n_tools_test": 10,
}  # fmt: skip
TINY = {**dict.fromkeys(SMALL, 5), "n_pretrain": 30, "n_valid": 30}


@pytest.fixture(scope="module")
def demo():
    return make_demo.make_files(DemoDataArguments(**SMALL))


@pytest.fixture(scope="module")
def source():
    return grammar.Source(world.make_world(42), items.Items(42))


# ---- files


def test_same_seed_same_files_other_seed_other_files():
    first, meta = make_demo.make_files(DemoDataArguments(**TINY))
    again, meta_again = make_demo.make_files(DemoDataArguments(**TINY))
    other, _ = make_demo.make_files(DemoDataArguments(**TINY, seed=7))
    assert (first, meta) == (again, meta_again)
    changed = {name for name in first if first[name] != other[name]}
    assert changed == set(first) - {"identity_train", "identity_test"}  # who the model is hangs on no seed


def test_script_writes_every_file_and_nothing_else(tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    make_demo.main([*flags, f"--out_dir={tmp_path / 'a' / 'b'}"])
    stages = ("pretrain_train", "pretrain_valid", "sft_train", "sft_valid", "sft_test")
    stages += ("direct_train",)
    stages += tuple(f"{name}_{part}" for name in ("identity", "dpo", "reason", "tools") for part in ("train", "test"))
    written = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert written == {f"{name}.jsonl" for name in stages} | {"meta.json", "notes.txt"}
    assert set(re.findall(r"^  (\S+) +[\d,]+ records$", capsys.readouterr().out, re.M)) == written - {"meta.json"}
    files, meta = make_demo.make_files(DemoDataArguments(**TINY))
    assert json.loads((tmp_path / "a/b/meta.json").read_text("utf-8"))["records"] == meta["records"]
    for name in stages:
        lines = (tmp_path / f"a/b/{name}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == files[name]


@pytest.mark.parametrize("flag", ["--n_pretrain=0", "--n_test=-3", "--n_reason=99999999999"])
def test_sizes_out_of_range_are_one_line_and_code_2(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        make_demo.main([flag, f"--out_dir={tmp_path / 'x'}"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert flag.split("=")[1] in message
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    with pytest.raises(SystemExit) as caught:
        make_demo.main([*flags, f"--out_dir={tmp_path / 'file' / 'demo'}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failure_half_way_leaves_the_old_files(tmp_path):
    make_demo.write_files(tmp_path, {"a": [{"x": 1}], "b": [{"x": 1}]}, {})
    with pytest.raises(TypeError):
        make_demo.write_files(tmp_path, {"a": [{"x": 2}], "b": [{"x": object()}]}, {})
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")} == dict.fromkeys(
        ("a.jsonl", "b.jsonl"), '{"x": 1}\n'
    )
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="cannot write"):
        make_demo.write_files(tmp_path / "a.jsonl", {"a": []}, {})


# ---- probabilities


def test_scorer_finds_one_derivation_with_the_recorded_probability(demo, source):
    left = dict.fromkeys(grammar.KINDS, 6)
    for record in demo[0]["pretrain_valid"]:
        if left[record["kind"]]:
            left[record["kind"]] -= 1
            assert source.log_prob(record["text"]) == pytest.approx(record["log_prob"], abs=1e-8)
    assert not any(left.values())


def test_texts_that_the_source_cannot_say_have_no_probability(source):
    a, b = source.items.held_sums[0]
    held = next(t for t in ("".join(random.Random(i).choices("0123456789", k=5)) for i in range(999))
                if not source.items.is_list[5](t))  # fmt: skip
    wrong = ["", "12+13=26", f"{a}+{b}={a + b}", "cat=狗", "Ming lives in X.", "sort:321=321"]
    for text in [*wrong, f"sort:{held}={''.join(sorted(held))}"]:
        assert source.log_prob(text) == -math.inf


def by_hand(record, source):
    """The probability of a text from nothing but the text, counted with pencil and paper."""
    text, share = record["text"], math.log(grammar.KINDS[record["kind"]] / sum(grammar.KINDS.values()))
    english = not re.search(r"[\u4e00-\u9fff]", text)
    if record["kind"] == "addition":
        assert re.fullmatch(r"\d\d\+\d\d=\d{2,3}", text)
        n_held = 2 * len({(a, b) for a, b in source.items.held_sums if a < b})
        n_held += sum(a == b for a, b in source.items.held_sums)
        return share - math.log(90 * 90 - n_held)
    if record["kind"] == "sorting":
        digits = re.fullmatch(r"(?:sort|排序):(\d+)=\d+", text)[1]
        return share - math.log(2 * 4 * source.items.n_lists[len(digits)])
    if record["kind"] == "counting":
        target, letters = re.fullmatch(r"(?:count|数) ([abcd]):((?: [abcd])+)=\d", text).groups()
        return share - math.log(2 * 4 * 5 * source.items.n_strings[target, len(letters) // 2])
    if record["kind"] == "translation":
        n = text.count(",") + 1
        return share - math.log(2 * 3 * math.perm(len(world.DICTIONARY), n))
    if record["kind"] == "chains":
        problem = re.fullmatch(r"mod:(.+?);.*", text)[1]
        return share - math.log(10 * 3 * 23 ** (len(problem) // 2))
    if record["kind"] == "stories":
        give = bool(re.search(r"gives|给", text))
        first = int(re.search(r"\d", text)[0])
        c = first - 3 if give else 8
        return share - math.log(2 * 3 * 24 * 23 * 10 * 6 * 12 * 8 * 11 * 2 * c)
    if record["kind"] == "facts":
        n_sentences = text.count(".") + text.count("。")
        counts = {"person": (24, 5), "place": (10, 2), "animal": (10, 2), "thing": (12, 2)}
        named = [en if english else zh for words in world.ENTITIES.values() for en, zh in words]
        first = next(w for w in named if re.search(rf"\b{w}\b" if english else w, text))
        category = next(c for c, words in world.ENTITIES.items() if first in sum(words, ()))
        # a person is named beside the places or animals of its facts, so the first category that fits counts
        n_entities, n_relations = counts[category]
        total = sum(n * r for n, r in counts.values())
        p = share - math.log(2) + math.log(n_entities * n_relations / total) - math.log(n_entities)
        return p - math.log(min(3, n_relations) * math.perm(n_relations, n_sentences) * 2**n_sentences)
    return None


def test_log_prob_counted_by_hand(demo, source):
    checked = Counter()
    for record in demo[0]["pretrain_valid"]:
        expected = by_hand(record, source)
        if expected is not None:
            assert record["log_prob"] == pytest.approx(expected, abs=1e-8), record["text"]
            checked[record["kind"]] += 1
    assert set(checked) == set(grammar.KINDS) - {"talk"}


def test_number_of_allowed_items_is_exact(source):
    for n in (3, 4):
        assert source.items.n_lists[n] == sum(source.items.is_list[n](f"{i:0{n}d}") for i in range(10**n))
    strings = [a + b + c + d for a in "abcd" for b in "abcd" for c in "abcd" for d in "abcd"]
    for target in "abcd":
        n_allowed = sum(map(source.items.is_string[target, 4], strings))
        assert source.items.n_strings[target, 4] == n_allowed
        assert 0.8 < n_allowed / 256 < 0.98


class Enumerate:
    """Runs a program through all its choices, one run per series, with exact products of probabilities."""

    def __init__(self, choices, agenda):
        self.choices, self.agenda, self.depth = choices, agenda, 0
        self.text, self.p = "", 1.0

    def pick(self, options):
        return self.weighted(options, [(i + 1) / len(options) for i in range(len(options))])

    def weighted(self, options, cumulative):
        if self.depth == len(self.choices):
            self.agenda.extend((*self.choices, i) for i in range(1, len(options)))
            self.choices = (*self.choices, 0)
        index = self.choices[self.depth]
        self.depth += 1
        self.p *= cumulative[index] - (cumulative[index - 1] if index else 0.0)
        return options[index]

    def say(self, text):
        self.text += text

    def say_string(self, alphabet, length, separator, allowed, n_allowed):
        every = [""]
        for _ in range(length):
            every = [e + c for e in every for c in alphabet]
        text = self.pick([e for e in every if allowed(e)])
        self.say("".join(separator + c for c in text))
        return text


def test_the_whole_of_a_tiny_source_sums_to_one_without_ambiguity(source, monkeypatch):
    for name, n in (("PEOPLE", 2), ("PLACES", 2), ("THINGS", 2), ("DICTIONARY", 6)):
        monkeypatch.setattr(grammar, name, getattr(world, name)[:n])
    monkeypatch.setattr(grammar, "ENTITIES", {c: words[:2] for c, words in world.ENTITIES.items()})
    monkeypatch.setattr(items, "SORT_LENGTHS", (3,))
    monkeypatch.setattr(items, "COUNT_LENGTHS", (3,))
    monkeypatch.setattr(items, "STEPS", [("+", 4), ("-", 9), ("*", 7)])
    small = grammar.Source(source.world, source.items)
    agenda, seen = [()], {}
    while agenda:
        run = Enumerate(agenda.pop(), agenda)
        small.document(run)
        assert run.text not in seen, f"two ways to say {run.text!r}"
        seen[run.text] = run.p
    assert len(seen) > 10_000
    assert math.fsum(seen.values()) == pytest.approx(1, abs=1e-9)
    # the sampler draws from this very distribution: its log-probabilities are right, their mean the entropy
    draw, n = grammar.Draw(random.Random(0)), 5_000
    records = [small.sample(draw) for _ in range(n)]
    assert all(r["log_prob"] == pytest.approx(math.log(seen[r["text"]]), abs=1e-7) for r in records)
    entropy = -math.fsum(p * math.log(p) for p in seen.values())
    spread = math.sqrt(math.fsum(p * (math.log(p) + entropy) ** 2 for p in seen.values()) / n)
    assert abs(-sum(r["log_prob"] for r in records) / n - entropy) < 4 * spread


def test_meta_holds_the_floor_of_the_validation_file(demo):
    files, meta = demo
    records = files["pretrain_valid"]
    whole = meta["floor"]["all"]
    assert whole["nats"] == pytest.approx(-sum(r["log_prob"] for r in records))
    n_bytes = sum(len(r["text"].encode()) for r in records)
    assert whole["nats_per_byte"] == pytest.approx(whole["nats"] / n_bytes, abs=1e-6)
    assert set(meta["floor"]) == {"all", *grammar.KINDS}
    assert sum(meta["floor"][kind]["nats"] for kind in grammar.KINDS) == pytest.approx(whole["nats"])


def test_a_trigram_model_stays_half_a_nat_per_token_above_the_floor(source):
    tokenizer = pytest.importorskip("minillm.tokenizer")
    draw = grammar.Draw(random.Random(5))
    train = [source.sample(draw)["text"] for _ in range(20_000)]
    valid = [source.sample(draw) for _ in range(1_500)]
    bpe = tokenizer.train_bpe(iter(train), vocab_size=1024)

    def encode(text):
        return [-1, -1, *bpe.encode(text), bpe.eos_token_id]

    counts = [defaultdict(Counter) for _ in range(3)]
    for ids in map(encode, train):
        for t in range(2, len(ids)):
            for order in range(3):
                counts[order][tuple(ids[t - order : t])][ids[t]] += 1
    sizes = [{h: (c.total(), len(c)) for h, c in table.items()} for table in counts]

    def probability(history, token):  # Witten-Bell: every order backs off by the number of kinds it has seen
        p = 1 / bpe.vocab_size
        for order in range(3):
            h = history[2 - order :]
            if h in counts[order]:
                n, n_kinds = sizes[order][h]
                p = (counts[order][h][token] + n_kinds * p) / (n + n_kinds)
        return p

    n_tokens, gap = 0, 0.0
    for record in valid:
        ids = encode(record["text"])
        n_tokens += len(ids) - 2
        gap += record["log_prob"]
        gap -= sum(math.log(probability(tuple(ids[t - 2 : t]), ids[t])) for t in range(2, len(ids)))
    assert gap / n_tokens >= 0.5  # 0.9 nats were measured
    assert max(len(encode(text)) for text in train) <= 127  # a whole document fits a row of the demo
