"""Readers of suites: our JSON Lines, and the files of the original releases as they were published.

Each reader takes a path and yields ``Question``s; ``.jsonl`` may also be ``.jsonl.gz``. A wrong record is a
``UserError`` with its file and line; so is a file that is damaged or not UTF-8.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from minillm.data.sources.encodings import named_errors, open_text
from minillm.data.sources.raw_records import read_lines
from minillm.errors import UserError
from minillm.evaluation.questions import Question, parse_question


def read_ours(path: Path) -> Iterator[Question]:
    """Yield ``{"id", "question", "choices", "answer", "subject"}``, or conversations with ``final`` (an SFT record)."""
    for where, record in _lines(path):
        if "conversations" in record:
            turns = record["conversations"]
            is_chat = isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, dict) for turn in turns)
            if not is_chat or not all(isinstance(turn.get("content"), str) for turn in turns[-2:]):
                raise UserError(f"{where}: conversations must end with a question and its answer, both texts")
            thinking = re.search(r"<think>\s*(.*?)\s*</think>", turns[-1]["content"], re.S)
            record = {
                "id": record.get("id", f"{_stem(path)}-{where.rpartition(' ')[2]}"),
                "question": turns[-2]["content"],
                "final": record.get("final"),
                "solution": thinking[1] if thinking else "",
                "subject": record.get("subject"),
            }
        yield parse_question(record, where)


def read_subject_csv(path: Path) -> Iterator[Question]:
    """Yield C-Eval's and CMMLU's rows: a header with question, A, B, C, D, answer; the file's name is the subject."""
    subject = re.sub(r"_(dev|val)$", "", path.stem)
    rows = _rows(path)
    _, head = next(rows, ("", []))
    names = [name.strip().lower() or "id" for name in head]
    missing = {"question", "a", "b", "c", "d", "answer"} - set(names)
    if missing:
        raise UserError(f"{path}: the header has no {', '.join(sorted(missing))}: is it a file of the release?")
    for number, (where, cells) in enumerate(rows):
        row = dict(zip(names, cells, strict=False))
        record = {"id": f"{subject}-{row.get('id') or number}", "question": row.get("question"), "subject": subject}
        yield _lettered(record, [row.get(letter) for letter in "abcd"], row.get("answer"), where)


def read_mmlu_csv(path: Path) -> Iterator[Question]:
    """Yield MMLU's rows: question, four choices and a letter, without a header; the file's name is the subject."""
    subject = re.sub(r"_(dev|val|test)$", "", path.stem)
    for number, (where, row) in enumerate(_rows(path)):
        if len(row) != 6:
            raise UserError(f"{where}: {len(row)} columns; MMLU has 6: question, four choices, letter")
        record = {"id": f"{subject}-{number}", "question": row[0], "subject": subject}
        yield _lettered(record, row[1:5], row[5], where)


def read_arc(path: Path) -> Iterator[Question]:
    """Yield the records of ARC and OpenBookQA: a stem, labelled choices, and the label of the answer."""
    for where, record in _lines(path):
        try:
            question, key = record["question"], record["answerKey"].strip()
            labels = [choice["label"] for choice in question["choices"]]
            fields = {"question": question["stem"], "choices": [choice["text"] for choice in question["choices"]]}
        except (KeyError, TypeError, AttributeError) as error:
            raise _not_of_the_release(where, "question.stem, question.choices and answerKey", error) from None
        if key not in labels:
            raise UserError(f"{where}: answerKey {key!r} is not among the labels {', '.join(map(str, labels))}")
        yield parse_question(
            fields | {"id": str(record.get("id", where)), "answer": labels.index(key), "subject": "science"}, where
        )


def read_piqa(path: Path) -> Iterator[Question]:
    """Yield PIQA's records: goal, sol1, sol2; the labels lie in a file of their own, ``dev-labels.lst``."""
    labels_path = path.with_name(f"{_stem(path)}-labels.lst")
    if not labels_path.is_file():
        raise UserError(f"{labels_path}: no such file; PIQA's labels belong next to {path.name}")
    labels = [line.strip() for _, line in read_lines(labels_path)]
    lines = list(_lines(path))
    if len(labels) != len(lines):
        raise UserError(f"{labels_path} has {len(labels)} labels and {path.name} {len(lines)} questions: not a pair")
    for number, ((where, record), label) in enumerate(zip(lines, labels, strict=True)):
        choices = [record.get("sol1"), record.get("sol2")]
        fields = {"id": f"piqa-{number}", "question": record.get("goal"), "choices": choices, "subject": "physical"}
        if label not in ("0", "1"):
            raise UserError(f"{labels_path}, line {number + 1}: label {label!r}: 0 or 1")
        yield parse_question(fields | {"answer": int(label)}, where)


def read_winogrande(path: Path) -> Iterator[Question]:
    """Yield WinoGrande's records: a sentence with a blank, two options, and the answer 1 or 2."""
    for where, record in _lines(path):
        answer = record.get("answer")
        if answer not in ("1", "2"):
            raise UserError(f"{where}: answer {answer!r}: WinoGrande's is '1' or '2' (its test file has no answers)")
        choices = [record.get("option1"), record.get("option2")]
        fields = {"question": record.get("sentence"), "choices": choices, "subject": "coreference"}
        yield parse_question(fields | {"id": str(record.get("qID", where)), "answer": int(answer) - 1}, where)


def read_hellaswag(path: Path) -> Iterator[Question]:
    """Yield HellaSwag's records with cleaned texts: what an activity is about, and four endings."""
    for number, (where, record) in enumerate(_lines(path)):
        try:
            context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
            choices = [clean_hellaswag(ending) for ending in record["endings"] + []]  # not of a text
            label = int(str(record["label"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _not_of_the_release(where, "activity_label, ctx_a, ctx_b, endings and label", error) from None
        fields = {"id": f"hellaswag-{number}", "question": clean_hellaswag(context), "choices": choices}
        yield parse_question(fields | {"answer": label, "subject": record.get("split_type", "all")}, where)


def clean_hellaswag(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow, such as ``[header]``; lm-evaluation-harness's rules."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def read_gsm8k(path: Path) -> Iterator[Question]:
    """Yield GSM8K's records: the solution ends with ``#### 18``; calculator marks ``<<2*9=18>>`` are left out."""
    for number, (where, record) in enumerate(_lines(path)):
        solution, mark, final = str(record.get("answer", "")).rpartition("####")
        if not mark:
            raise UserError(f"{where}: the answer has no '#### NUMBER' at its end")
        fields = {"id": f"gsm8k-{number}", "question": record.get("question"), "final": final.strip()}
        yield parse_question(fields | {"solution": re.sub(r"<<.*?>>", "", solution).strip()}, where)


def read_cmath(path: Path) -> Iterator[Question]:
    """Yield CMath's records: question, golden (a number), grade; the grade is the subject."""
    for number, (where, record) in enumerate(_lines(path)):
        final = record.get("golden", record.get("answer"))
        final = str(final) if type(final) in (int, float) else final
        fields = {
            "id": f"cmath-{number}",
            "question": record.get("question"),
            "subject": f"grade {record.get('grade')}",
        }
        yield parse_question(fields | {"final": final}, where)


def _lettered(record: dict, choices: list, letter: str | None, where: str) -> Question:
    """Return a question whose answer is a letter."""
    name = (letter or "").strip().upper()
    if name not in tuple("ABCD"):
        raise UserError(f"{where}: answer {letter!r}: A, B, C or D (the test files of C-Eval have no answers)")
    return parse_question(record | {"choices": choices, "answer": "ABCD".index(name)}, where)


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (file and line, cells) of a table; empty lines are left out, line ends within cells stay as they are."""
    with named_errors(path), open_text(path, newline="") as file:
        rows = csv.reader(file)
        try:
            for cells in rows:
                if cells:
                    yield f"{path}, line {rows.line_num}", cells
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: broken table ({error}); download it again") from None


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (file and line, object) of JSON Lines; empty lines are left out."""
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also huge numbers and deep nesting
            raise UserError(f"{where}: broken JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: {type(record).__name__}, not a JSON object")
        yield where, record


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _not_of_the_release(where: str, names: str, error: Exception) -> UserError:
    return UserError(f"{where}: needs {names} ({type(error).__name__}: {error})")
