"""BLEU and ROUGE against the slow obvious formulas, on texts whose figures can be worked out by hand."""

import math
import re
import string
import sys
from collections import Counter

import pytest

from minillm.errors import UserError
from minillm.evaluation import bleu, rouge, token_f1

ANSWERS = ["the cat sat on the mat", "a dog barked at night near the old mill", "yes it is so", "red"]
REFERENCES = ["the cat sat on a mat", "the dog barked all night near an old mill", "yes it is so", "blue house"]


def grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def obvious_bleu(answers, references, split):
    """Papineni et al., section 2.3, over the whole corpus; enough matches that no smoothing acts."""
    answers, references = [split(text) for text in answers], [split(text) for text in references]
    logs = []
    for n in range(1, 5):
        pairs = [(grams(a, n), grams(r, n)) for a, r in zip(answers, references, strict=True)]
        matches = sum((a & r).total() for a, r in pairs)
        logs.append(math.log(matches / sum(a.total() for a, _ in pairs)))
    n_answer, n_reference = (sum(map(len, texts)) for texts in (answers, references))
    return 100 * math.exp(sum(logs) / 4) * min(1.0, math.exp(1 - n_reference / n_answer))


def common_length(a, b):
    """Return the length of the longest common subsequence, by recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common_length(a[1:], b[1:])
    return max(common_length(a[1:], b), common_length(a, b[1:]))


def f_measure(matches, n_answer, n_reference):
    return 2 * matches / (n_answer + n_reference) if n_answer + n_reference else 0.0


def test_bleu_is_that_of_the_paper():
    found = bleu(ANSWERS, REFERENCES)
    assert found.bleu == pytest.approx(obvious_bleu(ANSWERS, REFERENCES, str.split), rel=1e-9)
    assert 0 < found.bleu < 100
    assert len(found.precisions) == 4
    assert found.brevity_penalty == pytest.approx(math.exp(1 - 21 / 20))
    assert "tok:13a" in found.signature


def test_bleu_of_chinese_counts_characters():
    answers, references = ["我喜欢在家里做菜。", "今天天气很好"], ["我喜欢在家中做菜。", "今天的天气很好"]
    found = bleu(answers, references)
    assert found.bleu == pytest.approx(obvious_bleu(answers, references, list), rel=1e-9)
    assert "tok:zh" in found.signature


def test_rouge_is_that_of_the_paper():
    found = rouge(ANSWERS, REFERENCES)
    expected = {1: [], 2: [], "l": []}
    for answer, reference in zip(ANSWERS, REFERENCES, strict=True):
        a, r = answer.split(), reference.split()
        for n in (1, 2):
            matches = (grams(a, n) & grams(r, n)).total()
            expected[n].append(f_measure(matches, max(0, len(a) - n + 1), max(0, len(r) - n + 1)))
        expected["l"].append(f_measure(common_length(a, r), len(a), len(r)))
    assert found.rouge_1 == pytest.approx(sum(expected[1]) / 4)
    assert found.rouge_2 == pytest.approx(sum(expected[2]) / 4)
    assert found.rouge_l == pytest.approx(sum(expected["l"]) / 4)


def test_rouge_of_chinese_counts_words():
    # jieba: 我 / 喜欢 / 做菜 against 我 / 不 / 喜欢 / 做菜; the full stops are no words.
    found = rouge(["我喜欢做菜。"], ["我不喜欢做菜！"])
    assert found.rouge_1 == found.rouge_l == pytest.approx(f_measure(3, 3, 4))
    assert found.rouge_2 == pytest.approx(f_measure(1, 2, 3))


def test_chinese_by_the_usual_rules_would_count_nothing():
    """rouge-score's own tokenizer keeps a-z and digits alone: every Chinese answer scores zero with it."""
    from rouge_score.rouge_scorer import RougeScorer

    assert RougeScorer(["rougeL"]).score("我喜欢做菜", "我喜欢做菜")["rougeL"].fmeasure == 0
    assert rouge(["我喜欢做菜"], ["我喜欢做菜"]).rouge_l == 1


def test_letters_of_either_case_are_alike():
    assert rouge(["The CAT, sat."], ["the cat sat"]).rouge_2 == 1


def test_equal_and_empty_answers():
    assert bleu(REFERENCES[:2], REFERENCES[:2]).bleu == pytest.approx(100)
    assert rouge([""], ["something"]).rouge_l == 0


@pytest.mark.parametrize("metric", [bleu, rouge])
def test_pairs_must_be_pairs(metric):
    with pytest.raises(UserError, match="2 answers and 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(UserError, match="at least one"):
        metric([], [])


@pytest.mark.parametrize(
    ("metric", "package", "module"),
    [
        (bleu, "sacrebleu", "sacrebleu.metrics"),
        (rouge, "rouge-score", "rouge_score.rouge_scorer"),
        (rouge, "jieba", "jieba"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, metric, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install {package}  .*pip install -e '\.\[eval\]'"):
        metric(["我喜欢"], ["我喜欢"])


# ---- F1 -----------------------------------------------------------------------------------------------------------


def f1_of_squad(answer, reference):
    """As in the evaluation script of SQuAD 2.0: normalize_answer, get_tokens, compute_f1."""

    def words(text):
        text = "".join(char for char in text.lower() if char not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    gold, predicted = words(reference), words(answer)
    n_same = sum((Counter(gold) & Counter(predicted)).values())
    if not gold or not predicted:
        return int(gold == predicted)
    if n_same == 0:
        return 0
    precision, recall = n_same / len(predicted), n_same / len(gold)
    return 2 * precision * recall / (precision + recall)


PAIRS = [
    ("The cat's hat", "cats hat!"), ("an apple, an apple and the tree", "apple tree"), ("", ""), ("", "word"),
    ("the", "a"), ("the", "dog"), ("B b b c", "b c c"), ("$5 = 5", "5"), ("same same", "same same"), ("x", "y"),
]  # fmt: skip


def test_f1_is_that_of_squad():
    for answer, reference in PAIRS:
        assert token_f1([answer], [reference]) == pytest.approx(f1_of_squad(answer, reference)), (answer, reference)
    answers, references = zip(*PAIRS, strict=True)
    mean = sum(f1_of_squad(*pair) for pair in PAIRS) / len(PAIRS)
    assert token_f1(answers, references) == pytest.approx(mean, rel=1e-12)
    assert 0 < mean < 1


def test_f1_of_chinese_counts_characters_and_leaves_punctuation_out():
    # 今 天 天 气 好 and 今 天 的 天 气 很 好: 5 in common
    assert token_f1(["今天天气好。"], ["今天的天气，很好！"]) == pytest.approx(2 * 5 / (5 + 7))
    # 我 用 python and 我 爱 python 3: 2 in common
    assert token_f1(["我用Python"], ["我爱python 3"]) == pytest.approx(2 * 2 / (3 + 4))


def test_f1_needs_a_reference_for_each_answer():
    with pytest.raises(UserError, match="2 answers and 1 references"):
        token_f1(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no answers"):
        token_f1([], [])
