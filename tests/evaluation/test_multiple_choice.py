"""Multiple choice against one forward pass per scored token, with all logits."""

import math
from dataclasses import replace

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation import likelihood, multiple_choice
from minillm.evaluation.likelihood import encode_answers
from minillm.evaluation.multiple_choice import EN, ZH, choice_texts
from minillm.evaluation.questions import parse_question
from minillm.lora import apply_lora
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

CORPUS = [
    "答案：A 答案：B",
    "Answer: A\nQuestion: the cat sat on the mat",
    "你好 你好",
    "Sarah was a better surgeon",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(CORPUS), vocab_size=300)


def tiny_model(**more):
    shape = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = ModelConfig(**shape | {"max_position_embeddings": 160, "initializer_range": 0.3} | more)
    return Transformer(config).double().eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def record(number, question, choices, answer, subject="all"):
    return {"id": f"q{number}", "question": question, "choices": choices, "answer": answer, "subject": subject}


RECORDS = [
    record(0, "who sat?", ["the cat", "the cat sat on the mat", "a"], 0, "cats"),
    record(1, "你好吗？", ["好", "你好 你好", "B", "the mat", "答案"], 4, "zh"),
    record(2, "where?", ["on the mat", "on the cat"], 1, "cats"),
    record(3, "x", ["Sarah", "Sarah was", "Sarah was a better surgeon"], 2, "people"),
]
BLANKS = [
    record(0, "Sarah was a better surgeon than Maria so _ got the easier cases.", ["Sarah", "Maria"], 1),
    record(1, "the cat sat on the mat because _ was tired", ["the cat", "it"], 0),
]


def slow(model, tokenizer, prompt, answer):
    """Σ log p of the tokens from the first that differs from the prompt's, each from a forward pass of its own."""
    before, ids = ([tokenizer.bos_token_id, *tokenizer.encode(text)] for text in (prompt, prompt + answer))
    first = 0
    while first < len(before) and first < len(ids) - 1 and before[first] == ids[first]:
        first += 1
    total = 0.0
    for place in range(first, len(ids)):
        with torch.no_grad():
            total += model(torch.tensor([ids[:place]]))[0, -1].log_softmax(-1)[ids[place]].item()
    return total, len(ids) - first


def prompt_of(item, style, zh):
    letters = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCDE", item["choices"], strict=False))
    cue = "\n答案：" if zh else "\nAnswer:"
    return item["question"] + (letters if style == "letters" else "") + cue


def check(score, expected):
    assert [question.id for question in score.questions] == [f"q{n}" for n in range(len(expected))]
    for question, answers in zip(score.questions, expected, strict=True):
        sums, counts = zip(*answers, strict=True)
        assert question.log_likelihoods == pytest.approx(list(sums), rel=1e-11)
        assert question.n_tokens == list(counts)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("style", ["letters", "texts"])
@pytest.mark.parametrize("zh", [False, True])
def test_equals_the_slow_formula(model, tokenizer, style, zh, batch_size):
    score = multiple_choice(
        model, tokenizer, iter(RECORDS), style=style, prompt=ZH if zh else EN, batch_size=batch_size
    )
    blank = "" if zh else " "
    expected = []
    for item in RECORDS:
        answers = list("ABCDE")[: len(item["choices"])] if style == "letters" else item["choices"]
        prompt = prompt_of(item, style, zh)
        expected.append([slow(model, tokenizer, prompt, blank + answer) for answer in answers])
    check(score, expected)
    choices = [max(range(len(answers)), key=lambda n, a=answers: a[n][0]) for answers in expected]
    right = [choice == item["answer"] for choice, item in zip(choices, RECORDS, strict=True)]
    assert score.accuracy == sum(right) / 4
    assert score.chance == pytest.approx((1 / 3 + 1 / 5 + 1 / 2 + 1 / 3) / 4)
    by_subject = [(right[0] + right[2]) / 2, float(right[3]), float(right[1])]
    assert [score.accuracy for score in score.subjects] == by_subject  # cats, people, zh
    assert score.subject_average == pytest.approx(sum(by_subject) / 3)
    if style == "texts":
        lengths = [[len(choice.encode()) for choice in item["choices"]] for item in RECORDS]
        per_byte = [
            max(range(len(a)), key=lambda n, a=a, b=b: a[n][0] / b[n]) for a, b in zip(expected, lengths, strict=True)
        ]
        n_right = sum(choice == item["answer"] for choice, item in zip(per_byte, RECORDS, strict=True))
        assert score.accuracy_normalized == n_right / 4
        per_token = [max(range(len(a)), key=lambda n, a=a: a[n][0] / a[n][1]) for a in expected]
        n_right = sum(choice == item["answer"] for choice, item in zip(per_token, RECORDS, strict=True))
        assert score.accuracy_per_token == n_right / 4


def test_a_blank_is_filled_and_the_rest_is_scored(model, tokenizer):
    score = multiple_choice(model, tokenizer, BLANKS, style="blank")
    expected = []
    for item in BLANKS:
        start, end = item["question"].split("_")
        expected.append([slow(model, tokenizer, start + choice, end) for choice in item["choices"]])
    check(score, expected)
    assert score.accuracy == score.accuracy_normalized == score.accuracy_per_token  # the same answer for each choice


def test_prompt_and_answer_that_merge_into_one_token(model):
    """``答案甲`` is one token: behind the length of the prompt's ids there is nothing, so a score would be 0."""
    tokenizer = train_bpe(iter(["答案甲 答案乙"] * 50), vocab_size=278)
    prompt = "x\n答案"
    before = tokenizer.encode(prompt)
    for choice, n in (("甲", 1), ("乙", 1), ("Z", 1), ("甲甲", 3)):
        whole = tokenizer.encode(prompt + choice)
        merges = choice != "Z"
        assert (whole[: len(before)] != before) == merges
        ((answer,),) = encode_answers(tokenizer, [[(prompt, choice)]])
        assert answer.ids == [tokenizer.bos_token_id, *whole]
        assert answer.first == len(before) + (not merges)  # with the bos in front: the prompt's last token, or after it
        assert len(answer.ids) - answer.first == n
    assert len(tokenizer.encode(prompt + "甲")) == len(before)
    choices = ["甲", "乙", "Z", "甲甲"]
    scores = likelihood.answer_likelihoods(model, tokenizer, [[(prompt, choice) for choice in choices]]).groups[0]
    for choice, value in zip(choices, scores, strict=True):
        assert value.log_likelihood == pytest.approx(slow(model, tokenizer, prompt, choice)[0], rel=1e-11)
        assert value.log_likelihood < -1e-3


def test_few_shot_examples(model, tokenizer):
    """The first of the same subject; never the question itself, under its own id or another."""
    pool = [
        RECORDS[0] | {"id": "again"},
        record(5, "zh?", ["a", "b"], 0, "zh"),
        record(6, "is it?", ["yes", "no"], 1, "cats"),
        record(7, "why?", ["so", "no"], 0, "cats"),
    ]
    score = multiple_choice(model, tokenizer, [RECORDS[0]], n_shot=2, examples=pool)
    shots = "is it?\nA. yes\nB. no\nAnswer: B\n\nwhy?\nA. so\nB. no\nAnswer: A\n\n"
    prompt = shots + prompt_of(RECORDS[0], "letters", False)
    check(score, [[slow(model, tokenizer, prompt, f" {letter}") for letter in "ABC"]])
    other = multiple_choice(model, tokenizer, [RECORDS[0]], n_shot=1, examples=pool, same_subject=False)
    prompt = "zh?\nA. a\nB. b\nAnswer: A\n\n" + prompt_of(RECORDS[0], "letters", False)
    check(other, [[slow(model, tokenizer, prompt, f" {letter}") for letter in "ABC"]])
    (texts,) = [choice_texts(parse_question(RECORDS[2], "x"), [parse_question(pool[2], "x")], style="texts", prompt=EN)]
    assert texts[0] == ("is it?\nAnswer: no\n\nwhere?\nAnswer:", " on the mat")


def test_a_long_prompt_loses_its_beginning_but_not_its_bos(tokenizer):
    model = tiny_model(max_position_embeddings=24)
    long = record(0, "你好 " * 30 + "the cat sat", ["the cat", "on the mat", "A"], 0)
    score = multiple_choice(model, tokenizer, [long, record(1, "x", ["a", "b"], 0)], style="texts")
    assert score.n_truncated == 1
    ids = [tokenizer.encode(long["question"] + "\nAnswer: " + choice) for choice in long["choices"]]
    n_over = max(map(len, ids)) - 24  # with the bos one more, but the last token is not read
    prompt = tokenizer.encode(long["question"] + "\nAnswer:")
    for whole, value, n in zip(ids, score.questions[0].log_likelihoods, score.questions[0].n_tokens, strict=True):
        kept = [tokenizer.bos_token_id, *whole[n_over:]]
        with torch.no_grad():
            log_probs = model(torch.tensor([kept[:-1]]))[0].log_softmax(-1)
        n_prompt = next(i for i, (a, b) in enumerate(zip([*prompt, -1], whole, strict=False)) if a != b)
        assert n == len(whole) - n_prompt
        expected = sum(log_probs[place - 1, kept[place]].item() for place in range(len(kept) - n, len(kept)))
        assert value == pytest.approx(expected, rel=1e-11)
    with pytest.raises(UserError, match=r"an answer has \d+ tokens and the model reads 24"):
        multiple_choice(model, tokenizer, [record(0, "x", ["a", "你好" * 40], 0)], style="texts")


@pytest.mark.parametrize("kind", ["adapter", "window", "experts"])
def test_other_models(tokenizer, kind):
    if kind == "adapter":  # of the output layer: there is no weight to take single positions with
        model = tiny_model()
        apply_lora(model, rank=2, target_modules="lm_head")
        torch.nn.init.normal_(model.lm_head.lora.B.weight, std=0.3)
    elif kind == "window":
        model = tiny_model(sliding_window=5)
    else:
        model = tiny_model(num_experts=4, num_experts_per_tok=2)
    score = multiple_choice(model, tokenizer, RECORDS, style="texts")
    expected = [
        [slow(model, tokenizer, prompt_of(item, "texts", False), f" {choice}") for choice in item["choices"]]
        for item in RECORDS
    ]
    check(score, expected)


def test_all_logits_are_never_held(tokenizer, model, monkeypatch):
    """The head sees one hidden state per scored token."""
    shapes = []
    original = likelihood.linear_log_probs

    def spy(hidden, weight, targets):
        shapes.append(tuple(hidden.shape))
        return original(hidden, weight, targets)

    monkeypatch.setattr(likelihood, "linear_log_probs", spy)
    score = multiple_choice(model, tokenizer, RECORDS, batch_size=100)
    assert shapes == [(sum(sum(question.n_tokens) for question in score.questions), 32)]


def test_mode_and_interval(model, tokenizer):
    model.train()
    score = multiple_choice(model, tokenizer, RECORDS)
    assert model.training
    model.eval()
    low, high = score.interval
    assert 0 <= low < score.accuracy < high <= 1
    values = score.as_dict()
    assert values["questions"][1]["log_likelihoods"] == score.questions[1].log_likelihoods
    assert values["n"] == 4
    assert "questions" not in score.as_dict(questions=False)


@pytest.mark.parametrize(
    ("records", "more", "words"),
    [
        ([], {}, ["no questions"]),
        ([record(0, "x", ["a", "b", "c", "d"], 5)], {}, ["record 0", "answer 5", "4 choices", "0 to 3"]),
        ([record(0, "x", ["a", " "], 0)], {}, ["record 0", "choice 1 is empty"]),
        ([record(0, "x", ["a"], 0)], {}, ["record 0", "at least two"]),
        ([record(0, "x", ["a", "b"], "A")], {}, ["record 0", "'A'", "index"]),
        ([record(0, "x", ["a", "b"], True)], {}, ["record 0", "True"]),
        ([record(0, " ", ["a", "b"], 1)], {}, ["record 0", "question"]),
        ([RECORDS[0], RECORDS[0]], {}, ["record 1", "'q0'", "record 0", "unique"]),
        (RECORDS, {"n_shot": 1}, ["n_shot 1", "only 0"]),
        (RECORDS[:1], {"n_shot": 2, "examples": RECORDS}, ["n_shot 2", "only 1", "'cats'"]),
        (RECORDS, {"n_shot": -1}, ["n_shot -1"]),
        (RECORDS, {"style": "blank"}, ["record 0", "'_'"]),
        (RECORDS, {"style": "word"}, ["'word'", "letters, texts or blank"]),
        (RECORDS, {"batch_size": 0}, ["batch_size 0"]),
        ([{"id": "n", "question": "1+1", "final": "2"}], {}, ["n", "no choices"]),
    ],
)
def test_bad_input(model, tokenizer, records, more, words):
    with pytest.raises(UserError) as error:
        multiple_choice(model, tokenizer, records, **more)
    for word in words:
        assert word in str(error.value)


def test_a_broken_model_is_reported(tokenizer):
    model = tiny_model()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="NaN"):
        multiple_choice(model, tokenizer, RECORDS)


def test_ties_go_to_the_first(model, tokenizer):
    question = multiple_choice(model, tokenizer, RECORDS).questions[0]
    assert replace(question, log_likelihoods=[-2.0, -1.0, -1.0]).choice == 1
