"""The small world: its words in English and Chinese, and the facts about them, which are drawn from a seed.

A *word* is a pair (English, Chinese). A *fact* is (category, entity, relation) -> value; the value is a word or an
amount. The sentences that state facts and ask for them are here too, because pretraining text, questions and answers
must have the same surface form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

Word = tuple[str, str]
LANGUAGES = ("en", "zh")


def _words(text: str) -> list[Word]:
    return [tuple(pair.split("/")) for pair in text.split()]


PEOPLE = _words(
    "Ming/小明 Fang/小芳 Gang/小刚 Yun/小云 Dong/小东 Mei/小梅 Jun/小军 Lan/小兰 Ping/小平 Hua/小华 Wei/小伟 "
    "Na/小娜 Tao/小涛 Jie/小杰 Ting/小婷 Ning/小宁 Yong/小勇 Yu/小玉 Wen/小文 Lin/小林 "
    "Kai/小凯 Min/小敏 Bo/小波 Fei/小飞"
)
PLACES = _words(
    "Beijing/北京 Shanghai/上海 Paris/巴黎 London/伦敦 Rome/罗马 Tokyo/东京 Berlin/柏林 "
    "Cairo/开罗 Lima/利马 Oslo/奥斯陆"
)
ANIMALS = _words("cat/猫 dog/狗 horse/马 sheep/羊 cow/牛 bird/鸟 fish/鱼 pig/猪 hen/鸡 bear/熊")
FOODS = _words("rice/米饭 bread/面包 soup/汤 tea/茶 milk/牛奶 cake/蛋糕 meat/肉 corn/玉米 honey/蜂蜜 fruit/水果")
JOBS = _words("teacher/老师 doctor/医生 driver/司机 farmer/农民 worker/工人 painter/画家 cook/厨师 singer/歌手")
COLOURS = _words("red/红色 blue/蓝色 green/绿色 yellow/黄色 white/白色 black/黑色 grey/灰色 purple/紫色")
THINGS = _words("cup/杯子 book/书 pen/笔 lamp/灯 table/桌子 chair/椅子 hat/帽子 bag/包 clock/钟 ball/球 car/车 bed/床")
SIGHTS = _words("river/河 hill/山 tower/塔 bridge/桥 lake/湖 park/公园 market/市场 garden/花园")
MACHINES = ("minillm", "nova", "pico", "lumo")

#: The words of the translation task; names of people are not among them.
DICTIONARY = PLACES + ANIMALS + FOODS + JOBS + COLOURS + THINGS + SIGHTS


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One relation of one category of entities.

    ``states``: two sentences per language with ``{e}`` (entity) and ``{v}`` (value); answers have the form of the
    first. ``asks``: two questions per language with ``{e}``. ``values``: the words, or the range of
    amounts, from which values are drawn.
    """

    category: str
    name: str
    values: list[Word] | range
    states: dict[str, tuple[str, str]]
    asks: dict[str, tuple[str, str]]


def _relation(category, name, values, en, zh, ask_en, ask_zh) -> Relation:
    return Relation(
        category=category,
        name=name,
        values=values,
        states={"en": en, "zh": zh},
        asks={"en": ask_en, "zh": ask_zh},
    )


RELATIONS = [
    _relation(
        "person",
        "home",
        PLACES,
        ("{e} lives in {v}.", "{e}'s home is {v}."),
        ("{e}住在{v}。", "{e}的家在{v}。"),
        ("Where does {e} live?", "Where is {e}'s home?"),
        ("{e}住在哪里?", "{e}的家在哪里?"),
    ),
    _relation(
        "person",
        "pet",
        ANIMALS,
        ("{e} has a {v}.", "{e}'s pet is a {v}."),
        ("{e}养{v}。", "{e}的宠物是{v}。"),
        ("What animal does {e} have?", "What is {e}'s pet?"),
        ("{e}养什么?", "{e}的宠物是什么?"),
    ),
    _relation(
        "person",
        "food",
        FOODS,
        ("{e} likes {v}.", "{e}'s food is {v}."),
        ("{e}喜欢{v}。", "{e}的食物是{v}。"),
        ("What does {e} like?", "What is {e}'s food?"),
        ("{e}喜欢什么?", "{e}的食物是什么?"),
    ),
    _relation(
        "person",
        "job",
        JOBS,
        ("{e} is a {v}.", "{e}'s job is {v}."),
        ("{e}是{v}。", "{e}的工作是{v}。"),
        ("What work does {e} do?", "What is {e}'s job?"),
        ("{e}做什么?", "{e}的工作是什么?"),
    ),
    _relation(
        "person",
        "age",
        range(10, 90),
        ("{e} is {v} years old.", "{e}'s age is {v}."),
        ("{e}今年{v}岁。", "{e}的年龄是{v}。"),
        ("How old is {e}?", "What is {e}'s age?"),
        ("{e}今年几岁?", "{e}的年龄是多少?"),
    ),
    _relation(
        "place",
        "sight",
        SIGHTS,
        ("{e} has a {v}.", "The sight of {e} is a {v}."),
        ("{e}有{v}。", "{e}的风景是{v}。"),
        ("What does {e} have?", "What is the sight of {e}?"),
        ("{e}有什么?", "{e}的风景是什么?"),
    ),
    _relation(
        "place",
        "schools",
        range(10, 90),
        ("{e} has {v} schools.", "The number of schools in {e} is {v}."),
        ("{e}有{v}所学校。", "{e}的学校数是{v}。"),
        ("How many schools does {e} have?", "What is the number of schools in {e}?"),
        ("{e}有几所学校?", "{e}的学校数是多少?"),
    ),
    _relation(
        "animal",
        "eats",
        FOODS,
        ("The {e} eats {v}.", "The food of the {e} is {v}."),
        ("{e}吃{v}。", "{e}的食物是{v}。"),
        ("What does the {e} eat?", "What is the food of the {e}?"),
        ("{e}吃什么?", "{e}的食物是什么?"),
    ),
    _relation(
        "animal",
        "colour",
        COLOURS,
        ("The {e} is {v}.", "The colour of the {e} is {v}."),
        ("{e}是{v}的。", "{e}的颜色是{v}。"),
        ("Which colour does the {e} have?", "What is the colour of the {e}?"),
        ("{e}是什么颜色的?", "{e}的颜色是什么?"),
    ),
    _relation(
        "thing",
        "colour",
        COLOURS,
        ("The {e} is {v}.", "The colour of the {e} is {v}."),
        ("{e}是{v}的。", "{e}的颜色是{v}。"),
        ("Which colour does the {e} have?", "What is the colour of the {e}?"),
        ("{e}是什么颜色的?", "{e}的颜色是什么?"),
    ),
    _relation(
        "thing",
        "price",
        range(10, 90),
        ("The {e} costs {v} yuan.", "The price of the {e} is {v} yuan."),
        ("{e}卖{v}元。", "{e}的价钱是{v}元。"),
        ("How much does the {e} cost?", "What is the price of the {e}?"),
        ("{e}卖多少元?", "{e}的价钱是多少?"),
    ),
]

ENTITIES = {"person": PEOPLE, "place": PLACES, "animal": ANIMALS, "thing": THINGS}
RELATIONS_OF = {category: [r for r in RELATIONS if r.category == category] for category in ENTITIES}

Fact = tuple[str, int, str]  # category, index of the entity, name of the relation


@dataclass(frozen=True, kw_only=True)
class World:
    """The fixed facts. ``values[fact]`` is a pair (English, Chinese); amounts are digits in both."""

    seed: int
    values: dict[Fact, Word]
    statements: dict[tuple[Fact, str], tuple[str, str]] = field(repr=False)

    def statement(self, fact: Fact, language: str, variant: int = 0) -> str:
        """Return the sentence that states ``fact``; answers have the form of variant 0."""
        return self.statements[fact, language][variant]

    def question(self, fact: Fact, language: str, variant: int) -> str:
        """Return one of the two questions that ask for ``fact``."""
        relation = relation_of(fact)
        return relation.asks[language][variant].format(e=entity_of(fact)[LANGUAGES.index(language)])


def relation_of(fact: Fact) -> Relation:
    """Return the ``Relation`` of a fact."""
    return next(r for r in RELATIONS_OF[fact[0]] if r.name == fact[2])


def entity_of(fact: Fact) -> Word:
    """Return the entity of a fact as a pair (English, Chinese)."""
    return ENTITIES[fact[0]][fact[1]]


def make_world(seed: int) -> World:
    """Draw every fact of the world, uniformly and independently, from ``seed``."""
    rng = random.Random(f"world {seed}")
    values: dict[Fact, Word] = {}
    statements = {}
    for relation in RELATIONS:
        for index, entity in enumerate(ENTITIES[relation.category]):
            value = rng.choice(relation.values)
            fact = (relation.category, index, relation.name)
            values[fact] = value if isinstance(value, tuple) else (str(value), str(value))
            for side, language in enumerate(LANGUAGES):
                statements[fact, language] = tuple(
                    state.format(e=entity[side], v=values[fact][side]) for state in relation.states[language]
                )
    return World(seed=seed, values=values, statements=statements)
