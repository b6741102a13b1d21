"""Scores of reasoned answers, with a model whose answers are known, and with a real one."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data.schema import parse_record
from minillm.errors import UserError
from minillm.evaluation import evaluate_reasoning, pass_at_k, read_answer, reasoning
from minillm.evaluation.exact_match import Task
from minillm.inference import Completion, complete
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer, encode_chat, train_bpe

LIMITS = {"max_new_tokens": 12, "batch_size": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture
def say(monkeypatch):
    """Let the model answer each question with the given texts in turn; return what it was asked."""

    def say(texts: dict[str, list[str]]):
        asked, turns = [], {question: iter(answers) for question, answers in texts.items()}

        def answer(model, prompts, *, tokenizer, **options):
            asked.extend([tokenizer.decode(ids) for ids in prompts])
            said = []
            for prompt in asked[-len(prompts) :]:
                question = prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
                text = next(turns[question])
                said.append(Completion(ids=[0] * len(text), text=text, finish_reason="eos"))
            return said

        monkeypatch.setattr("minillm.evaluation.reasoning.complete", answer)
        return asked

    return say


MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=300))


def form(answer, thinking="so"):
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


def problem(question, expected, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return {"conversations": turns} | more


def test_right_answers_and_the_form_are_counted_apart(tokenizer, say):
    said = {"a": form(8), "bb": "8", "ccc": form(9), "dddd": "<think>7</think> eight", "e": form("8.0")}
    say({question: [text] for question, text in said.items()})
    records = [
        problem("a", form(8), task="sums", group="short"), problem("bb", form(8), task="sums", group="short"),
        problem("ccc", form(8), task="sums", group="long"), problem("dddd", form(8)), problem("e", form(8)),
    ]  # fmt: skip
    score = evaluate_reasoning(MODEL, tokenizer, records, **LIMITS)
    assert [answer.correct for answer in score.answers] == [[True], [True], [False], [False], [True]]
    assert [answer.well_formed for answer in score.answers] == [[True], [False], [True], [False], [True]]
    assert [answer.answers for answer in score.answers] == [["8"], ["8"], ["9"], ["eight"], ["8.0"]]
    assert (score.accuracy, score.format_adherence) == (3 / 5, 3 / 5)
    assert score.mean_tokens == sum(map(len, said.values())) / 5
    groups = {key: (part.accuracy, part.format_adherence) for key, part in score.groups.items()}
    assert groups == {("all", ""): (0.5, 0.5), ("sums", "long"): (0, 1), ("sums", "short"): (1, 0.5)}
    lines = [line.split() for line in score.table().splitlines()]
    assert lines[0] == ["task", "group", "of", "tokens", "exact", "format"]
    assert lines[-1] == ["all", "5", f"{score.mean_tokens:.1f}", "60.0%", "60.0%"]
    assert ["sums", "short", "2", f"{(len(form(8)) + 1) / 2:.1f}", "100.0%", "50.0%"] in lines
    values = score.as_dict()
    assert "pass_at" not in values
    assert values["groups"][1]["format_adherence"] == 1
    assert values["answers"][2]["texts"] == [form(9)]
    assert "answers" not in score.as_dict(answers=False)


def test_what_counts_as_the_right_answer(tokenizer, say):
    """``final``, else the answer in the last turn, else all of it."""
    say({question: ["8"] for question in "abcd"})
    records = [problem("a", form(9), final=" 8 "), problem("b", form(8)), problem("c", "8"), problem("d", "is 8")]
    records[0] = parse_record(records[0], 1)
    score = evaluate_reasoning(MODEL, tokenizer, records, **LIMITS)
    assert [answer.expected for answer in score.answers] == ["8", "8", "8", "is 8"]
    assert [answer.correct for answer in score.answers] == [[True], [True], [True], [False]]


@pytest.mark.parametrize("think", [True, False])
def test_tools_are_in_the_prompt(tokenizer, say, think):
    asked = say({"a": ["8"], "b": ["8"]})
    records = [problem("a", "8", tools=[{"name": "weigh"}]), problem("b", "8")]
    evaluate_reasoning(MODEL, tokenizer, records, **LIMITS, think=think)
    assert ["weigh" in prompt for prompt in asked] == [False, True]  # by length


def test_several_answers(tokenizer, say):
    say({"a": [form(7), form("8.0"), form(8), form(7), "8"], "b": [form(8)] * 3 + [form(7)] * 2, "c": ["8"] * 5})
    records = [problem(question, "8") for question in "abc"]
    score = evaluate_reasoning(MODEL, tokenizer, records, **LIMITS, n_samples=5, temperature=1.0)
    assert score.accuracy == (3 + 3 + 5) / 15
    assert score.format_adherence == (4 + 5 + 0) / 15
    # a: 7 and 8 twice each among those with the form, and 7 came first; c: none has the form
    assert [answer.majority_correct for answer in score.answers] == [False, True, False]
    assert score.majority_accuracy == 1 / 3
    assert list(score.pass_at) == [1, 2, 4, 5]
    assert score.pass_at[1] == pytest.approx(score.accuracy)
    assert score.pass_at[2] == pytest.approx((0.9 + 0.9 + 1) / 3)  # a, b: all pairs but the one of the two wrong
    assert score.as_dict()["pass_at"]["4"] == score.pass_at[4] == 1
    table = score.table().splitlines()
    assert table[0].split()[-5:] == ["majority", "pass@1", "pass@2", "pass@4", "pass@5"]
    assert table[-1].split()[-6:-3] == ["60.0%", "33.3%", "73.3%"]


@pytest.mark.parametrize(("n", "ks"), [(2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_pass_at_k_is_given_for_powers_of_two_and_all(tokenizer, say, n, ks):
    say({"a": [form(8)] * n})
    score = evaluate_reasoning(MODEL, tokenizer, [problem("a", "8")], **LIMITS, n_samples=n, temperature=1.0)
    assert list(score.pass_at) == ks


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_counting_all_subsets(n):
    for n_correct in range(n + 1):
        right = [True] * n_correct + [False] * (n - n_correct)
        for k in range(1, n + 1):
            chosen = list(itertools.combinations(right, k))
            assert pass_at_k(n, n_correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    for k in (0, n + 1):
        with pytest.raises(UserError, match=f"1 to {n}"):
            pass_at_k(n, 0, k)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([], None), (["8"], "8"), (["7", "8", "8"], "8"), (["7", "8"], "7"), (["8", "7", "7", "8"], "8"),
        (["7", "8", "8.0"], "8"), (["7", "7", "8", "8.0", "$8"], "8"), (["cat", "dog", " dog"], "dog"),
    ],
)  # fmt: skip
def test_the_majority(answers, chosen):
    assert reasoning.majority(answers) == chosen


def test_a_direct_answer_begins_behind_an_empty_thought(tokenizer, say):
    asked = say({"a": ["8\n</answer>"], "bb": ["8"], "ccc": ["7</answer> <answer>8</answer>"], "dddd": ["</answer>"]})
    records = [problem(question, form(8)) for question in ("a", "bb", "ccc", "dddd")]
    score = evaluate_reasoning(MODEL, tokenizer, records, **LIMITS, think=False)
    assert [answer.answers for answer in score.answers] == [["8"], ["8"], ["7"], [""]]
    assert [answer.well_formed for answer in score.answers] == [[True], [False], [False], [False]]
    assert score.answers[0].texts == ["<think>\n\n</think>\n<answer>\n8\n</answer>"]
    assert asked[0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n<answer>\n"


def test_the_tags_of_a_direct_answer_are_single_tokens(tokenizer):
    """Where the model is to answer at once it must see what it was trained on."""
    turns = [{"role": "user", "content": "a"}]
    task = Task([*turns, {"role": "assistant", "content": "8"}], {}, None)
    (prompt,) = reasoning._prompts(MODEL, tokenizer, [task], think=False)
    learned, _ = encode_chat(tokenizer, [*turns, {"role": "assistant", "content": form(8, thinking="")}])
    assert learned[: len(prompt)] == prompt
    newline = tokenizer.encode("\n")
    tags = [tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<answer>")]
    assert prompt[-7:] == [tags[0], *newline, *newline, tags[1], *newline, tags[2], *newline]


def test_a_template_that_opens_the_thinking_itself(tokenizer, say):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    foreign = Tokenizer({**tokenizer.files, "chat_template.jinja": template})
    asked = say({"a": ["so</think><answer>8</answer>"]})
    score = evaluate_reasoning(MODEL, foreign, [problem("a", "8")], **LIMITS)
    assert asked[0].endswith("assistant\n<think>\n")
    assert score.answers[0].texts == ["<think>\nso</think><answer>8</answer>"]
    assert score.answers[0].well_formed == [True]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (form(8), ("8", "so", True)), ("8", ("8", "", False)), ("<think>1+1", ("<think>1+1", "1+1", False)),
        ("<think>1+1</think> 2", ("2", "1+1", False)), ("", ("", "", False)),
    ],
)  # fmt: skip
def test_reading_an_answer(text, read):
    assert read_answer(text) == read


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Transformer(ModelConfig(**shape, max_position_embeddings=64, initializer_range=0.3)).eval()


RECORDS = [problem(question, "b") for question in ("a", "a much longer one", "some", "b")]


def test_greedy_answers_are_those_of_the_model(model, tokenizer):
    score = evaluate_reasoning(model, tokenizer, RECORDS, **LIMITS)
    for record, answer in zip(RECORDS, score.answers, strict=True):
        prompt, _ = encode_chat(tokenizer, record["conversations"][:1], add_generation_prompt=True)
        (done,) = complete(model, [prompt], max_new_tokens=12, temperature=0, tokenizer=tokenizer,
                           eos_token_id=tokenizer.end_ids)  # fmt: skip
        assert (answer.texts, answer.n_tokens) == ([done.text], [len(done.ids)])


def test_samples_depend_on_the_seed_and_not_on_the_batches(model, tokenizer):
    def texts(seed, batch_size, **more):
        generator, reports = torch.Generator().manual_seed(seed), []
        settings = {"max_new_tokens": 12, "batch_size": batch_size, "n_samples": 3, "temperature": 1.0} | more
        score = evaluate_reasoning(model, tokenizer, RECORDS, generator=generator, **settings,
                                   report=lambda *counts: reports.append(counts))  # fmt: skip
        assert reports == [(min(first + batch_size, 12), 12) for first in range(0, 12, batch_size)]
        return [answer.texts for answer in score.answers]

    assert texts(1, 1) == texts(1, 5) == texts(1, 12)
    assert texts(1, 5) != texts(2, 5)
    assert all(len(set(each)) == 3 for each in texts(1, 5))
    assert all(len(set(each)) == 1 for each in texts(1, 5, top_k=1))  # sampling options reach the model


def test_one_position_must_be_left_for_the_answer(model, tokenizer):
    n_more = 63 - len(encode_chat(tokenizer, problem("", "b")["conversations"][:1], add_generation_prompt=True)[0])
    (answer,) = evaluate_reasoning(model, tokenizer, [problem("x" * n_more, "b")], **LIMITS).answers
    assert answer.n_tokens == [1]
    with pytest.raises(UserError, match="record 0 has 64 tokens"):
        evaluate_reasoning(model, tokenizer, [problem("x" * (n_more + 1), "b")], **LIMITS)


def test_bad_records_and_numbers_are_named(model, tokenizer):
    for records, more, words in [
        ([], {}, "no records"),
        ([RECORDS[0], {"text": "a"}], {}, "record 1"),
        ([RECORDS[0], problem("a", "b", final=8)], {}, "record 1: final is 8; it must be the answer as a text"),
        ([problem("a", "b", final=" ")], {}, "record 0: final is ' '"),
        ([RECORDS[0], problem("x" * 60, "b")], {}, "record 1 has 7. tokens before its answer and the model reads 64"),
        (RECORDS, {"n_samples": 0}, "n_samples 0: must be at least 1"),
        (RECORDS, {"n_samples": 2}, "n_samples 2 at temperature 0.0: all would be equal"),
    ]:
        with pytest.raises(UserError, match=words):
            evaluate_reasoning(model, tokenizer, records, **LIMITS, **more)
