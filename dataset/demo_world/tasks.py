"""Conversations with checkable answers: supervised tasks, preference pairs and reasoning problems.

Prompt and answer keep the surface form of the pretraining text (``23+45=68``, ``bird=鸟``, ``Ming lives in Paris.``),
so fine-tuning only has to turn knowledge into answers; with only the sum as the answer, addition needed twice the
examples. There are three splits: ``train``; ``valid`` (held-out items, or other phrasings if all items are needed in
training); ``test`` (held-out items *and* phrasings, both disjoint from the other two).
"""

from __future__ import annotations

import random

from demo_world import items as it
from demo_world.grammar import Draw, Source
from demo_world.world import (
    DICTIONARY,
    ENTITIES,
    LANGUAGES,
    PEOPLE,
    RELATIONS,
    THINGS,
    Fact,
    World,
)

SPLITS = ("train", "valid", "test")
TASKS = ("addition", "sorting", "counting", "translation", "facts", "multi_turn", "style", "writing", "repeat")

#: Tasks without test and validation records: they have no single right answer, or nothing is held out.
OPEN_TASKS = ("style", "writing", "repeat")

#: Shares of the kinds that the writing task writes. They keep knowledge that no other task asks for.
WRITING_KINDS = {"facts": 0.5, "translation": 0.4, "stories": 0.1}
WRITING_ASKS = ("Write a line.", "写一句。")
REPEAT_ASKS = ("Repeat:", "重复:")

#: Beginnings of prompts. Those of "test" occur nowhere else, but each of their words does.
PROMPTS = {
    "addition": {"train": ("", "add:", "算:", "Please add:", "请算:"), "test": ("Now add:", "现在算:")},
    "sorting": {"train": ("sort:", "排序:", "Now sort:", "现在排序:"), "test": ("Please sort:", "请排序:")},
    "counting": {
        "train": ("count {}:", "数 {}:", "Please count {}:", "请数 {}:"),
        "test": ("Now count {}:", "现在数 {}:"),
    },
    "translation": {
        "train": ("", "translate:", "翻译:", "Now translate:", "现在翻译:"),
        "test": ("Please translate:", "请翻译:"),
    },
}
#: Beginnings of questions, and which of the two questions of a relation follows.
ASKS = {
    "en": {
        "train": (("", 0), ("", 1), ("Please answer: ", 0)),
        "valid": (("Now answer: ", 1),),
        "test": (("Please answer: ", 1), ("Now answer: ", 0)),
    },
    "zh": {
        "train": (("", 0), ("", 1), ("请回答:", 0)),
        "valid": (("现在回答:", 1),),
        "test": (("请回答:", 1), ("现在回答:", 0)),
    },
}
#: Questions about animals, places and things: SFT answers them in both styles, DPO teaches one.
STYLE_ASKS = {"en": (("", 0), ("", 1), ("Now answer: ", 0)), "zh": (("", 0), ("", 1), ("现在回答:", 0))}


def conversation(*turns: str) -> list[dict]:
    """Return messages from alternating user and assistant texts."""
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(turns)]


def _split_in_three(population: list, rng: random.Random, held_share: float, valid_share: float) -> dict[str, list]:
    """Split a list in ``train`` and the held-out share, of which ``valid`` gets a part and ``test`` the rest."""
    shuffled = rng.sample(population, len(population))
    n_held = max(2, round(len(shuffled) * held_share))
    n_valid = max(1, round(n_held * valid_share))
    return {"valid": shuffled[:n_valid], "test": shuffled[n_valid:n_held], "train": shuffled[n_held:]}


class Tasks:
    """All tasks of one world. ``record(task, split, rng)`` draws a record; the splits share no item.

    ``facts`` has the facts about people that each split asks: those of ``valid`` and ``test`` are never asked in
    training, but the pretraining text states them.
    """

    def __init__(self, world: World, items: it.Items):
        rng = random.Random(f"tasks {world.seed}")
        self.world, self.items = world, items
        self.source = Source(world, items, WRITING_KINDS)
        unordered = [p for p in items.held_sums if p[0] <= p[1]]
        valid = set(rng.sample(unordered, len(unordered) // 4))
        self.sums = {
            "train": items.sums,
            "valid": [p for p in items.held_sums if (min(p), max(p)) in valid],
            "test": [p for p in items.held_sums if (min(p), max(p)) not in valid],
        }
        self.words = _split_in_three(list(range(len(DICTIONARY))), rng, 0.25, 0.25)
        people = [("person", i, r.name) for r in RELATIONS if r.category == "person" for i in range(len(PEOPLE))]
        self.facts = _split_in_three(people, rng, 0.2, 0.2)
        self.style_facts: list[Fact] = [
            (r.category, i, r.name)
            for r in RELATIONS
            if r.category != "person"
            for i in range(len(ENTITIES[r.category]))
        ]
        self.pair_facts = _split_in_three(self.style_facts, rng, 0.25, 0.0)
        self.greetings = _split_in_three(
            [(p, w) for p in range(len(PEOPLE)) for w in self.words["train"]], rng, 0.1, 0.3
        )
        self.shopping = _split_in_three(
            [(a, b, t) for a in range(2, 10) for b in range(2, 10) for t in range(len(THINGS))], rng, 0.1, 0.3
        )

    # ---- supervised tasks

    def record(self, task: str, split: str, rng: random.Random) -> dict:
        """Return one record ``{"conversations", "task", "group"}``; the last turn is the answer."""
        messages, group = getattr(self, f"_{task}")(split, rng)
        return {"conversations": messages, "task": task, "group": group}

    @staticmethod
    def _prompt(task: str, split: str, rng: random.Random) -> str:
        return rng.choice(PROMPTS[task]["test" if split == "test" else "train"])

    def _addition(self, split, rng):
        a, b = rng.choice(self.sums[split])
        return conversation(f"{self._prompt('addition', split, rng)}{a}+{b}", f"{a}+{b}={a + b}"), _skill(split)

    def _sorting(self, split, rng):
        while True:
            n = rng.choice(it.SORT_LENGTHS)
            digits = "".join(rng.choices("0123456789", k=n))
            if self._in_split(self.items.is_list[n](digits), sum(map(int, digits)), split):
                break
        prompt = f"{self._prompt('sorting', split, rng)}{digits}"
        return conversation(prompt, f"{digits}={it.sort_answer(digits)}"), _skill(split)

    def _counting(self, split, rng):
        while True:
            target, n = rng.choice(it.LETTERS), rng.choice(it.COUNT_LENGTHS)
            letters = "".join(rng.choices(it.LETTERS, k=n))
            code = sum(map(ord, letters[::2])) + ord(target)
            if self._in_split(self.items.is_string[target, n](letters), code, split):
                break
        prompt = f"{self._prompt('counting', split, rng).format(target)}{it.count_prompt(letters)}="
        return conversation(prompt, str(letters.count(target))), _skill(split)

    @staticmethod
    def _in_split(allowed: bool, code: int, split: str) -> bool:
        """Return whether an item is in ``split``. Held-out items with a code divisible by 3 are "valid"."""
        return split == ("train" if allowed else "test" if code % 3 else "valid")

    def _translation(self, split, rng):
        word, side = DICTIONARY[rng.choice(self.words[split])], rng.randrange(2)
        prompt = f"{self._prompt('translation', split, rng)}{word[side]}"
        return conversation(prompt, f"{word[side]}={word[1 - side]}"), _skill(split)

    def _facts(self, split, rng):
        derived = split != "train" and rng.random() < 0.5
        return self.fact_question(
            rng.choice(self.facts[split if derived else "train"]), rng.choice(LANGUAGES), split, rng, derived
        )

    def fact_question(self, fact: Fact, language: str, split: str, rng: random.Random, derived: bool):
        """Return (messages, group) that ask for a fact about a person in one of the split's phrasings."""
        opening, variant = rng.choice(ASKS[language][split])
        question = opening + self.world.question(fact, language, variant)
        group = "derived" if derived else "asked"
        return conversation(question, self.world.statement(fact, language)), group

    def _multi_turn(self, split, rng):
        language = rng.choice(LANGUAGES)
        side, test = LANGUAGES.index(language), split == "test"
        if rng.random() < 0.5:
            person, index = rng.choice(self.greetings[split])
            name, word = PEOPLE[person][side], DICTIONARY[index]
            if language == "en":
                opening = "Please answer: " if test else rng.choice(("", "Now answer: "))
                texts = (f"I am {name}.", f"Hello {name}.", f"{opening}Who am I?", f"You are {name}.")
            else:
                opening = "请回答:" if test else rng.choice(("", "现在回答:"))
                texts = (f"我是{name}。", f"你好{name}。", f"{opening}我是谁?", f"你是{name}。")
            middle = (word[1 - side], f"{word[1 - side]}={word[side]}")
            return conversation(*texts[:2], *middle, *texts[2:]), "name"
        a, b, index = rng.choice(self.shopping[split])
        thing = THINGS[index][side]
        if language == "en":
            opening = "Now I buy" if test else rng.choice(("I buy", "Then I buy"))
            texts = (f"I buy {a} {thing}s.", f"You have {a} {thing}s.", f"{opening} {b} more {thing}s.")
            return conversation(*texts, f"You have {a + b} {thing}s."), "amount"
        opening = "现在我又" if test else rng.choice(("我又", "然后我又"))
        texts = (f"我买了{a}个{thing}。", f"你有{a}个{thing}。", f"{opening}买了{b}个{thing}。")
        return conversation(*texts, f"你有{a + b}个{thing}。"), "amount"

    def _style(self, split, rng):
        fact, language = rng.choice(self.style_facts), rng.choice(LANGUAGES)
        opening, variant = rng.choice(STYLE_ASKS[language])
        full, terse = self._answers(fact, language)
        answer = rng.choice((full, terse))
        return conversation(opening + self.world.question(fact, language, variant), answer), "style"

    def _writing(self, split, rng):
        """A new document of the source. Without this task, fine-tuning erases words and facts that it does not ask."""
        return conversation(rng.choice(WRITING_ASKS), self.source.sample(Draw(rng))["text"]), "writing"

    def _repeat(self, split, rng):
        """One to three words or numbers to copy. Without it, the model can copy only words that other tasks ask."""
        words = [rng.choice(rng.choice(DICTIONARY)) for _ in range(rng.randint(1, 2))]
        words += [str(rng.randrange(10, 100)) for _ in range(rng.randint(0, 1))]
        text = ",".join(words)
        return conversation(rng.choice(REPEAT_ASKS) + text, text), "repeat"

    def _answers(self, fact: Fact, language: str) -> tuple[str, str]:
        return self.world.statement(fact, language), self.world.values[fact][LANGUAGES.index(language)]

    # ---- whole files

    def test_records(self, n_per_group: int, rng: random.Random) -> list[dict]:
        """Return the held-out test: up to ``n_per_group`` different records of each task and group."""
        wanted = [(t, None) for t in TASKS[:4]]
        wanted += [("facts", "asked"), ("facts", "derived"), ("multi_turn", "name"), ("multi_turn", "amount")]
        records = []
        for task, group in wanted:
            seen: dict[str, dict] = {}
            for _ in range(60 * n_per_group):  # small groups have fewer different records
                record = self.record(task, "test", rng)
                if group is None or record["group"] == group:
                    key = "\n".join(m["content"] for m in record["conversations"])
                    seen.setdefault(key, record)
                    if len(seen) == n_per_group:
                        break
            records += seen.values()
        return records

    def pairs(self, split: str) -> list[dict]:
        """Return every preference pair of ``train`` or ``test``: a full sentence is better than a short answer."""
        facts = self.pair_facts["train"] if split == "train" else self.pair_facts["test"] + self.pair_facts["valid"]
        records = []
        for fact in facts:
            for language in LANGUAGES:
                full, terse = self._answers(fact, language)
                for opening, variant in STYLE_ASKS[language]:
                    question = opening + self.world.question(fact, language, variant)
                    records.append({"chosen": conversation(question, full), "rejected": conversation(question, terse)})
        return records


def _skill(split: str) -> str:
    return "train" if split == "train" else "held_out"


def reason_records(n_train: int, n_test: int, rng: random.Random, n_steps: int = 5) -> tuple[list[dict], list[dict]]:
    """Return (train, test) problems of five operations modulo 10, all different, with steps and ``final``."""
    seen: set[str] = set()
    records = []
    while len(records) < n_train + n_test:
        problem, worked, final = it.chain_texts(rng.randrange(10), rng.choices(it.STEPS, k=n_steps))
        if problem in seen:
            continue
        seen.add(problem)
        answer = f"<think>\n{worked}\n</think>\n<answer>\n{final}\n</answer>"
        records.append({"conversations": conversation(f"mod:{problem}", answer), "task": "reason", "final": final})
    return records[n_test:], records[:n_test]


def without_reasons(records: list[dict]) -> list[dict]:
    """Return the same problems with only the answer, to train a model that answers without thinking."""
    return [
        record | {"conversations": conversation(record["conversations"][0]["content"], record["final"])}
        for record in records
    ]
