"""Measures a trained model: loss on texts, correct answers and choices, preferences, reasoning, suites of questions."""

from minillm.evaluation.answer_loss import AnswerLoss, answer_loss
from minillm.evaluation.exact_match import ExactMatch, exact_match
from minillm.evaluation.multiple_choice import Score, multiple_choice
from minillm.evaluation.perplexity import Perplexity, perplexity
from minillm.evaluation.preference import PreferenceScore, like_chosen, preference_accuracy
from minillm.evaluation.reasoning import ReasoningScore, evaluate_reasoning, pass_at_k, read_answer
from minillm.evaluation.suites import run_suite
from minillm.evaluation.text_metrics import Bleu, Rouge, bleu, rouge, token_f1
from minillm.evaluation.tool_match import ToolMatch, tool_match
from minillm.evaluation.validation_metrics import ValidationMetrics

__all__ = [
    "AnswerLoss", "Bleu", "ExactMatch", "Perplexity", "PreferenceScore", "ReasoningScore", "Rouge", "Score",
    "ToolMatch", "ValidationMetrics", "answer_loss", "bleu", "evaluate_reasoning", "exact_match", "like_chosen",
    "multiple_choice", "pass_at_k", "perplexity", "preference_accuracy", "read_answer", "rouge", "run_suite",
    "token_f1", "tool_match",
]  # fmt: skip
