"""The suites: what each asks, how, and under which names its files are looked for.

Prompts are those of lm-evaluation-harness; the Chinese ones have no blank between ``答案：`` and the letter.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from minillm.errors import UserError
from minillm.evaluation.multiple_choice import EN, ZH, PromptFormat
from minillm.evaluation.questions import Question, unique_questions
from minillm.evaluation.suites import readers
from minillm.evaluation.suites.subjects_zh import CEVAL, CMMLU


class Layout(NamedTuple):
    """Where one release has a suite's files: patterns below the data directory, and their reader."""

    questions: str
    examples: str
    """For few-shot prompts; empty: the release has none."""
    read: Callable[[Path], Iterator[Question]]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite."""

    name: str
    title: str
    language: Literal["en", "zh"]
    style: Literal["letters", "texts", "blank", "number"]
    """As in ``multiple_choice``; ``number``: the model writes, and the number in its text is compared."""
    prompt: PromptFormat
    layouts: tuple[Layout, ...]
    """In order of preference."""


QUESTION_ANSWER = replace(EN, question="Question: {question}")
BARE = replace(EN, cue="")
GSM8K = PromptFormat(question="Question: {question}")
CMATH = PromptFormat(question="问题：{question}", cue="\n答案：", delimiter="")
MMLU = replace(EN, description="The following are multiple choice questions (with answers) about {subject}.\n\n")
CEVAL_PROMPT = replace(
    ZH,
    description="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
    subject_names=tuple(CEVAL.items()),
)
CMMLU_PROMPT = replace(
    ZH,
    description="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
    subject_names=tuple(CMMLU.items()),
)


def _ours(name: str, examples: str = "") -> Layout:
    return Layout(f"{name}.jsonl*", f"{examples}.jsonl*" if examples else "", readers.read_ours)


def _arc(kind: str) -> tuple[Layout, ...]:
    files = f"**/ARC-{kind}-Test.jsonl", f"**/ARC-{kind}-Train.jsonl"
    return (_ours(f"arc_{kind.lower()}"), Layout(*files, readers.read_arc))


_SUITES = (
    Suite(
        name="ceval",
        title="C-Eval",
        language="zh",
        style="letters",
        prompt=CEVAL_PROMPT,
        layouts=(
            _ours("ceval_val", "ceval_dev"),
            Layout("ceval*/val/*_val.csv", "ceval*/dev/*_dev.csv", readers.read_subject_csv),
        ),
    ),
    Suite(
        name="cmmlu",
        title="CMMLU",
        language="zh",
        style="letters",
        prompt=CMMLU_PROMPT,
        layouts=(
            _ours("cmmlu_test", "cmmlu_dev"),
            Layout("cmmlu*/test/*.csv", "cmmlu*/dev/*.csv", readers.read_subject_csv),
        ),
    ),
    Suite(
        name="gaokao_mcq",
        title="Gaokao",
        language="zh",
        style="letters",
        prompt=ZH,
        layouts=(_ours("gaokao_mcq"),),
    ),
    Suite(
        name="tal_math_zh",
        title="TAL-SCQ",
        language="zh",
        style="letters",
        prompt=ZH,
        layouts=(_ours("tal_math_zh"),),
    ),
    Suite(
        name="cmath",
        title="CMath",
        language="zh",
        style="number",
        prompt=CMATH,
        layouts=(
            Layout("**/cmath_test.jsonl*", "**/cmath_dev.jsonl*", readers.read_cmath),
            Layout("**/cmath_dev.jsonl*", "", readers.read_cmath),
        ),
    ),
    Suite(
        name="mmlu",
        title="MMLU",
        language="en",
        style="letters",
        prompt=MMLU,
        layouts=(
            _ours("mmlu_test", "mmlu_dev"),
            Layout("mmlu*/test/*_test.csv", "mmlu*/dev/*_dev.csv", readers.read_mmlu_csv),
            Layout("mmlu*/data/test/*_test.csv", "mmlu*/data/dev/*_dev.csv", readers.read_mmlu_csv),
        ),
    ),
    Suite(
        name="arc_easy",
        title="ARC-Easy",
        language="en",
        style="texts",
        prompt=QUESTION_ANSWER,
        layouts=_arc("Easy"),
    ),
    Suite(
        name="arc_challenge",
        title="ARC-Challenge",
        language="en",
        style="texts",
        prompt=QUESTION_ANSWER,
        layouts=_arc("Challenge"),
    ),
    Suite(
        name="openbookqa",
        title="OpenBookQA",
        language="en",
        style="texts",
        prompt=BARE,
        layouts=(
            _ours("openbookqa"),
            Layout("**/Data/Main/test.jsonl", "**/Data/Main/train.jsonl", readers.read_arc),
            Layout("openbookqa/test.jsonl", "openbookqa/train.jsonl", readers.read_arc),
        ),
    ),
    Suite(
        name="piqa",
        title="PIQA",
        language="en",
        style="texts",
        prompt=QUESTION_ANSWER,
        layouts=(
            _ours("piqa"),
            Layout("piqa/valid.jsonl", "piqa/train.jsonl", readers.read_piqa),
            Layout("**/physicaliqa*/dev.jsonl", "**/physicaliqa*/train.jsonl", readers.read_piqa),
        ),
    ),
    Suite(
        name="winogrande",
        title="WinoGrande",
        language="en",
        style="blank",
        prompt=EN,
        layouts=(
            _ours("winogrande"),
            Layout("**/winogrande*/dev.jsonl", "**/winogrande*/train_xl.jsonl", readers.read_winogrande),
        ),
    ),
    Suite(
        name="hellaswag",
        title="HellaSwag",
        language="en",
        style="texts",
        prompt=BARE,
        layouts=(
            _ours("hellaswag"),
            Layout("**/hellaswag_val.jsonl", "**/hellaswag_train.jsonl", readers.read_hellaswag),
        ),
    ),
    Suite(
        name="gsm8k",
        title="GSM8K",
        language="en",
        style="number",
        prompt=GSM8K,
        layouts=(
            _ours("gsm8k_test", "gsm8k_train"),
            Layout("gsm8k/test.jsonl", "gsm8k/train.jsonl", readers.read_gsm8k),
            Layout("grade_school_math/data/test.jsonl", "grade_school_math/data/train.jsonl", readers.read_gsm8k),
        ),
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
FOLDERS = ("", "eval", "nc")  # of the data directory, in which the patterns are looked for


def choose_suites(names: str) -> list[Suite]:
    """Return the suites of ``zh``, ``en``, ``all``, or of names with commas between them.

    Raises:
        UserError: an unknown name, or none.
    """
    chosen: dict[str, Suite] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        matching = [suite for suite in _SUITES if name in (suite.name, suite.language, "all")]
        if not matching:
            raise UserError(f"there is no suite {name!r}; choose from zh, en, all, {', '.join(SUITES)}")
        chosen |= {suite.name: suite for suite in matching}
    if not chosen:
        raise UserError(f"no suite in {names!r}: give zh, en, all, or some of {', '.join(SUITES)}")
    return list(chosen.values())


def find_suite(name: str) -> Suite:
    """Return the one suite of this name.

    Raises:
        UserError: an unknown name, or one that means several suites.
    """
    if name not in SUITES:
        choose_suites(name)  # an unknown name is an error that lists the known ones
        raise UserError(f"one suite is needed, and {name!r} means several: {', '.join(SUITES)}")
    return SUITES[name]


class SuiteFiles(NamedTuple):
    """The files of a suite in a data directory."""

    questions: list[Path]
    examples: list[Path]
    layout: Layout


def find_files(suite: Suite, data_dir: str | Path) -> SuiteFiles:
    """Return the files of the first layout that the directory has.

    Raises:
        UserError: none; the message lists the names that were looked for.
    """
    data_dir = Path(data_dir)
    for layout in suite.layouts:
        for folder in FOLDERS:
            questions = _matching(data_dir / folder, layout.questions)
            if questions:
                return SuiteFiles(questions, _matching(data_dir / folder, layout.examples), layout)
    names = ", ".join(layout.questions for layout in suite.layouts)
    folders = " and ".join(str(data_dir / folder) for folder in FOLDERS)
    how = f", or try python dataset/download.py {suite.name}" if len(suite.layouts) > 1 else ""
    raise UserError(
        f"no files of the suite {suite.name}: looked for {names} in {folders}; give their directory (--suite_dir){how}"
    )


def suites_with_files(names: str, data_dir: str | Path) -> tuple[list[Suite], str]:
    """Return the suites, and a note: of zh, en and all, those without files are left out, and the note names them.

    Raises:
        UserError: an unknown suite; no files of one that was named, or of any.
    """
    chosen, errors = [], {}
    for suite in choose_suites(names):
        try:
            find_files(suite, data_dir)
            chosen.append(suite)
        except UserError as error:
            if suite.name in map(str.strip, names.split(",")):
                raise
            errors[suite.name] = error
    if not chosen:
        raise UserError(f"--suite_dir {data_dir} has no files of any suite; {next(iter(errors.values()))}")
    how = "dataset/download.py --list says which can be downloaded"
    return chosen, f"no files in {data_dir} of: {', '.join(errors)} ({how})" if errors else ""


def read_suite(
    suite: Suite, data_dir: str | Path, *, with_examples: bool = True
) -> tuple[list[Question], list[Question], SuiteFiles]:
    """Return the questions, the examples for few-shot prompts (which may be none), and the files.

    Raises:
        UserError: no such files, or a wrong record in them.
    """
    files = find_files(suite, data_dir)
    questions, examples = (
        unique_questions(question for path in paths for question in files.layout.read(path))
        for paths in (files.questions, files.examples if with_examples else [])
    )
    if not questions:
        names = ", ".join(map(str, files.questions))
        raise UserError(f"{names}: no questions of {suite.name} in there; copy or download it again")
    if wrong := next((q for q in [*questions, *examples] if bool(q.choices) == (suite.style == "number")), None):
        raise UserError(f"{wrong.where}: the suite {suite.name} needs " + ("final" if wrong.choices else "choices"))
    if wrong := next((q for q in [*questions, *examples] if not (q.choices or re.search(r"\d", q.final))), None):
        raise UserError(f"{wrong.where}: final is {wrong.final!r}; the suite {suite.name} compares numbers in digits")
    return questions, examples, files


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match, sorted; of ``x.jsonl*`` only x.jsonl and x.jsonl.gz, and not both."""
    if not pattern or not folder.is_dir():
        return []
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not pattern.endswith(".jsonl*"):
        return paths
    paths = [path for path in paths if path.name.endswith((".jsonl", ".jsonl.gz"))]
    return paths[:1]
