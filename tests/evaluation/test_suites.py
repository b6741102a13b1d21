"""Suites: the files of the original releases and ours, their prompts, their scores, and what is wrong with them."""

import csv
import gzip
import json
import sys

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation import multiple_choice, run_suite
from minillm.evaluation.exact_match import greedy_texts
from minillm.evaluation.multiple_choice import choice_texts
from minillm.evaluation.suites import SUITES, choose_suites, random_model
from minillm.evaluation.suites.numbers import extract_number, measure_numbers
from minillm.evaluation.suites.readers import clean_hellaswag
from minillm.evaluation.suites.run import evenly_spaced
from minillm.evaluation.suites.table import find_files, read_suite
from minillm.inference import generate
from minillm.model import Transformer
from minillm.tokenizer import train_bpe
from tests.evaluation.suite_files import CEVAL_HEAD, EXPECTED, arc, hellaswag, make_originals, write_csv, write_lines


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_originals(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the answer is 7"]), vocab_size=275)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 275, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Transformer(ModelConfig(**shape, max_position_embeddings=512, initializer_range=0.3)).double().eval()


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_the_releases(originals, name):
    questions, _, files = read_suite(SUITES[name], originals)
    found = [(q.question, q.choices, q.answer if q.choices else q.final, q.subject) for q in questions]
    assert found == EXPECTED[name]
    assert len({question.id for question in questions}) == len(questions)
    assert all(path.is_relative_to(originals) for path in files.questions)


def test_every_suite_but_the_local_ones_has_a_release():
    assert set(SUITES) - set(EXPECTED) == {"gaokao_mcq", "tal_math_zh"}


def prompt_of(name, folder, *, n_shot=0, number=0):
    questions, examples, _ = read_suite(SUITES[name], folder)
    question = questions[number]
    shots = [example for example in examples if example.subject == question.subject][:n_shot]
    return choice_texts(question, shots, style=SUITES[name].style, prompt=SUITES[name].prompt)


def test_prompts(originals):
    """The words of lm-evaluation-harness's tasks (0.4.13); only the Chinese answers have no blank in front."""
    assert prompt_of("mmlu", originals, n_shot=1)[1] == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Example\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "A cell, is\nA. one\nB. two\nC. three, or\nD. four\nAnswer:",
        " B",
    )
    assert prompt_of("cmmlu", originals)[3] == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n稻？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
        "D",
    )
    assert prompt_of("ceval", originals, n_shot=1, number=2)[0] == (
        "以下是中国关于医师资格的单项选择题，请选出其中的正确答案。\n\n"
        "例题？\nA. a\nB. b\nC. c\nD. d\n答案：B\n\n药？\nA. 一\nB. 二\nC. 三\nD. 四\n答案：",
        "A",
    )
    assert prompt_of("arc_easy", originals)[2] == ("Question: Which?\nAnswer:", " c")
    assert prompt_of("piqa", originals)[0] == ("Question: Boil an egg\nAnswer:", " in water")
    assert prompt_of("openbookqa", originals)[0] == ("The sun is", " hot")
    assert prompt_of("winogrande", originals) == [
        ("Ann met Eve because Ann", " was late."),
        ("Ann met Eve because Eve", " was late."),
    ]
    assert prompt_of("hellaswag", originals)[1] == (EXPECTED["hellaswag"][0][0], " sings a song.")


def test_cleaning_of_hellaswag():
    assert clean_hellaswag(" [header] How to [title] Do it.  Now [step] ") == "How to. Do it. Now"


@pytest.mark.parametrize("name", EXPECTED)
def test_run_suite(originals, model, tokenizer, name):
    score = run_suite(name, model, tokenizer, data_dir=originals, batch_size=2, max_new_tokens=8)
    assert [(q.subject) for q in score.questions] == [subject for *_, subject in EXPECTED[name]]
    values = score.as_dict()
    assert values["n"] == len(EXPECTED[name])
    if SUITES[name].style == "number":
        assert values["chance"] == 0
    else:
        records = [
            {"id": str(n), "question": question, "choices": choices, "answer": answer, "subject": subject}
            for n, (question, choices, answer, subject) in enumerate(EXPECTED[name])
        ]
        expected = multiple_choice(model, tokenizer, records, style=SUITES[name].style, prompt=SUITES[name].prompt)
        for one, other in zip(score.questions, expected.questions, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, rel=1e-11)


def test_our_files_come_first_and_may_be_compressed(originals, model, tokenizer, tmp_path):
    records = [
        {"id": f"z{n}", "question": f"q{n}?", "choices": ["a", "b", "c"], "answer": n % 3, "subject": "s"}
        for n in range(6)
    ]
    make_originals(tmp_path)
    (tmp_path / "nc").mkdir()
    with gzip.open(tmp_path / "nc/gaokao_mcq.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, records)))
    score = run_suite("gaokao_mcq", model, tokenizer, data_dir=tmp_path, n_shot=2)
    assert [question.id for question in score.questions] == [f"z{n}" for n in range(6)]
    assert score.n_shot == 2  # without a file of examples, these are the suite's other questions
    some = run_suite("gaokao_mcq", model, tokenizer, data_dir=tmp_path, limit=3)
    assert [question.id for question in some.questions] == ["z0", "z2", "z4"]
    write_lines(tmp_path / "mmlu_test.jsonl", records)
    assert len(run_suite("mmlu", model, tokenizer, data_dir=tmp_path).questions) == 6


def test_evenly_spaced():
    assert evenly_spaced(list(range(7)), 3) == [0, 2, 4]
    assert evenly_spaced(list(range(3)), 5) == [0, 1, 2]


def test_names():
    assert [suite.name for suite in choose_suites("zh")] == ["ceval", "cmmlu", "gaokao_mcq", "tal_math_zh", "cmath"]
    assert len(choose_suites("all")) == len(SUITES)
    assert [suite.name for suite in choose_suites("piqa, mmlu,piqa")] == ["piqa", "mmlu"]
    for names in ("mmlu,unknown", "", ","):
        with pytest.raises(UserError, match="mmlu"):
            choose_suites(names)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 2*9 = 18.", "18"),
        ("1 + 1\n#### 1,234.50\n\nQuestion: 5", "1,234.50"),
        ("<think>\n5\n</think>\n<answer>\n7 apples\n</answer>", "7"),
        ("答案是3，共4个。", "4"),
        ("一共1，234元", "1,234"),
        ("It is −2.", "-2"),
        ("about 1/2, or so", "1/2"),
        ("in 3, 4, ", "4"),
        ("no idea", ""),
        ("####", ""),
    ],
)
def test_extract_number(text, number):
    assert extract_number(text) == number


class Scripted:
    """What generates the given texts, in any order of the prompts."""

    def __init__(self, model, answers):
        self.model, self.answers, self.prompts = model, answers, []

    def __call__(self, model, prompts, *, tokenizer, **_):
        from minillm.inference import Completion

        texts = [tokenizer.decode(ids[1:]) for ids in prompts]
        self.prompts += texts
        answers = [self.answers[max(self.answers, key=text.rfind)] for text in texts]
        return [Completion(ids=[1], text=answer, finish_reason="stop") for answer in answers]


def test_numbers_are_compared(originals, model, tokenizer, monkeypatch):
    scripted = Scripted(model, {"3个加4个": "是 7.0 个", "8除以2": "是 5"})
    monkeypatch.setattr(sys.modules[greedy_texts.__module__], "complete", scripted)
    score = run_suite("cmath", model, tokenizer, data_dir=originals, n_shot=1)
    assert [question.correct for question in score.questions] == [True, False]
    assert (score.accuracy, score.subject_average) == (0.5, 0.5)
    assert [question.answer for question in score.questions] == ["7.0", "5"]
    assert set(scripted.prompts) == {  # the example is the other question
        "问题：8除以2？\n答案：4\n\n问题：3个加4个？\n答案：",
        "问题：3个加4个？\n答案：7\n\n问题：8除以2？\n答案：",
    }


def test_prompts_and_solutions_of_gsm8k(originals, model, tokenizer, monkeypatch):
    scripted = Scripted(model, {"2*9": "#### 24"})
    monkeypatch.setattr(sys.modules[greedy_texts.__module__], "complete", scripted)
    score = run_suite("gsm8k", model, tokenizer, data_dir=originals, n_shot=2)
    assert score.accuracy == 1
    assert scripted.prompts == [
        "Question: 0+1?\nAnswer: It is 1.\n#### 1\n\nQuestion: 1+1?\nAnswer: It is 2.\n#### 2\n\n"
        "Question: 2*9 and 6?\nAnswer:"
    ]


def test_greedy_answers_and_long_prompts(originals, model, tokenizer):
    questions, _, _ = read_suite(SUITES["cmath"], originals)
    score = measure_numbers(model, tokenizer, questions, prompt=SUITES["cmath"].prompt, max_new_tokens=6)
    for question, answer in zip(questions, score.questions, strict=True):
        ids = tokenizer.open_document(tokenizer.encode(f"问题：{question.question}\n答案："))
        new = generate(model, [ids], max_new_tokens=6, temperature=0, eos_token_id=tokenizer.end_ids)[0]
        whole = tokenizer.decode(new, skip_special_tokens=True)
        assert whole.strip().startswith(answer.text) or answer.text in whole
    torch.manual_seed(0)
    shape = {"vocab_size": 275, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    short = Transformer(ModelConfig(**shape, max_position_embeddings=24)).eval()
    score = measure_numbers(short, tokenizer, questions, prompt=SUITES["cmath"].prompt, max_new_tokens=100, chat=True)
    assert (score.n_truncated, score.max_new_tokens) == (2, 12)


# ---- an untrained model --------------------------------------------------------------------------


def test_an_untrained_model_has_the_same_shape_and_its_own_seed(model):
    state = torch.random.get_rng_state()
    one, again, other = random_model(model, seed=1), random_model(model, seed=1), random_model(model, seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert next(one.parameters()).dtype == torch.float64
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [m.state_dict()[name] for m in (one, again, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert not one.training


# ---- wrong files ---------------------------------------------------------------------------------

FOUR = {"id": "a", "question": "q?", "choices": ["1", "2", "3", "4"], "answer": 0}


def wrong(folder, name, records):
    write_lines(folder / name, records)


@pytest.mark.parametrize(
    ("suite", "name", "records", "words"),
    [
        ("mmlu", "mmlu_test.jsonl", [FOUR, FOUR | {"id": "b", "answer": 5}], ["line 2", "answer 5 with 4 choices"]),
        ("mmlu", "mmlu_test.jsonl", [FOUR, FOUR], ["line 2", "'a'", "line 1", "unique"]),
        ("mmlu", "mmlu_test.jsonl", [FOUR | {"choices": ["1", ""]}], ["line 1", "choice 1 is empty"]),
        ("mmlu", "mmlu_test.jsonl", [FOUR, "{"], ["line 2", "broken JSON"]),
        ("mmlu", "mmlu_test.jsonl", ["[]"], ["line 1", "list"]),
        ("mmlu", "mmlu_test.jsonl", [""], ["mmlu_test.jsonl", "no questions"]),
        ("mmlu", "mmlu_test.jsonl", [{"question": "1+1", "final": "2"}], ["line 1", "needs choices"]),
        ("mmlu", "mmlu_test.jsonl", ["[" * 100_000], ["line 1", "broken JSON"]),
        ("mmlu", "mmlu_test.jsonl", ['{"question": "\\ud800", "choices": ["1", "2"]}'], ["line 1", "lone surrogate"]),
        ("gsm8k", "gsm8k_test.jsonl", [FOUR], ["line 1", "needs final"]),
        ("gsm8k", "gsm8k_test.jsonl", [{"question": "a", "final": "many"}], ["line 1", "'many'", "digits"]),
        ("cmath", "cmath_dev.jsonl", [{"question": "a", "golden": [7]}], ["line 1", "final (a text)"]),
        ("gsm8k", "gsm8k_test.jsonl", [{"conversations": [{"content": "a"}]}], ["line 1", "conversations"]),
        ("gsm8k", "gsm8k/test.jsonl", [{"question": "a", "answer": "5"}], ["line 1", "####"]),
        ("arc_easy", "ARC-Easy-Test.jsonl", [arc(1, "q", ["a", "b"], "C")], ["line 1", "'C'", "A, B"]),
        ("arc_easy", "ARC-Easy-Test.jsonl", [FOUR], ["line 1", "question.stem"]),
        ("piqa", "piqa/valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}], ["valid-labels.lst", "no such file"]),
        ("winogrande", "winogrande/dev.jsonl", [{"sentence": "_ a"}], ["line 1", "answer None"]),
        ("hellaswag", "hellaswag_val.jsonl", [{"ctx_a": "a"}], ["line 1", "endings"]),
        ("hellaswag", "hellaswag_val.jsonl", [hellaswag(1) | {"endings": "abcd"}], ["line 1", "endings"]),
        ("hellaswag", "hellaswag_val.jsonl", [hellaswag(1.7)], ["line 1", "1.7"]),
    ],
)
def test_wrong_records_are_named_with_their_line(model, tokenizer, tmp_path, suite, name, records, words):
    write_lines(tmp_path / name, records)
    with pytest.raises(UserError) as error:
        run_suite(suite, model, tokenizer, data_dir=tmp_path)
    assert all(word in str(error.value) for word in [*words, str(tmp_path)] if word), error.value


def test_wrong_tables(model, tokenizer, tmp_path):
    for name, suite, rows, words in [
        ("ceval/val/law_val.csv", "ceval", [CEVAL_HEAD, [0, "q", 1, 2, 3, 4, "E"]], ["line 2", "'E'"]),
        ("ceval/val/law_val.csv", "ceval", [CEVAL_HEAD, [0, "q", 1, 2, 3, 4, "BC"]], ["line 2", "'BC'"]),
        ("ceval/val/law_val.csv", "ceval", [CEVAL_HEAD[:-1], [0, "q", 1, 2, 3, 4]], ["no answer"]),
        ("ceval/val/law_val.csv", "ceval", [CEVAL_HEAD, [0, "q", 1, 2, 3]], ["line 2"]),
        ("mmlu/test/law_test.csv", "mmlu", [["q", 1, 2, 3, 4, "A"], ["q", 1]], ["line 2", "2 columns"]),
    ]:
        write_csv(tmp_path / name, rows)
        with pytest.raises(UserError) as error:
            run_suite(suite, model, tokenizer, data_dir=tmp_path)
        assert all(word in str(error.value) for word in words), error.value
    (tmp_path / "ceval/val/law_val.csv").write_bytes(b"id,question,A,B,C,D,answer\n0,\xff,1,2,3,4,A\n")
    with pytest.raises(UserError, match="line 2: not UTF-8 text"):
        run_suite("ceval", model, tokenizer, data_dir=tmp_path)


def test_files_of_other_editors(tmp_path):
    """A byte order mark and Windows' line ends are no content; UTF-16 is named."""
    make_originals(tmp_path)
    for name in ("piqa", "gsm8k", "ceval"):
        expected, *_ = read_suite(SUITES[name], tmp_path)
        for path in [*find_files(SUITES[name], tmp_path).questions, *tmp_path.glob("piqa/*.lst")]:
            lines = path.read_bytes().replace(b"\r\n", b"\n")
            path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
        found, *_ = read_suite(SUITES[name], tmp_path)
        assert [(q.id, q.choices, q.answer, q.final) for q in found] == [
            (q.id, q.choices, q.answer, q.final) for q in expected
        ]
    write_lines(tmp_path / "mmlu_test.jsonl", [FOUR | {"id": None}, FOUR | {"id": None, "question": "b?"}])
    assert len({question.id for question in read_suite(SUITES["mmlu"], tmp_path)[0]}) == 2
    for name in ("gsm8k/test.jsonl", "piqa/valid-labels.lst", "ceval-exam/val/law_val.csv"):
        (tmp_path / name).write_text((tmp_path / name).read_text(encoding="utf-8"), encoding="utf-16")
        with pytest.raises(UserError, match="is UTF-16 text"):
            read_suite(SUITES[name.split("/")[0].split("-")[0]], tmp_path)


def test_damaged_files(model, tokenizer, tmp_path):
    whole = gzip.compress(json.dumps(FOUR).encode() * 100)
    for damaged in (whole[: len(whole) // 2], whole[:30] + b"\xff\x00" + whole[32:]):
        (tmp_path / "mmlu_test.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            run_suite("mmlu", model, tokenizer, data_dir=tmp_path)
    (tmp_path / "mmlu_test.jsonl.gz").unlink()
    make_originals(tmp_path)
    before = csv.field_size_limit(30)
    write_csv(tmp_path / "ceval-exam/val/law_val.csv", [CEVAL_HEAD, [0, "q" * 40, 1, 2, 3, 4, "A"]])
    with pytest.raises(UserError, match=r"law_val.csv, line 2: broken table \(field larger than field limit"):
        run_suite("ceval", model, tokenizer, data_dir=tmp_path)
    csv.field_size_limit(before)
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n")
    with pytest.raises(UserError, match=r"1 labels and .* 2 questions"):
        run_suite("piqa", model, tokenizer, data_dir=tmp_path)


def test_nothing_to_measure(model, tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        run_suite("ceval", model, tokenizer, data_dir=tmp_path)
    for word in ("ceval_val.jsonl", "val/*_val.csv", str(tmp_path), "dataset/download.py ceval"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="no suite 'unknown'"):
        run_suite("unknown", model, tokenizer, data_dir=tmp_path)
    with pytest.raises(UserError, match="several"):
        run_suite("zh", model, tokenizer, data_dir=tmp_path)
    make_originals(tmp_path)
    with pytest.raises(UserError, match=r"^--n_shot 2: .*: lower --n_shot"):
        run_suite("ceval", model, tokenizer, data_dir=tmp_path, n_shot=2)
    with pytest.raises(UserError, match="limit -1"):
        run_suite("ceval", model, tokenizer, data_dir=tmp_path, limit=-1)
