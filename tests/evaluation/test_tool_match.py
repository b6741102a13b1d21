"""Calls and answers on task files with tools, with a model whose replies are known."""

import json
from dataclasses import asdict

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data.records import read_records
from minillm.errors import UserError
from minillm.evaluation import tool_match
from minillm.tokenizer import encode_chat, train_bpe

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


class Scripted(torch.nn.Module):
    """Gives each conversation, named by its ids, a known reply."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=267, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4096
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.replies = tokenizer, {}

    def reply(self, messages, tools, message):
        """After ``messages`` say ``message``."""
        prompt, _ = encode_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=True)
        ids, mask = encode_chat(self.tokenizer, [*messages, message], tools=tools, train_on="last")
        self.replies[tuple(prompt)] = [i for i, is_target in zip(ids, mask, strict=True) if is_target]

    def forward(self, input_ids, *, document_ids=None, cache=None, head=None):
        if input_ids.shape[1] > 1:
            valid = torch.ones_like(input_ids) if document_ids is None else document_ids + 1
            prompts = [tuple(ids[: int(n)].tolist()) for ids, n in zip(input_ids, valid.sum(1), strict=True)]
            self.said, self.running, self.step = [self.replies[prompt] for prompt in prompts], None, 0
        logits = torch.zeros(*input_ids.shape, 267)
        said = [ids for ids in self.said if len(ids) > self.step]  # a row that has ended leaves the batch
        for row, ids in enumerate(said):
            logits[row, :, ids[self.step]] = 1.0
        self.step += 1
        return logits


def calls(*pairs):
    return [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in pairs]


def task(question, *steps, tools=TOOLS, **labels):
    """A record; each step is a list of calls with its result, or the answer."""
    turns = [{"role": "user", "content": question}]
    for step in steps:
        if isinstance(step, str):
            turns.append({"role": "assistant", "content": step})
        else:
            *pairs, result = step
            turns.append({"role": "assistant", "content": "", "tool_calls": calls(*pairs)})
            turns += [{"role": "tool", "content": result} for _ in pairs]
    return {"conversations": turns, "tools": tools} | labels


def test_calls_and_answers_are_counted(tokenizer, tmp_path):
    one = ("add", {"a": 1, "b": 2})
    records = [
        task("right", [one, "3"], "It is 3.", task="t", group="a"),
        task("other order and spaces", [one, "3"], "It is 3.", task="t", group="a"),
        task("wrong answer", [one, "3"], "It is 3.", task="t", group="a"),
        task("wrong call", [one, "3"], "It is 3.", task="t", group="b"),
        task("no call", [one, "3"], "It is 3.", task="t", group="b"),
        task("direct", "Hello.", task="t", group="c"),
        task("needless call", "Hello.", task="t", group="c"),
        task("two rounds", [one, ("add", {"a": 3}), "3"], [("add", {}), "9"], "12", task="u"),
        task("first right", [one, "3"], [("add", {}), "9"], "12", task="u"),
        task("without tools", "Yes.", tools=None),
    ]
    model = Scripted(tokenizer)

    def says(number, *replies):
        """Make the replies those to the record's prompts: one to the question, one after each round of results."""
        turns, tools = records[number]["conversations"], records[number]["tools"]
        starts = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        for start, reply in zip(starts, replies, strict=False):
            reply = {"content": reply} if isinstance(reply, str) else {"content": "", "tool_calls": calls(*reply)}
            model.reply(turns[:start], tools, {"role": "assistant"} | reply)

    says(0, [one], "It is 3.")
    says(1, [("add", '{"b":2,"a":1}')], " It is 3.\n")
    says(2, [one], "It is 4.")
    says(3, [("add", {"a": 1, "b": 3})])
    says(4, "It is 3.")
    says(5, "Hello.")
    says(6, [one])
    says(7, [one, ("add", {"a": 3})], [("add", {})], "12")
    says(8, [one], [one])
    says(9, "Yes.")
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for source in (records, list(read_records(path))):
        result = tool_match(model, tokenizer, source, max_new_tokens=200, batch_size=3)
        right_calls = [answer.correct for answer in result.calls.answers]
        assert right_calls == [True, True, True, False, False, True, False, True, False, True]
        right_answers = [answer.correct for answer in result.answers.answers]
        assert right_answers == [True, True, False, False, False, True, False, True, False, True]
    assert asdict(result.calls.answers[3]) == {
        "task": "t", "group": "b", "question": "wrong call", "expected": '[["add", {"a": 1, "b": 2}]]',
        "answer": '[["add", {"a": 1, "b": 3}]]', "correct": False,
    }  # fmt: skip
    assert result.calls.answers[4].answer == result.calls.answers[5].expected == "[]"
    assert (result.answers.answers[2].expected, result.answers.answers[2].answer) == ("It is 3.", "It is 4.")
    assert (
        result.answers.answers[6].answer == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    )
    groups = {(score.task, score.group): (score.n_correct, score.n) for score in result.calls.groups}
    assert groups == {
        ("t", "a"): (3, 3),
        ("t", "b"): (0, 2),
        ("t", "c"): (1, 2),
        ("u", ""): (1, 2),
        ("all", ""): (1, 1),
    }


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "record, message",
    [
        (task("q", [("add", {}), "3"]), "record 0: the last turn must be the assistant's expected answer"),
        (task("q", "a", "b"), "record 0: after the question, each assistant turn but the last must be calls"),
        ({"conversations": [ANSWER, ANSWER], "tools": TOOLS}, "a task with tools needs a question of the user"),
        ({"conversations": [QUESTION], "tools": TOOLS}, "at least a question and its answer"),
        ({"conversations": [QUESTION, {"role": "tool", "content": "3"}, ANSWER], "tools": TOOLS},
         "calls and their results must lead to an answer"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_task_is_refused(record, message, tokenizer):
    with pytest.raises(UserError, match=message):
        tool_match(Scripted(tokenizer), tokenizer, [record])


def test_no_records_are_refused(tokenizer):
    with pytest.raises(UserError, match="no records to measure calls of tools on"):
        tool_match(Scripted(tokenizer), tokenizer, [])
