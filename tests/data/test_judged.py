"""Judged replies beside replies to other questions."""

import pytest

from minillm.data.judged import mismatched
from minillm.data.schema import parse_record
from minillm.errors import UserError


def judged(question, answer, label, line=1):
    return parse_record({"prompt": question, "completion": answer, "label": label}, line)


def pair(question, good, bad, line=1):
    return parse_record({"prompt": question, "chosen": good, "rejected": bad}, line)


def said(records):
    """(question, reply, label, reply to another question) of each."""
    return [(r.messages[0]["content"], r.chosen[0]["content"], r.label, r.rejected[0]["content"]) for r in records]


def test_every_reply_meets_one_to_the_question_before():
    records = [judged("q1", "a1", True), judged("q2", "a2", False), judged("q3", "a3", True)]
    expected = [("q1", "a1", True, "a2"), ("q2", "a2", False, "a1"), ("q3", "a3", True, "a2")]
    assert said(mismatched(records)) == expected


def test_replies_to_one_question_are_not_taken_for_each_other():
    records = [judged("q1", "a", True), judged("q1", "b", False), judged("q1", "c", False), judged("q2", "d", True)]
    expected = [("q1", "a", True, "d"), ("q1", "b", False, "d"), ("q1", "c", False, "d"), ("q2", "d", True, "a")]
    assert said(mismatched(records)) == expected


def test_a_pair_is_a_good_reply_and_a_bad_one():
    found = list(mismatched([pair("q1", "good1", "bad1", 4), pair("q2", "good2", "bad2", 9)]))
    assert said(found) == [
        ("q1", "good1", True, "good2"),
        ("q1", "bad1", False, "bad2"),
        ("q2", "good2", True, "good1"),
        ("q2", "bad2", False, "bad1"),
    ]
    assert {record.kind for record in found} == {"judged"}
    assert [record.line for record in found] == [4, 4, 9, 9]


def test_one_question_alone_is_refused():
    with pytest.raises(UserError, match="at least two"):
        list(mismatched([judged("q", "a", True), judged("q", "b", False)]))
    assert list(mismatched([])) == []
