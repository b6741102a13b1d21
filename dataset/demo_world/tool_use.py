"""Conversations with tools: questions that need a call, questions that need none, and some that no tool can answer.

What a tool returns is drawn at random, so a model cannot learn it; it has to call, and to copy. Each record declares
some of the tools. If the one that a question needs is missing, the answer is a refusal.
"""

from __future__ import annotations

import json
import random

import demo_tools

from demo_world.tasks import Tasks, conversation
from demo_world.world import ANIMALS, FOODS, JOBS, LANGUAGES, PEOPLE, PLACES, THINGS

SCHEMAS = {function.__name__: function.schema for function in demo_tools.TOOLS}
KINDS = {"calculate": 0.35, "search": 0.35, "clock": 0.15, "direct": 0.15}
DIRECT_TASKS = ("addition", "sorting", "facts", "translation")
#: What has a number in the notes.
OWNERS = PEOPLE + ANIMALS + THINGS + JOBS + FOODS
REFUSALS = {"en": "I can not do this.", "zh": "我不会。"}
#: Beginnings of questions, for each tool and language; those of "test" occur nowhere else.
OPENINGS = {
    "calculate": {
        "en": {"train": ("", "calculate:"), "test": ("Please calculate:",)},
        "zh": {"train": ("", "算:"), "test": ("请算:",)},
    },
    "clock": {
        "en": {"train": ("time:", "Now time:"), "test": ("Please time:",)},
        "zh": {"train": ("几点:", "现在几点:"), "test": ("请问几点:",)},
    },
    "search": {
        "en": {"train": ("number:", "Now number:"), "test": ("Please number:",)},
        "zh": {"train": ("号:", "现在号:"), "test": ("请问号:",)},
    },
}
OPERATORS = ("*", "-")
#: Share of records by their number of tools.
N_TOOLS = {1: 0.4, 2: 0.4, 3: 0.2}
N_QUESTIONS = 4
HELD_OUT_ONE_IN = 10


class ToolTasks:
    """Records with tools of one world. Test records have other numbers, owners and openings."""

    def __init__(self, tasks: Tasks):
        rng = random.Random(f"tools {tasks.world.seed}")
        self.tasks = tasks
        shuffled = rng.sample(OWNERS, len(OWNERS))
        n_test = len(OWNERS) // 5
        self.owners = {"test": shuffled[:n_test], "train": shuffled[n_test:]}
        self.salt = rng.randrange(1, 1000)

    def record(self, split: str, rng: random.Random, kinds: list[str] | None = None) -> dict:
        """Return a record of several questions (test: of one), of the given kinds or of drawn ones."""
        n_tools = rng.choices(list(N_TOOLS), list(N_TOOLS.values()))[0]
        names = rng.sample(list(SCHEMAS), n_tools)
        turns, group = [], ""
        for kind in kinds or rng.choices(list(KINDS), list(KINDS.values()), k=N_QUESTIONS):
            messages, group = self.exchange(kind, names, split, rng)
            turns += messages
        tools = [SCHEMAS[name] for name in names]
        return {"conversations": turns, "tools": tools, "task": "tools", "group": group}

    def exchange(self, kind: str, names: list[str], split: str, rng: random.Random) -> tuple[list[dict], str]:
        """Return (messages, group): a question, the call and its result if there is one, and the answer."""
        language = rng.choice(LANGUAGES)
        if kind == "direct":
            return self.tasks.record(rng.choice(DIRECT_TASKS), split, rng)["conversations"], "direct"
        arguments, result, answer = getattr(self, f"_{kind}")(language, split, rng)
        (text,) = arguments.values()
        question = rng.choice(OPENINGS[kind][language][split]) + text
        if kind not in names:
            return conversation(question, REFUSALS[language]), "refusal"
        call = {"type": "function", "function": {"name": kind, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": kind, "content": result},
            {"role": "assistant", "content": answer},
        ], kind

    def _calculate(self, language: str, split: str, rng: random.Random) -> tuple[dict, str, str]:
        while True:
            b, a = sorted((rng.randrange(10, 100), rng.randrange(10, 100)))
            if ((a * 100 + b) * self.salt % 997 % HELD_OUT_ONE_IN == 0) == (split == "test"):
                break
        expression = f"{a}{rng.choice(OPERATORS)}{b}"
        result = demo_tools.calculate(expression)
        return {"expression": expression}, result, f"{expression}={result}"

    def _clock(self, language: str, split: str, rng: random.Random) -> tuple[dict, str, str]:
        place = rng.choice(PLACES)[LANGUAGES.index(language)]
        time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        return {"place": place}, time, f"{place}={time}"

    def _search(self, language: str, split: str, rng: random.Random) -> tuple[dict, str, str]:
        owner = rng.choice(self.owners[split])[LANGUAGES.index(language)]
        line = f"{owner}={rng.randrange(100, 1000)}"
        return {"query": owner}, line, line

    def test_records(self, n_per_group: int, rng: random.Random) -> list[dict]:
        """Return up to ``n_per_group`` different records of each group."""
        by_group: dict[str, dict[str, dict]] = {}
        for _ in range(60 * n_per_group):
            record = self.record("test", rng, [rng.choice(list(KINDS))])
            group = by_group.setdefault(record["group"], {})
            if len(group) < n_per_group:
                key = json.dumps([record["conversations"][0], record["tools"]], ensure_ascii=False)
                group.setdefault(key, record)
        return [record for _, group in sorted(by_group.items()) for record in group.values()]


def notes(rng: random.Random) -> list[str]:
    """Return the lines of the text in which the demo's model searches: a number of every owner, in both languages."""
    numbers = {owner: rng.randrange(100, 1000) for owner in OWNERS}
    return [f"{word}={number}" for owner, number in numbers.items() for word in owner]
