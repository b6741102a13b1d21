"""The form of reasoned answers: what has it and what has not, and when two answers are the same."""

import pytest

from minillm.data.reasoning import TAGS, find_answer, parse_reasoning, same_answer
from minillm.errors import UserError


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\n1+1=2\n</think>\n<answer>\n2\n</answer>", "1+1=2", "2"),
        ("<think>1+1=2</think><answer>2</answer>", "1+1=2", "2"),
        ("  <think>a\n\nb</think>\n\n<answer>c\nd</answer>\n", "a\n\nb", "c\nd"),
        ("<think>\n\n</think>\n<answer>\n2\n</answer>", "", "2"),  # thinking may be empty, an answer may not
        ("<think>a < b, <b>, < think></think><answer>想 </answer>", "a < b, <b>, < think>", "想"),
    ],
)
def test_the_parts_of_an_answer(text, thinking, answer):
    assert parse_reasoning(text) == (thinking, answer)
    assert parse_reasoning(text).thinking == thinking
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no <think>"),
        ("2", "there is no <think>"),
        ("<answer>2</answer>", "there is no <think>"),
        ("</think><answer>2</answer>", "there is no <think>"),
        ("<think>1+1", "<think> is never closed: add </think>"),
        ("<think>1+1<answer>2</answer>", "<think> is never closed"),
        ("<think>1+1</think>2", "there is no <answer>"),
        ("<think>1+1</think><answer>2", "<answer> is never closed: add </answer>"),
        ("<think>1</think><answer> \n </answer>", "between <answer> and </answer> is empty"),
        ("<think>1</think><answer></answer>", "between <answer> and </answer> is empty"),
        ("So <think>1</think><answer>2</answer>", "outside of the blocks: 'So'"),
        ("<think>1</think> so <answer>2</answer>", "outside of the blocks: 'so'"),
        ("<think>1</think><answer>2</answer>.", "outside of the blocks: '.'"),
        ("<answer>2</answer><think>1</think>", "must be <think> </think> <answer> </answer>"),
        ("<think>1<answer>2</answer></think>", "the tags are <think> <answer> </answer> </think>"),
        ("<think>1</think><think>2</think><answer>2</answer>", "once each"),
        ("<think>1</think><answer>2</answer><answer>3</answer>", "once each"),
        ("</think><think><answer>2</answer>", "the tags are </think> <think>"),
    ],
)
def test_what_lacks_the_form_says_why(text, reason):
    with pytest.raises(UserError) as raised:
        parse_reasoning(text)
    assert reason in str(raised.value)


def test_every_tag_is_needed_once():
    """Leave one tag out, or write one twice, anywhere: none of these has the form."""
    parts = [TAGS[0], "a", *TAGS[1:3], "b", TAGS[3]]
    assert parse_reasoning("".join(parts)) == ("a", "b")
    for place, part in enumerate(parts):
        if part in TAGS:
            for other in ([], [part, part]):
                with pytest.raises(UserError):
                    parse_reasoning("".join(parts[:place] + other + parts[place + 1 :]))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2", "2"), (" 2\n", "2"), ("", ""),
        ("<think>1+1</think>\n2 ", "2"),
        ("<think>1+1<answer>2</answer>", "2"),
        ("<think>1+1</think><answer>2", "2"),  # cut off
        ("<answer>1</answer> no: <answer> 2 </answer> surely", "2"),
        ("<think>1+1", "<think>1+1"),
        ("<answer>", ""),
    ],
)  # fmt: skip
def test_an_answer_is_found_where_the_form_is_broken(text, answer):
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("8", "8"), (" 8\n", "8"), ("8.0", "8"), ("8.", "8"), ("08", "8"), ("-0", "0"), ("+8", "8"), (".5", "0.50"),
        ("1,000.0", "1000"), ("$5", "5"), ("5 €", "5.00"), ("¥1,200", "1200"), ("1e3", "1000"),
        ("0.1", "0.10"), ("12345678901234567890123", "12345678901234567890123.0"),
        ("cat", " cat"), ("", " "), ("nan", "nan"), ("1,234,567", "1234567"), ("-1,234.50", "-1234.5"),
        ("$1,200", "1200.00"), ("1200.00", "1200"), ("1，200", "1200"), ("￥1,200", "1200"), ("3,5", "3,5"),
        ("1,000.", "1000"),
    ],
)  # fmt: skip
def test_same_answers(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("8", "9"), ("8", "-8"), ("8", ""), ("8", "eight"), ("8 apples", "8"), ("cat", "Cat"), ("cat", "dog"),
        ("0.1", "0.1000000000000000055"),  # equal as floats, not as numbers
        ("12345678901234567890123", "12345678901234567890124"), ("nan", "NaN"), ("inf", "Infinity"), ("1 2", "12"),
        ("3,5", "35"), ("1,2", "12"), ("1,00", "100"), (",,,1", "1"), ("1_0", "10"), ("1,0000", "10000"),
        ("1234,567", "1234567"), ("1,234,56", "123456"), ("0,500", "500"), ("1.5,000", "1.5"), ("12,", "12"),
        ("3,5", "3.5"), (",123", "123"), ("1,23e3", "123e3"), ("", "0"), ("$", "0"), (".", "0"),
    ],
)  # fmt: skip
def test_other_answers(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)
