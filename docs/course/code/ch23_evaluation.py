"""Chapter 23: what an answer's likelihood is, what guessing reaches, and how far a score may be from the truth."""

import math

import torch

from minillm.config import ModelConfig
from minillm.evaluation.likelihood import answer_likelihoods
from minillm.evaluation.multiple_choice import multiple_choice
from minillm.evaluation.statistics import paired_difference, wilson_interval
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

torch.manual_seed(0)
tokenizer = train_bpe(iter(["The sky is blue and the grass is green. "] * 20), vocab_size=291)
model = Transformer(ModelConfig.preset("demo", vocab_size=tokenizer.vocab_size)).eval()

# 1. The likelihood of an answer: the sum over its tokens. A model that knows nothing gives ln V for each of them.
likelihood = answer_likelihoods(model, tokenizer, [[("The sky is", " blue and green and blue")]]).groups[0][0]
print(f"ln V: {math.log(tokenizer.vocab_size):.4f}")
print(f"nats per token: {-likelihood.log_likelihood / likelihood.n_tokens:.4f}")

# 2. Such a model on 200 questions, right answers spread evenly; the first choice is short, the others are long.
long = [
    " the grass is green and the sky is blue",
    " the sky is blue and the sky is green",
    " the grass is blue and grass",
]
records = [{"id": str(n), "question": f"Question {n}", "choices": ["it", *long], "answer": n % 4} for n in range(200)]
score = multiple_choice(model, tokenizer, records, style="texts")
print(f"chance: {score.chance:.4f}")
print(f"accuracy: {score.accuracy:.4f}")
print(f"short choice taken: {sum(q.choice == 0 for q in score.questions) / 200:.4f}")


# 3. How often does a 95 % interval hold the truth? Summed over all outcomes of n questions, so without any chance.
def coverage(interval, n: int, p: float) -> float:
    """Return the probability that the interval of ``n`` questions holds the true share ``p``."""
    total = 0.0
    for k in range(n + 1):
        low, high = interval(k, n)
        total += (low <= p <= high) * math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return total


def simple_interval(k: int, n: int) -> tuple[float, float]:
    """Return the interval of the textbook, k/n ± 1.96 standard errors."""
    half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


print(f"Wilson holds a share of 0.02: {coverage(wilson_interval, 50, 0.02):.4f}")
print(f"the simple one holds it: {coverage(simple_interval, 50, 0.02):.4f}")
low, high = wilson_interval(60, 100)
print(f"60 of 100 lies between: {low:.4f} and {high:.4f}")

# 4. Two models on the same 1,000 questions: 560 both right, 40 only the first, 60 only the second.
first = [True] * 560 + [True] * 40 + [False] * 60 + [False] * 340
second = [True] * 560 + [False] * 40 + [True] * 60 + [False] * 340
paired = paired_difference(first, second)
print(f"half width, paired: {(paired.high - paired.low) / 2:.4f}")
print(f"half width, as if unrelated: {1.96 * math.sqrt((0.60 * 0.40 + 0.62 * 0.38) / 1000):.4f}")
print(f"p-value: {paired.p_value:.4f}")
