"""Chapter 21: a learner that only remembers, taught answers or thoughts; chains, votes, and what the tags weigh."""

import math
import random

from minillm.data.reasoning import parse_reasoning, same_answer
from minillm.evaluation import pass_at_k

N_STEPS, N_TRIALS, N_TEST = 5, 50, 100


def apply(first: int, sign: str, second: int) -> int:
    return (first + second if sign == "+" else first - second) % 10


def problem(rng: random.Random) -> tuple[str, str]:
    """Return a question such as 2+8-7+7+9-5, and its answer with thoughts, one operation at a time, modulo 10."""
    result = rng.randrange(10)
    question, thoughts = str(result), []
    for _ in range(N_STEPS):
        sign, digit = rng.choice("+-"), rng.randrange(10)
        thoughts.append(f"{result}{sign}{digit}={apply(result, sign, digit)}")
        result, question = apply(result, sign, digit), f"{question}{sign}{digit}"
    return question, f"<think>\n{';'.join(thoughts)}\n</think>\n<answer>\n{result}\n</answer>"


def answer(question: str, known: dict[str, str], rng: random.Random) -> str:
    """Return the answer of one who knows some operations by heart and guesses the others."""
    result = question[0]
    for i in range(1, len(question), 2):
        operation = result + question[i : i + 2]
        result = known.get(operation, str(rng.randrange(10)))
    return result


def accuracy(n_problems: int, *, thinks: bool) -> float:
    """Return the share of right answers to new problems, after ``n_problems`` have been learnt by heart."""
    n_right = 0
    for trial in range(N_TRIALS):
        rng = random.Random(trial)
        known = {}
        for question, text in (problem(rng) for _ in range(n_problems)):
            reasoned = parse_reasoning(text)
            steps = reasoned.thinking.split(";") if thinks else [f"{question}={reasoned.answer}"]
            known.update(step.split("=") for step in steps)
        for question, text in (problem(rng) for _ in range(N_TEST)):
            guess = known.get(question, str(rng.randrange(10)))
            said = answer(question, known, rng) if thinks else guess
            n_right += same_answer(said, parse_reasoning(text).answer)
    return n_right / (N_TRIALS * N_TEST)


# 1. What there is to learn, and how much of it is learnt.
print(f"questions: {10 * 20**N_STEPS}, operations: {10 * 2 * 10}")
print(f"right at once, after 400 problems: {accuracy(400, thinks=False):.3f}")
for n in (40, 100, 400):
    known = 1 - (1 - 1 / 200) ** (N_STEPS * n)  # share of the operations
    chain = known**N_STEPS
    print(f"expected after {n} problems: {chain + (1 - chain) / 10:.3f}")
    print(f"right with thoughts, after {n} problems: {accuracy(n, thinks=True):.3f}")

# 2. Several samples: the majority, and one that is right, if each is right with probability 0.6 and wrong in one way.
p, n = 0.6, 5
print(f"majority of 5: {sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(3, n + 1)):.4f}")
print(f"at least one of 5: {1 - (1 - p) ** n:.4f}")
print(f"pass@2 of 5 samples, 3 of them right: {pass_at_k(5, 3, 2):.4f}")

# 3. A thought of 196 tokens and four tags, all with the same loss: the tags' share of it.
for weight in (1, 10):
    print(f"share of the tags with weight {weight}: {4 * weight / (4 * weight + 196):.4f}")
