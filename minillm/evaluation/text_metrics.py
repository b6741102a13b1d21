"""BLEU, ROUGE and F1: the overlap of an answer with a reference text, word by word.

Papineni et al., BLEU (2002); Lin, ROUGE (2004); Rajpurkar et al., SQuAD (2016), for F1. BLEU and ROUGE are computed by
the libraries that published results use: sacrebleu (Post, A Call for Clarity in Reporting BLEU Scores, 2018) and
rouge-score. For Chinese, sacrebleu and F1 compare single characters, and rouge-score compares the words of jieba.
"""

import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import UserError, missing_package

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU, 0 to 100.

    Attributes:
        precisions: of 1-, 2-, 3- and 4-grams, in percent. signature: how it was computed, to be given with it.
    """

    bleu: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str


@dataclass(frozen=True)
class Rouge:
    """Means over all pairs of the F-measures of words, pairs of words, and the longest common sequence; 0 to 1."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def bleu(answers: Sequence[str], references: Sequence[str]) -> Bleu:
    """Return corpus BLEU, with one reference for each answer.

    The tokenizer is sacrebleu's ``13a``, or ``zh`` if more than half of the references contain Chinese; the signature
    names it. Scores with different tokenizers are not comparable.

    Raises:
        UserError: not as many references as answers, or none; sacrebleu is not installed.
    """
    _check(answers, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise missing_package("sacrebleu", purpose="BLEU", extra="eval") from None
    n_chinese = sum(bool(_CHINESE.search(text)) for text in references)
    metric = BLEU(tokenize="zh" if 2 * n_chinese > len(references) else "13a")
    score = metric.corpus_score(list(answers), [list(references)])
    return Bleu(
        bleu=score.score,
        precisions=tuple(score.precisions),
        brevity_penalty=score.bp,
        signature=str(metric.get_signature()),
    )


def rouge(answers: Sequence[str], references: Sequence[str]) -> Rouge:
    """Return the means of ROUGE-1, ROUGE-2 and ROUGE-L over pairs of answer and reference.

    Words are lower-cased and not stemmed; jieba splits Chinese text into words.

    Raises:
        UserError: not as many references as answers, or none; rouge-score or jieba is not installed.
    """
    _check(answers, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing_package("rouge-score", purpose="ROUGE", extra="eval") from None
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, tokenizer=_Words(any(map(_CHINESE.search, [*answers, *references]))))
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return Rouge(*(sum(score[name].fmeasure for score in scores) / len(scores) for name in names))


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the words that answer and reference share, over pairs; 0 to 1.

    With n words in common, each as often as both have it, F1 = 2 n / (words of the answer + words of the reference).
    Words are those of SQuAD's own script: lower-cased, without punctuation and without the articles a, an, the. In
    Chinese each character is a word, as in the script of CMRC 2018. If a side has no words, F1 is 1 if the other has
    none either, else 0.

    Raises:
        UserError: not as many references as answers, or none.
    """
    _check(answers, references)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        words, reference_words = _f1_words(answer), _f1_words(reference)
        n_common = (Counter(words) & Counter(reference_words)).total()
        n_words = len(words) + len(reference_words)
        scores.append(2 * n_common / n_words if words and reference_words else float(words == reference_words))
    return sum(scores) / len(scores)


def _f1_words(text: str) -> list[str]:
    text = "".join(char for char in text.lower() if not _is_punctuation(char))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return _CHINESE.sub(r" \g<0> ", text).split()


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")  # the first has $ + < = > ^ ` | ~


class _Words:
    """rouge-score's tokenizer, by words of letters and digits in any script, Chinese by jieba."""

    def __init__(self, has_chinese: bool):
        self.cut = str.split
        if has_chinese:
            try:
                import jieba
            except ImportError:
                raise missing_package("jieba", purpose="ROUGE of Chinese texts", extra="eval") from None
            jieba.setLogLevel(logging.WARNING)
            self.cut = jieba.lcut

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``, without punctuation."""
        return [word for piece in self.cut(text.lower()) for word in re.findall(r"\w+", piece)]


def _check(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise UserError(f"{len(answers)} answers and {len(references)} references: give one reference for each answer")
    if not answers:
        raise UserError("no answers to compare: give at least one")
