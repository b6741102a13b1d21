"""Measuring a trained model: how well it predicts, how often its answers are right."""

from minillm.evaluation.exact_match import ExactMatch, exact_match
from minillm.evaluation.perplexity import Perplexity, perplexity

__all__ = ["ExactMatch", "Perplexity", "exact_match", "perplexity"]
