"""Suites whose answer is a number: the model writes its solution, and the number in it is compared."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from minillm.data.reasoning import find_answer, same_answer
from minillm.errors import UserError
from minillm.evaluation.exact_match import greedy_texts
from minillm.evaluation.multiple_choice import PromptFormat, choose_pool
from minillm.evaluation.questions import Counted, Question, choose_examples
from minillm.tokenizer import encode_chats

_NUMBER = re.compile(r"[-−]?\d[\d,，]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True, kw_only=True)
class NumberAnswer:
    """The outcome of one question."""

    id: str
    subject: str
    expected: str
    text: str
    """What the model wrote."""
    answer: str
    """The number in it; empty without one."""
    correct: bool


@dataclass(frozen=True, kw_only=True)
class NumberScore(Counted):
    """The outcome of all questions; ``Counted`` has ``accuracy``, ``interval``, ``subjects``, ``subject_average``."""

    questions: list[NumberAnswer]
    n_shot: int
    n_truncated: int
    """Questions whose prompt was too long and lost its beginning."""
    max_new_tokens: int

    style = "number"
    chance = 0.0  # there are too many numbers to guess one

    def as_dict(self, *, questions: bool = True) -> dict:
        """Return the figures, and with ``questions`` every question, as plain values for JSON."""
        names = ("style", "n_shot", "n_truncated", "max_new_tokens")
        values = self.counts() | {name: getattr(self, name) for name in names}
        values["subjects"] = [asdict(score) | {"accuracy": score.accuracy} for score in self.subjects]
        return values | ({"questions": list(map(asdict, self.questions))} if questions else {})


def extract_number(text: str) -> str:
    """Return the number that a solution gives: the first after ``####``, else the last one; empty without a number.

    Of a text with an ``<answer>`` block only that block counts, and of one with thinking what follows it.
    """
    _, mark, final = find_answer(text).rpartition("####")
    numbers = [number.replace("−", "-").replace("，", ",").rstrip(",") for number in _NUMBER.findall(final)]
    return "" if not numbers else numbers[0] if mark else numbers[-1]


def measure_numbers(
    model,
    tokenizer,
    questions: Sequence[Question],
    *,
    prompt: PromptFormat,
    n_shot: int = 0,
    examples: Sequence[Question] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    chat: bool = False,
) -> NumberScore:
    """Return how often the number in the greedy answer is the right one.

    Args:
        prompt: the words around question and answer; a new question in the answer ends it.
        n_shot: questions with their solutions before each question, the first of ``examples``, never itself.
        max_new_tokens: longest answer, but at most half of the model's positions.
        chat: ask in the model's chat format, the examples as earlier turns.

    Raises:
        UserError: fewer examples than ``n_shot``; a model with fewer than 4 positions.
    """
    limit = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, limit // 2)
    if max_new_tokens < 2:
        raise UserError(f"the model reads {limit} tokens: too few for a question and its answer")
    pool_of = choose_pool(list(examples), same_subject=False)
    prompts = []
    for question in questions:
        shots = choose_examples(question, pool_of(question), n_shot=n_shot, same_subject=False)
        prompts.append(_encode(tokenizer, question, shots, prompt=prompt, chat=chat))
    longest = limit - max_new_tokens
    n_truncated = sum(len(ids) > longest for ids in prompts)
    prompts = [ids if len(ids) <= longest else [ids[0], *ids[len(ids) - longest + 1 :]] for ids in prompts]
    stop = () if chat else ("\n\n", prompt.question.partition("{question}")[0].strip() or "\n\n")
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    texts = greedy_texts(model, tokenizer, prompts, stop=stop, **limits)
    answers = []
    for question, text in zip(questions, texts, strict=True):
        answer = extract_number(text)
        answers.append(
            NumberAnswer(
                id=question.id,
                subject=question.subject,
                expected=question.final,
                text=text,
                answer=answer,
                correct=bool(answer) and same_answer(answer, question.final),
            )
        )
    return NumberScore(questions=answers, n_shot=n_shot, n_truncated=n_truncated, max_new_tokens=max_new_tokens)


def _encode(tokenizer, question: Question, shots: list[Question], *, prompt: PromptFormat, chat: bool) -> list[int]:
    """Return the ids of a question after its examples."""
    if chat:
        turns = []
        for shot in shots:
            turns += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": _solution(shot)}]
        turns.append({"role": "user", "content": question.question})
        return encode_chats(tokenizer, [turns], add_generation_prompt=True)[0][0]
    plain = replace(prompt, description="")
    asked = [plain.ask(shot, style="texts") + prompt.delimiter + _solution(shot) + "\n\n" for shot in shots]
    text = "".join([prompt.describe(question.subject), *asked, plain.ask(question, style="texts")])
    return tokenizer.open_document(tokenizer.encode(text))


def _solution(question: Question) -> str:
    return f"{question.solution}\n#### {question.final}" if question.solution else question.final
