"""Whole characters only, and stop strings found without printing a part of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.inference.text import StopMatcher, TextDecoder, check_stop
from minillm.tokenizer import train_bpe

TEXT = "naïve 👩‍👩‍👧 你好，世界 🙂!"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Special tokens and the 256 bytes: every character beyond ASCII is split over tokens."""
    return train_bpe(iter(["a"]), vocab_size=267)


def test_characters_split_over_byte_tokens_appear_whole(byte_tokenizer):
    ids = byte_tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    decoder = TextDecoder(byte_tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) == TEXT
    assert all(len(piece) <= 1 and "\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_character_become_the_replacement_character(byte_tokenizer):
    ids = [*byte_tokenizer.encode("你")[:2], *byte_tokenizer.encode("a"), *byte_tokenizer.encode("🙂")[1:2]]
    decoder = TextDecoder(byte_tokenizer)
    assert "".join(map(decoder.push, [*ids, *byte_tokenizer.encode("b")])) == "\ufffda\ufffdb"


def test_ids_beyond_the_vocabulary_give_no_text(byte_tokenizer):
    """Embeddings are often padded, and an untrained model may sample such an id."""
    decoder = TextDecoder(byte_tokenizer)
    first, second = byte_tokenizer.encode("é")
    assert "".join(map(decoder.push, [first, 267, second, 5000])) == "é" == byte_tokenizer.decode([first, 267, second])


def test_control_tokens_are_left_out_and_tags_shown(byte_tokenizer):
    decoder = TextDecoder(byte_tokenizer)
    ids = [byte_tokenizer.token_id(name) for name in ("<think>", "<|im_end|>", "<|endoftext|>")]
    ids += byte_tokenizer.encode("x")
    text = "".join(map(decoder.push, ids))
    assert text == byte_tokenizer.decode(ids, skip_special_tokens=True) == "<think>x"


def test_ids_beyond_the_vocabulary_are_dropped_as_by_decode(byte_tokenizer):
    """Embeddings are often padded, and a model that knows little may choose such an id."""
    decoder = TextDecoder(byte_tokenizer)
    ids = [*byte_tokenizer.encode("你")[:2], 267, *byte_tokenizer.encode("你")[2:], 300, *byte_tokenizer.encode("x")]
    assert "".join(map(decoder.push, ids)) == byte_tokenizer.decode(ids, skip_special_tokens=True) == "你x"


def run(stops, chunks):
    """Return the text let through after each chunk, up to and with the stop, and whether one was found."""
    matcher, pieces = StopMatcher(tuple(stops)), []
    for chunk in chunks:
        pieces.append(matcher.push(chunk))
        if matcher.stopped:
            return pieces, True
    return [*pieces, matcher.finish()], False


def cut_by_trying_every_end(stops, text):
    """The slow, obvious rule: read on until some stop string is complete, cut before the first that is."""
    for end in range(len(text) + 1):
        starts = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if starts:
            return text[: min(starts)], True
    return text, False


SMALL = st.text(alphabet="ab#", max_size=12)
STOPS = st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3)


@given(STOPS, SMALL)
def test_matcher_equals_the_slow_rule_one_character_at_a_time(stops, text):
    pieces, stopped = run(stops, list(text))
    assert ("".join(pieces), stopped) == cut_by_trying_every_end(stops, text)


@given(STOPS, st.lists(SMALL, max_size=4))
def test_matcher_never_prints_a_stop_string_nor_its_beginning(stops, chunks):
    pieces, stopped = run(stops, chunks)
    text, shown = "".join(chunks), "".join(pieces)
    assert text.startswith(shown)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        assert not any(stop in shown for stop in stops)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


def test_text_is_held_back_no_longer_than_needed():
    pieces, stopped = run(["###"], ["a#", "#b", "##", "#c"])
    assert (pieces, stopped) == (["a", "##b", "", ""], True)
    assert run(["###"], ["a##"]) == (["a", "##"], False)


def test_check_stop():
    assert check_stop("ab", object()) == ("ab",)
    assert check_stop([], None) == ()
    with pytest.raises(UserError, match="at least one character"):
        check_stop(["a", ""], object())
    with pytest.raises(UserError, match="tokenizer="):
        check_stop(["a"], None)
