"""Measuring a trained model: how well it predicts, how often its answers are right, how like a reference they are."""

from minillm.evaluation.answer_loss import AnswerLoss, answer_loss
from minillm.evaluation.exact_match import ExactMatch, exact_match
from minillm.evaluation.perplexity import Perplexity, perplexity
from minillm.evaluation.text_metrics import Bleu, Rouge, bleu, rouge

__all__ = [
    "AnswerLoss",
    "Bleu",
    "ExactMatch",
    "Perplexity",
    "Rouge",
    "answer_loss",
    "bleu",
    "exact_match",
    "perplexity",
    "rouge",
]
