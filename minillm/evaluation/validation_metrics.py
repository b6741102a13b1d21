"""What a run measures in each validation besides its loss: metrics of the model's own answers, benchmarks, samples.

    model = run.start(..., metrics=ValidationMetrics(args, tokenizer, run.engine))

The questions are fixed: the first held-out conversations, each up to its last answer, written with the tokenizer's own
chat template. Answers are greedy, so no random generator moves. Ranks share the questions and gather the texts, and the
metrics are computed from all texts at once, so their number changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minillm.data import DataFiles, Record, read_prompts, read_records
from minillm.data.reasoning import find_answer
from minillm.errors import UserError
from minillm.evaluation.exact_match import greedy_texts
from minillm.evaluation.suites import run_suite
from minillm.evaluation.suites.run import check_suite
from minillm.evaluation.suites.table import find_suite
from minillm.evaluation.text_metrics import bleu, rouge, token_f1
from minillm.inference import samples
from minillm.tokenizer import encode_chat
from minillm.tokenizer.chat_format import chat_format

N_SAMPLES = 4  # questions of the validation data that are answered for samples.jsonl


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the answer that is expected."""

    text: str
    """What is shown: the last turn before the answer, or the beginning of a text."""
    prompt: list[int]
    expected: str
    """The answer; empty if it is not known."""
    n_expected: int = 0
    """Its tokens as the chat template writes it, with thinking and the end of the turn."""


def exact(answers: list[str], references: list[str]) -> float:
    """Return the share of answers that equal their reference, both without white space around them."""
    hits = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return sum(hits) / len(hits)


COMPARE = {
    "exact": exact,
    "f1": token_f1,
    "bleu": lambda answers, references: bleu(answers, references).bleu,
    "rouge_l": lambda answers, references: rouge(answers, references).rouge_l,
}


class ValidationMetrics:
    """The metrics of ``--eval_metric``, and the answers to ``--sample_prompts``.

    Compared is what a user reads: of a reply with thinking the part after it, of one with an ``<answer>`` block what is
    in the block (``find_answer``), for the model's reply and the expected one alike.

    Args:
        args: of the run. tokenizer: of the model.
        engine: of the run. If it shards the model, answers are slow (on the CPU, by one rank), so there are no samples
            unless ``--sample_prompts`` asks for them.

    Attributes:
        names: of the metrics; the first is the criterion.
        needs_model: whether ``measure`` has anything to do.

    Raises:
        UserError: no usable conversation in the validation data; a package that a metric needs is missing; a suite is
            unknown or has no files.
    """

    def __init__(self, args, tokenizer, engine):
        self.args, self.tokenizer, self.names = args, tokenizer, args.metric_names
        self.suites = [name.removeprefix("suite:") for name in self.names if name.startswith("suite:")]
        for name in self.suites:
            check_suite(find_suite(name), args.suite_dir, limit=args.eval_samples)  # what is wrong, before training
        self.questions = self._held_out_questions() if args.answer_metrics else []
        self.samples = self._sample_questions(is_sharded=engine.is_sharded)
        self.opening = chat_format(tokenizer).opens_with if args.answer_metrics else ""
        self.max_new_tokens = args.eval_max_new_tokens
        if args.answer_metrics and not self.max_new_tokens:
            self.max_new_tokens = 2 * max(question.n_expected for question in self.questions)
        # Reports a missing package now, not after the first steps; an answer may be Chinese where no expected one is.
        texts = [*(find_answer(question.expected) for question in self.questions), "中文"]
        for name in args.answer_metrics:
            COMPARE[name](texts, texts)
        self.needs_model = bool(self.questions or self.samples or self.suites)

    def settings(self) -> dict:
        """Return what must match to resume: how the best weights are chosen."""
        criterion = self.names[0]
        extra = ("eval_samples",) if criterion not in ("loss", "accuracy") else ()
        extra += ("eval_max_new_tokens",) if criterion in self.args.answer_metrics else ()
        return {"eval_metric": criterion} | {name: getattr(self.args, name) for name in extra}

    def measure(self, model, ranks=None) -> tuple[dict[str, float], list[dict]]:
        """Return the metrics by name, and rows ``question, answer, expected`` for ``samples.jsonl``.

        Args:
            model: the plain model, whole. It is in evaluation mode meanwhile.
            ranks: share the questions and call this together; None: this process answers all.
        """
        values = {}
        if self.questions:
            replies = self._answers(model, self.questions, ranks, max_new_tokens=self.max_new_tokens)
            answers = [find_answer(self.opening + reply) for reply in replies]
            expected = [find_answer(question.expected) for question in self.questions]
            values = {name: COMPARE[name](answers, expected) for name in self.args.answer_metrics}
        for name in self.suites:
            values[f"suite:{name}"] = self._suite_accuracy(name, model, ranks)
        limit = self.args.eval_max_new_tokens or samples.MAX_NEW_TOKENS
        replies = self._answers(model, self.samples, ranks, max_new_tokens=limit)
        rows = [
            {"question": question.text, "answer": reply, "expected": question.expected}
            for question, reply in zip(self.samples, replies, strict=True)
        ]
        return values, rows

    def _answers(self, model, questions: list[Question], ranks, *, max_new_tokens: int) -> list[str]:
        """Return the greedy answers to all questions, in order; each rank makes its share."""
        rank, n_ranks = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
        mine = greedy_texts(
            model,
            self.tokenizer,
            [question.prompt for question in questions[rank::n_ranks]],
            max_new_tokens=max_new_tokens,
            batch_size=self.args.eval_batch_size or self.args.batch_size,
            bar=rank == 0,
        )
        shares = ranks.gather(mine) if ranks is not None else [mine]
        return [shares[number % n_ranks][number // n_ranks] for number in range(len(questions))]

    def _suite_accuracy(self, name: str, model, ranks) -> float:
        def score() -> float:
            model.eval()
            data_dir, limit = Path(self.args.suite_dir), self.args.eval_samples
            return run_suite(name, model, self.tokenizer, data_dir=data_dir, limit=limit).accuracy

        return score() if ranks is None else ranks.gather(ranks.on_main_rank(score))[0]

    # ---- the questions ---------------------------------------------------------------------------------------

    def _held_out_questions(self) -> list[Question]:
        args = self.args
        found = self._usable(question for record in self._records() if (question := self._question(record)))
        questions = list(islice(found, args.eval_samples or None))
        if not questions:
            raise UserError(
                f"--eval_metric {args.eval_metric}: {args.valid_data} has no conversation whose answer has room in "
                f"--max_seq_len {args.max_seq_len}; give conversations, or --eval_metric loss"
            )
        return questions

    def _sample_questions(self, *, is_sharded: bool) -> list[Question]:
        """Return the questions for ``samples.jsonl``."""
        args = self.args
        if args.sample_prompts == "none" or args.valid_data is None or (is_sharded and not args.sample_prompts):
            return []
        if not args.sample_prompts:
            found = (self._question(record) or self._beginning(record) for record in self._records())
            return list(islice(self._usable(filter(None, found)), N_SAMPLES))
        questions = []
        for prompt in read_prompts(args.sample_prompts, columns=args.columns):
            if args.has_answers:
                questions.append(self._chat_question(prompt.turns, prompt.expected, tools=prompt.tools))
            elif prompt.tools:
                raise UserError(
                    f"--sample_prompts {args.sample_prompts}: a question has tools, and this stage learns from texts, "
                    "which have none: remove the key tools"
                )
            else:
                ids = self.tokenizer.open_document(self.tokenizer.encode(prompt.question))
                questions.append(Question(text=prompt.question, prompt=ids, expected=prompt.expected))
        for question in questions:
            if len(question.prompt) >= args.max_seq_len:
                raise UserError(
                    f"--sample_prompts {args.sample_prompts}: a question has {len(question.prompt)} tokens, so "
                    f"--max_seq_len {args.max_seq_len} has no room for an answer: {question.text[:60]!r}"
                )
        return questions

    def _records(self) -> Iterator[Record]:
        """Return the held-out records; bad lines were reported when the data was read for the loss."""
        data = DataFiles.of(self.args.valid_data)
        return filter(data.takes, read_records(data.files, on_reject=lambda *bad: None, columns=data.columns))

    def _usable(self, questions: Iterator[Question]) -> Iterator[Question]:
        return (question for question in questions if len(question.prompt) < self.args.max_seq_len)

    def _question(self, record: Record) -> Question | None:
        """Return a record's question and the answer to it; None if it has none that a model should give."""
        if record.kind == "text" or record.label is False:
            return None
        turns = [*record.messages, *(record.chosen or ())]
        expected = turns[-1].get("content")
        if turns[-1]["role"] != "assistant" or not expected or len(turns) < 2:
            return None
        try:
            _, mask = encode_chat(self.tokenizer, turns, tools=record.tools, train_on="last")
            return self._chat_question(turns[:-1], expected, tools=record.tools, n_expected=sum(mask))
        except UserError:  # the loss leaves it out too, and has reported the reason
            return None

    def _chat_question(
        self, turns: list[dict], expected: str, *, tools: list[dict] | None = None, n_expected: int = 0
    ) -> Question:
        prompt, _ = encode_chat(self.tokenizer, turns, tools=tools, add_generation_prompt=True)
        text = turns[-1].get("content") or ""
        return Question(text=text, prompt=prompt, expected=expected.strip(), n_expected=n_expected)

    def _beginning(self, record: Record) -> Question | None:
        """Return the first quarter of a text, and the text that follows it."""
        if record.kind != "text":
            return None
        ids = self.tokenizer.encode(record.text)
        n = max(1, min(len(ids) // 4, 32))
        expected = self.tokenizer.decode(ids[n : n + samples.MAX_NEW_TOKENS])
        return Question(
            text=self.tokenizer.decode(ids[:n]), prompt=self.tokenizer.open_document(ids[:n]), expected=expected
        )
