"""Small files in the format of each original release, with the questions that they hold."""

import csv
import json
from pathlib import Path

CEVAL_HEAD = ["id", "question", "A", "B", "C", "D", "answer"]


def write_csv(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def arc(number: int, stem: str, choices: list[str], key: str, labels: str = "ABCDE") -> dict:
    labelled = [{"text": text, "label": label} for text, label in zip(choices, labels, strict=False)]
    return {"id": f"Mercury_{number}", "question": {"stem": stem, "choices": labelled}, "answerKey": key}


def hellaswag(label: int) -> dict:
    return {
        "ind": 4, "activity_label": "Washing dishes",
        "ctx_a": "[header] How to wash [title] Fill the sink. [step] Use soap.",
        "ctx_b": "the man", "ctx": "unused", "split_type": "indomain", "label": label,
        "endings": ["washes a plate.", "[substeps] sings  a song.", "sleeps.", "eats [title] the soap."],
    }  # fmt: skip


def make_originals(folder: Path) -> None:
    """Write every suite as its release has it: two or three questions each, and examples where it has some."""
    row = [0, "下列正确的是，____。", "甲", "乙,丙", "丁", "戊", "C"]
    write_csv(folder / "ceval-exam/val/law_val.csv", [CEVAL_HEAD, row, [1, "多行\n题目", "1", "2", "3", "4", "D"]])
    write_csv(folder / "ceval-exam/val/physician_val.csv", [CEVAL_HEAD, [0, "药？", "一", "二", "三", "四", "A"]])
    dev = [[*CEVAL_HEAD, "explanation"], [0, "例题？", "a", "b", "c", "d", "B", "因为"]]
    write_csv(folder / "ceval-exam/dev/law_dev.csv", dev)
    write_csv(folder / "ceval-exam/dev/physician_dev.csv", dev)
    head = ["", "Question", "A", "B", "C", "D", "Answer"]
    write_csv(folder / "cmmlu/test/agronomy.csv", [head, [0, "稻？", "甲", "乙", "丙", "丁", "D"]])
    write_csv(folder / "cmmlu/dev/agronomy.csv", [head, [0, "麦？", "甲", "乙", "丙", "丁", "A"]])
    rows = [["A cell, is", "one", "two", "three, or", "four", "C"], ["None", "N/A", "2", "3", "4", "A"]]
    write_csv(folder / "mmlu/data/test/high_school_biology_test.csv", rows)
    write_csv(folder / "mmlu/data/dev/high_school_biology_dev.csv", [["Example", "1", "2", "3", "4", "B"]])
    for kind in ("Easy", "Challenge"):
        easy = [arc(1, "Which?", ["a", "b", "c"], "C"), arc(2, "What?", ["x", "y", "z", "w"], "2", "1234")]
        write_lines(folder / f"ARC-V1-Feb2018-2/ARC-{kind}/ARC-{kind}-Test.jsonl", easy)
    write_lines(folder / "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", [arc(7, "The sun is", ["hot", "cold"], "A")])
    goals = [{"goal": "Boil an egg", "sol1": "in water", "sol2": "in air"}, {"goal": "g", "sol1": "s", "sol2": "t"}]
    write_lines(folder / "piqa/valid.jsonl", goals)
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n")
    sentence = {"qID": "3FCO", "sentence": "Ann met Eve because _ was late.", "option1": "Ann", "option2": "Eve"}
    write_lines(folder / "winogrande_1.1/dev.jsonl", [sentence | {"answer": "2"}])
    write_lines(folder / "hellaswag/hellaswag_val.jsonl", [hellaswag(1)])
    sums = [{"question": "2*9 and 6?", "answer": "She has 2*9=<<2*9=18>>18.\nAnd 6: 24.\n#### 24"}]
    write_lines(folder / "gsm8k/test.jsonl", sums)
    train = [{"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(3)]
    write_lines(folder / "gsm8k/train.jsonl", train)
    grades = [{"grade": 1, "question": "3个加4个？", "golden": "7"}, {"grade": 2, "question": "8除以2？", "golden": 4}]
    write_lines(folder / "cmath/cmath_dev.jsonl", grades)


# Suite: (question, choices, answer or final, subject) in order.
EXPECTED = {
    "ceval": [
        ("下列正确的是，____。", ("甲", "乙,丙", "丁", "戊"), 2, "law"),
        ("多行\n题目", ("1", "2", "3", "4"), 3, "law"),
        ("药？", ("一", "二", "三", "四"), 0, "physician"),
    ],
    "cmmlu": [("稻？", ("甲", "乙", "丙", "丁"), 3, "agronomy")],
    "mmlu": [
        ("A cell, is", ("one", "two", "three, or", "four"), 2, "high_school_biology"),
        ("None", ("N/A", "2", "3", "4"), 0, "high_school_biology"),
    ],
    "arc_easy": [("Which?", ("a", "b", "c"), 2, "science"), ("What?", ("x", "y", "z", "w"), 1, "science")],
    "arc_challenge": [("Which?", ("a", "b", "c"), 2, "science"), ("What?", ("x", "y", "z", "w"), 1, "science")],
    "openbookqa": [("The sun is", ("hot", "cold"), 0, "science")],
    "piqa": [("Boil an egg", ("in water", "in air"), 0, "physical"), ("g", ("s", "t"), 1, "physical")],
    "winogrande": [("Ann met Eve because _ was late.", ("Ann", "Eve"), 1, "coreference")],
    "hellaswag": [
        (
            "Washing dishes: How to wash. Fill the sink. Use soap. The man",
            ("washes a plate.", "sings a song.", "sleeps.", "eats. the soap."),
            1,
            "indomain",
        )
    ],
    "gsm8k": [("2*9 and 6?", (), "24", "all")],
    "cmath": [("3个加4个？", (), "7", "grade 1"), ("8除以2？", (), "4", "grade 2")],
}
