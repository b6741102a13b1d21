"""Exercises of chapter 2: byte-pair encoding by hand."""

import random

from minillm.tokenizer.bpe import BytePairEncoding, merge_in_word
from tests.exercises.kit import exercise, find_the_bug


def library_merge(ids, pair, new_id):
    word = list(ids)
    merge_in_word(word, pair, new_id)
    return word


def in_place(ids, pair, new_id):
    merge_in_word(ids, pair, new_id)
    return ids


def overlapping(ids, pair, new_id):
    merged = []
    for i, token in enumerate(ids):
        if tuple(ids[i : i + 2]) == tuple(pair):
            merged.append(new_id)
        elif i == 0 or tuple(ids[i - 1 : i + 1]) != tuple(pair):
            merged.append(token)
    return merged


def only_the_first(ids, pair, new_id):
    for i in range(len(ids) - 1):
        if tuple(ids[i : i + 2]) == tuple(pair):
            return [*ids[:i], new_id, *ids[i + 2 :]]
    return list(ids)


def from_the_right(ids, pair, new_id):
    return library_merge(ids[::-1], (pair[1], pair[0]), new_id)[::-1]


@exercise(
    "ch02_merge",
    solution=library_merge,
    wrong={
        "changes its argument": (in_place, "must not change"),
        "overlaps": (overlapping, "used up"),
        "only the first": (only_the_first, "each occurrence"),
        "from the right": (from_the_right, "from the left"),
    },
)
def test_merge(candidate):
    ids = [1, 2, 3, 1, 2]
    merged = candidate(ids, (1, 2), 9)
    assert ids == [1, 2, 3, 1, 2], "ids must not change: make a new list"
    assert merged == [9, 3, 9], "replace each occurrence of the pair"
    odd = candidate([5, 5, 5], (5, 5), 9)
    assert odd != [9, 9], "in 5 5 5 the middle 5 is used up by the first pair; it cannot be merged twice"
    assert odd == [9, 5], "go from the left: 5 5 5 gives 9 5"
    assert candidate([], (1, 2), 9) == [], "an empty row stays empty"
    assert candidate([2, 1], (1, 2), 9) == [2, 1], "2 1 is another pair than 1 2"


MERGES = [("w", "e"), ("l", "o"), ("e", "we"), ("n", "ewe"), ("o", "we")]


def library_encode(text, merges):
    made = ["".join(pair) for pair in merges]
    vocab = {chr(code): code for code in range(256)} | {token: 256 + i for i, token in enumerate(made)}
    tokens = [bytes([code]) for code in range(256)] + [token.encode() for token in made]
    ids = {(vocab[a], vocab[b]): vocab[a + b] for a, b in merges}
    bpe = BytePairEncoding(tokens, ids, pattern=".+")
    return [tokens[i].decode() for i in bpe.encode_piece(text.encode())]


def longest_from_the_left(text, merges):
    known, tokens = {"".join(pair) for pair in merges}, []
    while text:
        end = next(n for n in range(len(text), 0, -1) if n == 1 or text[:n] in known)
        tokens.append(text[:end])
        text = text[end:]
    return tokens


def from_left_to_right(text, merges):
    tokens, i = list(text), 0
    while i < len(tokens) - 1:
        if tuple(tokens[i : i + 2]) in merges:
            tokens[i : i + 2] = ["".join(tokens[i : i + 2])]
            i = 0
        else:
            i += 1
    return tokens


def only_once(text, merges):
    tokens = list(text)
    for pair in merges:
        tokens = only_the_first(tokens, pair, "".join(pair))
    return tokens


def in_reverse(text, merges):
    return library_encode(text, merges[:2]) if len(merges) > 2 else library_encode(text, merges)


@exercise(
    "ch02_encode",
    solution=library_encode,
    wrong={
        "longest token from the left": (longest_from_the_left, "the merge that was learned first"),
        "any merge from the left": (from_left_to_right, "the merge that was learned first"),
        "each merge once": (only_once, "at every place"),
        "only merges of letters": (in_reverse, "merged tokens are merged again"),
    },
)
def test_encode(candidate):
    assert candidate("newest", MERGES) == ["newe", "s", "t"], "merged tokens are merged again: w e, then e we, n ewe"
    assert candidate("welowe", MERGES)[:1] == ["we"]
    assert candidate("wewe", [("w", "e")]) == ["we", "we"], "a merge is applied at every place, not once"
    tie = candidate("abc", [("b", "c"), ("a", "b")])
    assert tie == ["a", "bc"], "abc: the merge that was learned first, b c, comes first, wherever it is in the text"
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choice("lowen") for _ in range(draw.randrange(9)))
        assert candidate(text, MERGES) == library_encode(text, MERGES), f"{text!r}: lowest rank first, then repeat"


def right_decode(ids, tokens):
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")


TOKENS = [bytes([byte]) for byte in range(256)] + ["猫".encode()]


def finder(decode):
    assert decode(list("猫".encode()), TOKENS) == "猫"


def only_english(decode):
    assert decode(list(b"cat"), TOKENS) == "cat"


def a_whole_character(decode):
    assert decode([256], TOKENS) == "猫"


def half_a_character(decode):
    assert decode(list("猫".encode()[:1]), TOKENS) == "�"


test_find_the_bug = find_the_bug(
    "ch02_bug",
    right=right_decode,
    finder=finder,
    wrong={"English": only_english, "a whole character": a_whole_character, "half a character": half_a_character},
    hint="it hides while every token is whole characters",
)
