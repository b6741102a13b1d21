"""Published suites of questions: their files, their prompts, and the score of a model."""

from minillm.evaluation.suites.numbers import NumberScore
from minillm.evaluation.suites.run import random_model, run_suite
from minillm.evaluation.suites.table import SUITES, Suite, choose_suites

__all__ = ["SUITES", "NumberScore", "Suite", "choose_suites", "random_model", "run_suite"]
