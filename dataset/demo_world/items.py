"""Items of the skill tasks (sums, lists to sort, letters to count) and which of them are held out.

Held-out items occur only in the test files, not in pretraining text or training conversations. The source draws
uniformly from the *allowed* items, so the probability of each is one over their number, which is counted here exactly.
"""

from __future__ import annotations

import random

import numpy as np

LETTERS = "abcd"
SORT_LENGTHS = (3, 4, 5, 6)
COUNT_LENGTHS = (3, 4, 5, 6, 7)
HELD_OUT_ONE_IN = 10

_MULTIPLIER = 2654435761  # Knuth's multiplicative hash, on 32 bits
_MASK = 0xFFFFFFFF


def _is_held_out(code, salt: int):
    """Return whether an item with this number is held out; ``code`` is an int or a uint64 array."""
    mixed = ((code + salt) * _MULTIPLIER) & _MASK
    mixed = ((mixed ^ (mixed >> 15)) * _MULTIPLIER) & _MASK
    return (mixed >> 16) % HELD_OUT_ONE_IN == 0


class Items:
    """The allowed and the held-out items of one seed.

    ``sums``: allowed ordered pairs (a, b) of 10..99; a pair and its mirror are held out together.
    ``held_sums``: the others. Lists and letter strings are checked by a rule, and the allowed ones are counted exactly.
    """

    def __init__(self, seed: int):
        rng = random.Random(f"items {seed}")
        self.salt = rng.randrange(1 << 20)
        pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
        held = set(rng.sample(pairs, len(pairs) // HELD_OUT_ONE_IN))
        every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        self.sums = [p for p in every if (min(p), max(p)) not in held]
        self.held_sums = [p for p in every if (min(p), max(p)) in held]
        self.n_lists = {n: self._count(10**n, n) for n in SORT_LENGTHS}
        self.n_strings = {
            (t, n): self._count(len(LETTERS) ** n, self._tag(t, n)) for t in LETTERS for n in COUNT_LENGTHS
        }
        self.is_list = {n: self._list_rule(n) for n in SORT_LENGTHS}
        self.is_string = {(t, n): self._string_rule(t, n) for t in LETTERS for n in COUNT_LENGTHS}

    @staticmethod
    def _tag(target: str, length: int) -> int:
        return 16 * (1 + LETTERS.index(target)) + length

    def _count(self, n_codes: int, tag: int) -> int:
        codes = np.arange(n_codes, dtype=np.uint64) + np.uint64(tag << 24)
        return int(n_codes - np.count_nonzero(_is_held_out(codes, self.salt)))

    def _list_rule(self, length: int):
        offset, salt = length << 24, self.salt
        return lambda text: not _is_held_out(int(text) + offset, salt)

    def _string_rule(self, target: str, length: int):
        offset, salt = self._tag(target, length) << 24, self.salt
        table = str.maketrans(LETTERS, "0123")
        return lambda text: not _is_held_out(int(text.translate(table), len(LETTERS)) + offset, salt)


def sort_answer(digits: str) -> str:
    """Return the digits in rising order: ``"528" -> "258"``."""
    return "".join(sorted(digits))


def count_prompt(letters: str) -> str:
    """Return ``" a b a"`` for ``"aba"``: the blanks keep a tokenizer from joining letters."""
    return " " + " ".join(letters)


#: A step of a chain modulo 10. Multipliers are those with an inverse, so every result stays equally likely.
STEPS = [("+", d) for d in range(10)] + [("-", d) for d in range(10)] + [("*", d) for d in (3, 7, 9)]


def apply_step(value: int, step: tuple[str, int]) -> int:
    """Return ``value op operand`` modulo 10."""
    op, operand = step
    return {"+": value + operand, "-": value - operand, "*": value * operand}[op] % 10


def chain_texts(start: int, steps: list[tuple[str, int]]) -> tuple[str, str, str]:
    """Return (problem, worked steps, result): ``("3+4*7", "3+4=7;7*7=9", "9")``."""
    problem, worked, value = str(start), [], start
    for step in steps:
        result = apply_step(value, step)
        problem += f"{step[0]}{step[1]}"
        worked.append(f"{value}{step[0]}{step[1]}={result}")
        value = result
    return problem, ";".join(worked), str(value)
