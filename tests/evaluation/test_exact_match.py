"""Exact match with a model whose answers are known."""

import sys
import time

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data.records import read_records
from minillm.data.schema import parse_record
from minillm.errors import UserError
from minillm.evaluation import exact_match
from minillm.inference import complete, generate
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


class Echo(torch.nn.Module):
    """Answers " <the question's last character> " and ends its turn: a function of the ids seen so far."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=267, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512,
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.end = tokenizer.im_end_id
        self.blank = tokenizer.encode(" ")[0]
        self.batches: list[tuple[int, int]] = []

    def forward(self, input_ids, *, document_ids=None, cache=None, head=None):
        self.batches.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 267)
        if input_ids.shape[1] > 1:  # the prompts; what to say next is told by which ids came
            valid = torch.ones_like(input_ids) if document_ids is None else document_ids + 1
            self.said = []
            for row in range(len(input_ids)):
                ids = input_ids[row, : int(valid[row].sum())].tolist()
                asked = ids[: len(ids) - ids[::-1].index(self.end) - 1]  # up to the end of the question
                self.said.append([self.blank, asked[-1], self.blank, self.end])
            self.step = 0
        for row, said in enumerate(self.said):
            logits[row, :, said[self.step]] = 1.0
        self.step += 1
        return logits


def task(question, expected, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return {"conversations": turns} | more


RECORDS = [
    task("say a", "a", task="letters", group="asked"),
    task("please say b", " b\n", task="letters", group="asked"),  # compared after strip
    task("say c", "x", task="letters", group="derived"),
    task("2", "2", task="numbers"),
    task("a longer question about 3", "4", task="numbers"),
    task("d", "D"),
]


def test_counts_by_task_and_group(tokenizer):
    result = exact_match(Echo(tokenizer), tokenizer, RECORDS)
    assert [answer.correct for answer in result.answers] == [True, True, False, True, False, False]
    assert [answer.answer for answer in result.answers] == ["a", "b", "c", "2", "3", "d"]
    assert result.answers[4].question == "a longer question about 3"
    groups = {(score.task, score.group): (score.n_correct, score.n) for score in result.groups}
    assert groups == {
        ("all", ""): (0, 1),
        ("letters", "asked"): (2, 2),
        ("letters", "derived"): (0, 1),
        ("numbers", ""): (1, 2),
    }
    assert result.accuracy == 3 / 6
    assert result.task_average == pytest.approx((0 + 2 / 3 + 1 / 2) / 3)
    lines = [line.split() for line in result.table().splitlines()]
    assert ["letters", "asked", "2", "2", "100.0%"] in lines
    assert lines[-1][-1] == f"{result.task_average:.1%}"
    values = result.as_dict()
    assert values["tasks"]["numbers"] == 0.5
    assert values["answers"][2]["expected"] == "x"
    assert "answers" not in result.as_dict(answers=False)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_hold_prompts_of_similar_length_and_change_nothing(tokenizer, batch_size):
    echo = Echo(tokenizer)
    result = exact_match(echo, tokenizer, RECORDS, batch_size=batch_size)
    assert [answer.answer for answer in result.answers] == ["a", "b", "c", "2", "3", "d"]
    widths = [length for _, length in echo.batches if length > 1]
    assert widths == sorted(widths)
    assert max(rows for rows, _ in echo.batches) <= batch_size


def test_records_of_a_file_and_earlier_turns(tokenizer, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '{"conversations": [{"role": "user", "content": "say x"}, {"role": "assistant", "content": "x"}, '
        '{"role": "user", "content": "and y"}, {"role": "assistant", "content": "y"}], "task": "multi"}\n'
        '{"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "z"}], '
        '"group": "g"}\n'
    )
    result = exact_match(Echo(tokenizer), tokenizer, read_records(path))
    assert [(a.task, a.group, a.correct) for a in result.answers] == [("multi", "", True), ("all", "g", True)]


def test_answers_are_the_greedy_ones_of_a_real_model(tokenizer):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=267, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    )
    result = exact_match(model, tokenizer, RECORDS, max_new_tokens=8, batch_size=4)
    for record, answer in zip(RECORDS, result.answers, strict=True):
        prompt, _ = encode_chat(tokenizer, record["conversations"][:-1], add_generation_prompt=True)
        eos = [tokenizer.im_end_id, tokenizer.eos_token_id]
        ids = generate(model, [prompt], max_new_tokens=8, temperature=0, eos_token_id=eos)[0]
        expected = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
        assert answer.answer.rstrip("\ufffd").strip() == expected


def test_hundreds_of_short_prompts_take_seconds(tokenizer):
    model = Transformer(ModelConfig.preset("demo", vocab_size=267))
    records = [task(f"{i}+{i}=", str(2 * i)) for i in range(300)]
    start = time.perf_counter()
    exact_match(model, tokenizer, records, max_new_tokens=8)
    assert time.perf_counter() - start < 20  # about one second on an idle core


@pytest.mark.parametrize("form", ["dicts", "records"])
def test_tools_are_in_the_prompt(tokenizer, form, monkeypatch):
    tools = [{"type": "function", "function": {"name": "weigh", "parameters": {}}}]
    tasks = [task("say a", "a", tools=[tools[0]["function"]]), task("say b", "b")]
    records = tasks if form == "dicts" else [parse_record(record, 1) for record in tasks]
    prompts = []
    monkeypatch.setattr(
        sys.modules["minillm.evaluation.exact_match"],  # the package has a function of this name
        "complete",
        lambda model, batch, **options: prompts.extend(batch) or complete(model, batch, **options),
    )
    assert exact_match(Echo(tokenizer), tokenizer, records).accuracy == 1
    questions = [record["conversations"][:1] for record in tasks]
    wanted = [encode_chat(tokenizer, questions[0], tools=tools, add_generation_prompt=True)[0],
              encode_chat(tokenizer, questions[1], add_generation_prompt=True)[0]]  # fmt: skip
    assert sorted(prompts) == sorted(wanted)
    assert "weigh" in tokenizer.decode(wanted[0])


def test_a_call_as_the_expected_answer_is_refused(tokenizer):
    turns = task("say a", "")["conversations"]
    turns[1]["tool_calls"] = [{"function": {"name": "weigh", "arguments": {}}}]
    with pytest.raises(UserError, match=r"record 0: the expected answer has tool_calls.*write the calls into its con"):
        exact_match(Echo(tokenizer), tokenizer, [{"conversations": turns}])


def test_bad_records_are_named(tokenizer):
    echo = Echo(tokenizer)
    for records, message in [
        ([], "no records"),
        ([RECORDS[0], {"text": "a"}], "record 1"),
        ([{"conversations": [{"role": "user", "content": "a"}]}], "record 0"),
        ([{"conversations": [{"role": "user", "content": "a"}] * 2}], "its role is 'user'"),
    ]:
        with pytest.raises(UserError, match=message):
            exact_match(echo, tokenizer, records)
