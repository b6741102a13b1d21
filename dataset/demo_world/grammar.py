"""The probabilistic grammar of the pretraining text.

Each kind of text is a *program*, which draws choices and says pieces of text, in the order of the text. With a
``Draw`` it samples a document and multiplies the numbers of equally likely choices, which gives the exact
log-probability of the record. ``derivations`` searches the same program for all sequences of choices that say a given
text. A text of the source has exactly one (the grammar is unambiguous), so the probability of the choices *is* the
probability of the text.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from itertools import accumulate

from demo_world import items as it
from demo_world.world import (
    DICTIONARY,
    ENTITIES,
    LANGUAGES,
    MACHINES,
    PEOPLE,
    PLACES,
    RELATIONS_OF,
    THINGS,
    World,
)

#: Share of documents per kind (not of tokens: stories are long, sums are short).
KINDS = {
    "facts": 0.14,
    "stories": 0.07,
    "addition": 0.36,
    "sorting": 0.09,
    "counting": 0.15,
    "translation": 0.10,
    "talk": 0.045,
    "chains": 0.045,
}


class Draw:
    """Samples one document: its ``pieces`` of text, and ``weight``, one over its probability."""

    __slots__ = ("pieces", "random", "rng", "weight")

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.random = rng.random
        self.restart()

    def restart(self) -> None:
        self.pieces: list[str] = []
        self.weight = 1.0

    def pick(self, options):
        """Return one of the options, all equally likely."""
        n = len(options)
        self.weight *= n
        return options[int(self.random() * n)]

    def weighted(self, options, cumulative):
        """Return one of the options, with the given cumulative probabilities; the last one is 1."""
        index = min(bisect_right(cumulative, self.random()), len(options) - 1)
        self.weight /= cumulative[index] - (cumulative[index - 1] if index else 0.0)
        return options[index]

    def say(self, text: str) -> None:
        self.pieces.append(text)

    def say_string(self, alphabet: str, length: int, separator: str, allowed, n_allowed: int) -> str:
        """Say and return a string, drawn uniformly from the ``n_allowed`` strings that ``allowed`` accepts."""
        n, rnd = len(alphabet), self.random
        while True:
            text = "".join([alphabet[int(rnd() * n)] for _ in range(length)])
            if allowed(text):
                break
        self.weight *= n_allowed
        self.pieces.append(separator + separator.join(text) if separator else text)
        return text


class _DeadEnd(Exception):
    """The choices so far do not say the text."""


class _Replay:
    """Runs a program with given choices; at the first open choice, it adds the alternatives to the agenda."""

    def __init__(self, text: str, choices: tuple[int, ...], agenda: list[tuple[int, ...]]):
        self.text, self.choices, self.agenda = text, choices, agenda
        self.depth = self.position = 0
        self.log_prob = 0.0

    def _choose(self, n: int) -> int:
        if self.depth == len(self.choices):
            self.agenda.extend((*self.choices, i) for i in range(1, n))
            self.choices = (*self.choices, 0)
        index = self.choices[self.depth]
        self.depth += 1
        return index

    def pick(self, options):
        index = self._choose(len(options))
        self.log_prob -= math.log(len(options))
        return options[index]

    def weighted(self, options, cumulative):
        index = self._choose(len(options))
        self.log_prob += math.log(cumulative[index] - (cumulative[index - 1] if index else 0.0))
        return options[index]

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.position):
            raise _DeadEnd
        self.position += len(text)

    def say_string(self, alphabet, length, separator, allowed, n_allowed) -> str:
        width = len(separator) + 1
        said = self.text[self.position : self.position + length * width]
        text = said[len(separator) :: width]
        if len(text) != length or any(c not in alphabet for c in text) or not allowed(text):
            raise _DeadEnd
        self.say("".join(separator + c for c in text))
        self.log_prob -= math.log(n_allowed)
        return text


def derivations(program, text: str) -> list[float]:
    """Return the log-probability of every sequence of choices with which ``program`` says exactly ``text``."""
    agenda: list[tuple[int, ...]] = [()]
    log_probs = []
    while agenda:
        replay = _Replay(text, agenda.pop(), agenda)
        try:
            program(replay)
        except _DeadEnd:
            continue
        if replay.position == len(text):
            log_probs.append(replay.log_prob)
    return log_probs


class Source:
    """The source of the pretraining text of one world: a mixture of kinds, each in English and Chinese."""

    def __init__(self, world: World, items: it.Items, kinds: dict[str, float] | None = None):
        self.world, self.items = world, items
        self.kinds = dict(KINDS if kinds is None else kinds)
        total = sum(self.kinds.values())
        self._names = list(self.kinds)
        self._cumulative = list(accumulate(p / total for p in self.kinds.values()))
        self._cumulative[-1] = 1.0
        n_facts = [len(ENTITIES[c]) * len(RELATIONS_OF[c]) for c in ENTITIES]
        self._categories = list(ENTITIES)
        self._category_cumulative = list(accumulate(n / sum(n_facts) for n in n_facts))
        self._category_cumulative[-1] = 1.0

    def sample(self, draw: Draw) -> dict:
        """Return one record: ``text``, ``log_prob`` (nats, end of document included), ``kind``."""
        draw.restart()
        kind = self.document(draw)
        return {"text": "".join(draw.pieces), "log_prob": round(-math.log(draw.weight), 9), "kind": kind}

    def document(self, draw) -> str:
        """Run the whole program: a kind, then a text of that kind. Return the kind."""
        kind = draw.weighted(self._names, self._cumulative)
        getattr(self, kind)(draw)
        return kind

    def log_prob(self, text: str) -> float:
        """Return ln p(text); -inf if the source cannot say it. Raise ValueError if it has several derivations."""
        log_probs = derivations(self.document, text)
        if len(log_probs) > 1:
            raise ValueError(f"{len(log_probs)} derivations of {text!r}: the grammar is ambiguous")
        return log_probs[0] if log_probs else -math.inf

    # ---- one method per kind; where possible, each choice is said before the next one is drawn

    def facts(self, draw) -> None:
        language = draw.pick(LANGUAGES)
        category = draw.weighted(self._categories, self._category_cumulative)
        index = draw.pick(range(len(ENTITIES[category])))
        relations = RELATIONS_OF[category]
        left = [r.name for r in relations]
        n_sentences = draw.pick(range(1, min(3, len(relations)) + 1))
        for position in range(n_sentences):
            name = draw.pick(left)
            left.remove(name)
            if position and language == "en":
                draw.say(" ")
            draw.say(draw.pick(self.world.statements[(category, index, name), language]))

    def stories(self, draw) -> None:
        """Two friends go shopping: names, things and amounts return, and results follow from them."""
        if draw.pick(LANGUAGES) == "en":
            side, plural = 0, "s"
            draw.say(draw.pick(("One day ", "In the morning ", "In the evening ")))
            say = _EN_STORY
        else:
            side, plural = 1, ""
            draw.say(draw.pick(("一天", "早上", "晚上")))
            say = _ZH_STORY
        first = draw.pick(PEOPLE)
        draw.say(first[side])
        second = draw.pick([p for p in PEOPLE if p is not first])
        draw.say(say["with"] + second[side] + say["go"])
        place = draw.pick(PLACES)[side]
        draw.say(place + say["stop"])
        p, q = first[side], second[side]

        a = draw.pick(range(4, 10))
        draw.say(say["buys"].format(p=p, n=a))
        thing = draw.pick(THINGS)
        x = thing[side] + plural
        draw.say(x + say["stop"])
        b = draw.pick(range(2, 10))
        draw.say(say["buys"].format(p=q, n=b))
        y = draw.pick([t for t in THINGS if t is not thing])[side] + plural
        draw.say(y + say["stop"])

        if draw.pick(("give", "more")) == "give":
            c = draw.pick(range(2, a - 1))
            draw.say(say["gives"].format(p=p, q=q, n=c, x=x))
            draw.say(say["both"].format(p=p, n=a - c, x=x, q=q, c=c, b=b, y=y))
        else:
            c = draw.pick(range(2, 10))
            draw.say(say["more"].format(p=p, n=c, x=x))
            draw.say(say["now"].format(p=p, n=a + c, x=x, q=q, b=b, y=y))
        draw.say(say["end"].format(p=p, q=q, place=place))

    def addition(self, draw) -> None:
        a, b = draw.pick(self.items.sums)
        draw.say(f"{a}+{b}={a + b}")

    def sorting(self, draw) -> None:
        draw.say(draw.pick(("sort:", "排序:")))
        n = draw.pick(it.SORT_LENGTHS)
        digits = draw.say_string("0123456789", n, "", self.items.is_list[n], self.items.n_lists[n])
        draw.say("=" + it.sort_answer(digits))

    def counting(self, draw) -> None:
        draw.say(draw.pick(("count ", "数 ")))
        target = draw.pick(it.LETTERS)
        draw.say(target + ":")
        n = draw.pick(it.COUNT_LENGTHS)
        key = (target, n)
        letters = draw.say_string(it.LETTERS, n, " ", self.items.is_string[key], self.items.n_strings[key])
        draw.say(f"={letters.count(target)}")

    def translation(self, draw) -> None:
        side = LANGUAGES.index(draw.pick(LANGUAGES))
        n_words = draw.pick((1, 2, 3))
        left = list(range(len(DICTIONARY)))
        for position in range(n_words):
            index = draw.pick(left)
            left.remove(index)
            word = DICTIONARY[index]
            draw.say(f"{',' if position else ''}{word[side]}={word[1 - side]}")

    def talk(self, draw) -> None:
        """A person asks, and a person or a machine answers: the words that the model has to say in later stages."""
        side = LANGUAGES.index(draw.pick(LANGUAGES))
        say = _TALK[LANGUAGES[side]]
        asker = draw.pick(PEOPLE)
        draw.say(asker[side] + say["asks"])
        if draw.pick(("person", "machine")) == "person":
            other = draw.pick([p for p in PEOPLE if p is not asker])[side]
            topics = say["person"]
        else:
            other = draw.pick(MACHINES)
            topics = say["machine"]
        draw.say(other + say["colon"])
        questions, answer = draw.pick(topics)
        draw.say(draw.pick(questions))
        draw.say(say["says"].format(q=other))
        if answer == "skills":
            skills = list(say["skills"])
            for opening in (say["can"], say["comma"], say["and"]):
                skill = draw.pick(skills)
                skills.remove(skill)
                draw.say(opening + skill)
            draw.say(say["stop"])
        else:
            draw.say(answer.format(p=asker[side], q=other))

    def chains(self, draw) -> None:
        draw.say("mod:")
        start = draw.pick(range(10))
        draw.say(str(start))
        steps = []
        for _ in range(draw.pick((2, 3, 4))):
            steps.append(draw.pick(it.STEPS))
            draw.say("{}{}".format(*steps[-1]))
        draw.say(";" + it.chain_texts(start, steps)[1])


_EN_STORY = {
    "with": " and ",
    "go": " go to ",
    "stop": ".",
    "buys": " {p} buys {n} ",
    "gives": " {p} gives {q} {n} {x}.",
    "both": " Now {p} has {n} {x}, and {q} has {c} {x} and {b} {y}.",
    "more": " Then {p} buys {n} more {x}.",
    "now": " Now {p} has {n} {x}, and {q} has {b} {y}.",
    "end": " {q} and {p} leave {place}.",
}
_ZH_STORY = {
    "with": "和",
    "go": "去",
    "stop": "。",
    "buys": "{p}买了{n}个",
    "gives": "{p}给{q}{n}个{x}。",
    "both": "现在{p}有{n}个{x},{q}有{c}个{x}和{b}个{y}。",
    "more": "然后{p}又买了{n}个{x}。",
    "now": "现在{p}有{n}个{x},{q}有{b}个{y}。",
    "end": "{q}和{p}离开{place}。",
}
_TALK = {
    "en": {
        "asks": " asks ",
        "colon": ": ",
        "says": " {q} says: ",
        "can": "I can ",
        "comma": ", ",
        "and": " and ",
        "stop": ".",
        "skills": ("add", "sort", "count", "translate"),
        "person": [
            (("Who are you?", "What is your name?"), "Hello {p}, I am {q}."),
            (("Who am I?", "What is my name?"), "Your name is {p}."),
            (("Are you a machine?", "Are you a human?"), "I am a human, {p}."),
        ],
        "machine": [
            (("Who are you?", "What is your name?"), "I am {q}, a small language model."),
            (("Who made you?", "Where do you come from?"), "I was made by the {q} project."),
            (("What can you do?", "How can you help?"), "skills"),
            (("Are you a machine?", "Are you a human?"), "No, {p}, I am not a human, I am a machine."),
            (("Who am I?", "What is my name?"), "You are {p}."),
        ],
    },
    "zh": {
        "asks": "问",
        "colon": ":",
        "says": "{q}说:",
        "can": "我会",
        "comma": "、",
        "and": "和",
        "stop": "。",
        "skills": ("加法", "排序", "数数", "翻译"),
        "person": [
            (("你是谁?", "你叫什么名字?"), "你好{p},我是{q}。"),
            (("我是谁?", "我叫什么名字?"), "你的名字是{p}。"),
            (("你是机器吗?", "你是人吗?"), "我是人,{p}。"),
        ],
        "machine": [
            (("你是谁?", "你叫什么名字?"), "我是{q},一个小语言模型。"),
            (("谁做了你?", "你从哪里来?"), "我由{q}项目制作。"),
            (("你会做什么?", "你能帮什么忙?"), "skills"),
            (("你是机器吗?", "你是人吗?"), "不,{p},我不是人,我是机器。"),
            (("我是谁?", "我叫什么名字?"), "你是{p}。"),
        ],
    },
}
