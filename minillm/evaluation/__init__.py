"""Measures a trained model: loss on texts, correct answers, similarity to references, preferences, reasoning."""

from minillm.evaluation.answer_loss import AnswerLoss, answer_loss
from minillm.evaluation.exact_match import ExactMatch, exact_match
from minillm.evaluation.perplexity import Perplexity, perplexity
from minillm.evaluation.preference import PreferenceScore, like_chosen, preference_accuracy
from minillm.evaluation.reasoning import ReasoningScore, evaluate_reasoning, pass_at_k, read_answer
from minillm.evaluation.text_metrics import Bleu, Rouge, bleu, rouge, token_f1
from minillm.evaluation.validation_metrics import ValidationMetrics

__all__ = [
    "AnswerLoss", "Bleu", "ExactMatch", "Perplexity", "PreferenceScore", "ReasoningScore", "Rouge",
    "ValidationMetrics", "answer_loss", "bleu", "evaluate_reasoning", "exact_match", "like_chosen", "pass_at_k",
    "perplexity", "preference_accuracy", "read_answer", "rouge", "token_f1",
]  # fmt: skip
