"""What the properties draw from: awkward texts and values, records of every schema, and damage of every kind."""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

from minillm.errors import UserError

FACTOR = float(os.environ.get("MINILLM_FUZZ_EXAMPLES", "0.1"))
TIMEOUT_S = max(60, 60 * FACTOR)  # of one test


def examples(n: int) -> settings:
    """Return the settings of ``conftest.py`` with ``n`` examples, times MINILLM_FUZZ_EXAMPLES."""
    return settings(settings.get_profile("fuzz"), max_examples=max(1, round(n * FACTOR)))


@contextmanager
def scratch():
    """A folder of its own for each example: a fixture would be shared by all of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def outcome(call, *arguments, **settings):
    """Return what ``call`` returns, or the UserError it raises; every other exception is a bug and passes through."""
    try:
        return call(*arguments, **settings)
    except UserError as error:
        return error


# ---- values --------------------------------------------------------------------------------------------------

AWKWARD = (
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>", "<tool_call>",
    "</tool_call>", "<tool_response>", "\n", "\r\n", "\r", "\u2028", "\x85", "\x00", "\ufeff", "\u2581", "\U0001f600",
    "\u00e9", "e\u0301", "小明", "\u202e", "\U0010ffff", "\u0130", " ", "  ", "\t", "<|", "<0x0A>", '"', "\\", "{}",
)  # fmt: skip
SURROGATES = ("\ud800", "\udfff", "a\udc80b")

texts = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=5).map("".join)
"""Texts that have a UTF-8 form."""
broken_texts = st.tuples(texts, st.sampled_from(SURROGATES), texts).map("".join)
"""Texts with a lone surrogate: legal in JSON's escapes, but of no UTF-8 form."""
numbers = (
    st.integers(-3, 100)
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64])
    | st.floats()
    | st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e-320, 1e308, -0.0])
)
scalars = st.none() | st.booleans() | numbers | texts | broken_texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
"""Any JSON value, with the NaN, Infinity and huge integers that Python's reader lets through."""


@st.composite
def mutated(draw, structures, others=values):
    """One of ``structures`` with a field removed, doubled, renamed, or replaced by one of ``others``."""
    whole = draw(structures)
    places = [(), *_places(whole)]
    place = draw(st.sampled_from(places))
    if not place:
        return draw(others)
    return _changed(
        whole, place, draw(st.sampled_from(["replace", "replace", "remove", "double", "rename"])), draw, others
    )


def _places(value, at=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from _places(item, (*at, key))


def _changed(value, place, how, draw, others):
    value, (key, *deeper) = value.copy(), place
    if deeper:
        value[key] = _changed(value[key], deeper, how, draw, others)
    elif how == "remove":
        del value[key]
    elif how == "double" and isinstance(value, list):
        value.insert(key, value[key])
    elif how == "rename" and isinstance(value, dict):
        value[draw(texts)] = value.pop(key)
    else:
        value[key] = draw(others)
    return value


# ---- records of every schema ---------------------------------------------------------------------------------

sayable = texts.map(lambda text: text.replace("\x00", "0"))
"""Texts that a record may hold: without zero characters."""
filled = sayable.filter(str.strip)
"""Texts that are not blank."""
calls = st.fixed_dictionaries({"name": texts, "arguments": st.dictionaries(texts, texts, max_size=2) | texts})
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": sayable},
    optional={
        "reasoning_content": sayable,
        "tool_calls": st.lists(calls | calls.map(lambda c: {"function": c}), max_size=2),
    },
).filter(lambda turn: any(turn.get(key) for key in ("reasoning_content", "tool_calls")) or turn["content"].strip())
turns = answers | st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": sayable})
conversations = st.tuples(st.lists(turns, max_size=4), answers).map(lambda parts: [*parts[0], parts[1]])
plain = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": sayable})
untagged = sayable.map(lambda text: text.replace("<", "("))
reasoned = st.tuples(untagged, untagged.filter(str.strip)).map(
    lambda parts: f"<think>{parts[0]}</think><answer>{parts[1]}</answer>"
)

RECORDS = {
    "text": st.fixed_dictionaries({"text": filled}, optional={"log_prob": st.floats(-100, 0), "task": texts}),
    "chat": st.one_of(
        st.fixed_dictionaries({"messages": conversations}),
        st.fixed_dictionaries({"conversations": conversations}, optional={"system": sayable}).filter(
            lambda record: record["conversations"][0]["role"] != "system" or "system" not in record
        ),
        st.fixed_dictionaries(
            {"conversations": st.just([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}
        ),
        st.fixed_dictionaries(
            {"instruction": sayable, "output": filled},
            optional={
                "input": sayable,
                "system": sayable,
                "history": st.lists(st.tuples(sayable, filled).map(list), max_size=2),
            },
        ),
        st.fixed_dictionaries(
            {"question": sayable, "answer": filled}, optional={"system": sayable, "reasoning_content": sayable}
        ),
        st.fixed_dictionaries(
            {
                "conversation": st.lists(
                    st.fixed_dictionaries({"input": sayable, "output": filled}), min_size=1, max_size=3
                )
            }
        ),
    ),
    "preference": st.one_of(
        st.fixed_dictionaries({"prompt": sayable, "chosen": filled, "rejected": filled}).filter(
            lambda record: record["chosen"] != record["rejected"]
        ),
        st.tuples(st.lists(plain, min_size=1, max_size=2), filled).map(
            lambda parts: {"prompt": parts[0], "chosen": parts[1], "rejected": parts[1] + "!"}
        ),
        plain.map(lambda m: {side: [m, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}),
    ),
    "judged": st.fixed_dictionaries({"prompt": sayable, "completion": filled, "label": st.booleans()}),
    "reason": reasoned.map(
        lambda text: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
    ),
}  # fmt: skip
any_record = st.one_of(*RECORDS.values())
"""Valid records of every kind."""


def as_json(value, *, ascii: bool = True) -> bytes:
    """Return a value as one line of JSON, as careless writers make it: surrogates and NaN pass."""
    return json.dumps(value, ensure_ascii=ascii).encode("utf-8", errors="surrogatepass")


# ---- damage --------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """``content`` with a bit flipped, cut short, with bytes put in, left out or written over; never as it was."""
    how = draw(st.sampled_from(["flip", "flip", "cut", "append", "write", "leave out"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    some = draw(st.binary(min_size=1, max_size=8))
    if how == "flip" and content:
        bit = 1 << draw(st.integers(0, 7))
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    if how == "cut" and content:
        return content[:place]
    if how == "write" and content[place : place + len(some)] != some:
        return content[:place] + some + content[place + len(some) :]
    if how == "leave out" and content[place + len(some) :]:
        return content[:place] + content[place + len(some) :]
    return content + some
