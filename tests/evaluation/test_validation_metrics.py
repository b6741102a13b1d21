"""What validations measure of a model's own answers, against each prompt answered alone and the plain formulas."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from minillm.cli.arguments import PreferenceArguments, PretrainArguments, ReasonArguments, SFTArguments
from minillm.cli.train_arguments import ANSWER_METRICS
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation import ValidationMetrics, bleu, rouge, run_suite, token_f1, validation_metrics
from minillm.inference import complete
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, load_tokenizer, train_bpe
from tests.foreign.layouts import make_tokenizer

ENGINE = SimpleNamespace(is_sharded=False)
WORDS = ["the", "little", "fox", "saw", "12", "apples", "and", "dog", "小明", "水果"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = (" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 9)) for n in range(40))
    return train_bpe(texts, vocab_size=300)


class WordsOnly(Transformer):
    """A random model that can say nothing but some words, and end its turn."""

    def allow(self, ids):
        self.forbidden = torch.ones(self.config.vocab_size, dtype=torch.bool)
        self.forbidden[list(ids)] = False
        return self

    def forward(self, *args, **options):
        return super().forward(*args, **options).masked_fill(self.forbidden, -1e9)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = ModelConfig(vocab_size=300, initializer_range=0.4, max_position_embeddings=256, **shape)
    words = {token for word in WORDS for token in tokenizer.encode(f" {word}")}
    return WordsOnly(config).allow(words | set(tokenizer.end_ids))


def conversation(number):
    """Questions of 1 to 8 words, every third one after an earlier turn, with a system turn."""
    turns = [{"role": "user", "content": " ".join(WORDS[: 1 + number % 8])}]
    if number % 3 == 0:
        turns = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": f"before {number}"},
            {"role": "assistant", "content": "an earlier answer"},
            *turns,
        ]
    return turns


def answer_alone(model, tokenizer, turns, limit=12):
    prompt, _ = encode_chat(tokenizer, turns, add_generation_prompt=True)
    options = {"temperature": 0.0, "eos_token_id": tokenizer.end_ids, "tokenizer": tokenizer}
    return complete(model, [prompt], max_new_tokens=limit, **options)[0].text.strip()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def answered(model, tokenizer, tmp_path_factory):
    """A validation file whose expected answers are the model's own, some changed; and the pairs (answer, expected)."""
    records, pairs = [], []
    for number in range(11):
        turns = conversation(number)
        answer = answer_alone(model, tokenizer, turns)
        expected = (answer, f"fox {answer} 水果", "the little 12 apples and a dog")[number % 3] or "dog"
        records.append({"messages": [*turns, {"role": "assistant", "content": f" {expected}\n"}]})
        pairs.append((answer, expected))
    return write(tmp_path_factory.mktemp("valid") / "valid.jsonl", records), pairs


def arguments(path, kind=SFTArguments, **flags):
    defaults = {
        "data_path": path,
        "valid_path": path,
        "from_weight": "x",
        "eval_max_new_tokens": 12,
        "max_seq_len": 200,
    }
    args = kind(**(defaults | flags))
    args.check()
    return args


def test_the_values_are_those_of_each_prompt_answered_alone(model, tokenizer, answered):
    path, pairs = answered
    answers, expected = zip(*pairs, strict=True)
    args = arguments(path, eval_metric="bleu, exact,f1,rouge_l,loss", batch_size=3, sample_prompts="none")
    metrics = ValidationMetrics(args, tokenizer, ENGINE)
    model.train()
    values, samples = metrics.measure(model)
    assert (samples, model.training) == ([], True)
    assert metrics.names == ("bleu", "exact", "f1", "rouge_l", "loss")
    exact = sum(a == b for a, b in pairs) / len(pairs)
    assert 4 / 11 <= exact < 1
    assert values["exact"] == pytest.approx(exact, rel=1e-12)
    assert values["bleu"] == pytest.approx(bleu(answers, expected).bleu, rel=1e-12)
    assert values["rouge_l"] == pytest.approx(rouge(answers, expected).rouge_l, rel=1e-12)
    assert values["f1"] == pytest.approx(token_f1(answers, expected), rel=1e-12)


def test_the_tools_of_a_record_are_in_its_prompt(tokenizer, tmp_path):
    turns, tools = conversation(3), [{"type": "function", "function": {"name": "weigh", "parameters": {}}}]
    record = {"messages": [*turns, {"role": "assistant", "content": "12 apples"}], "tools": tools}
    path = write(tmp_path / "valid.jsonl", [record])
    metrics = ValidationMetrics(arguments(path, eval_metric="exact", max_seq_len=400), tokenizer, ENGINE)
    prompt, _ = encode_chat(tokenizer, turns, tools=tools, add_generation_prompt=True)
    assert "weigh" in tokenizer.decode(prompt)
    assert [question.prompt for question in metrics.questions + metrics.samples] == [prompt, prompt]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_batch_size_changes_nothing_and_the_number_of_samples_does(model, tokenizer, answered, batch_size):
    path, pairs = answered
    args = arguments(path, eval_metric="exact", eval_batch_size=batch_size, eval_samples=4)
    values, _ = ValidationMetrics(args, tokenizer, ENGINE).measure(model)
    assert values["exact"] == sum(a == b for a, b in pairs[:4]) / 4
    everything = arguments(path, eval_metric="exact", eval_samples=0)
    assert len(ValidationMetrics(everything, tokenizer, ENGINE).questions) == len(pairs)


class Rank:
    """One of two ranks that run after one another: ``gather`` notes this one's value and returns both as noted."""

    world_size = 2

    def __init__(self, rank, noted):
        self.rank, self.noted, self.n_calls = rank, noted, 0

    def gather(self, value):
        values = self.noted.setdefault(self.n_calls, [[""] * 9] * 2)  # of the other rank nothing is known at first
        values[self.rank], self.n_calls = value, self.n_calls + 1
        return list(values)


def test_two_ranks_share_the_questions_and_both_have_all_answers(model, tokenizer, answered, monkeypatch):
    """An odd number of questions: rank 0 has six of the eleven."""
    args = arguments(answered[0], eval_metric="exact,f1", batch_size=2)
    metrics = ValidationMetrics(args, tokenizer, ENGINE)
    wanted = metrics.measure(model)
    noted, real, shares = {}, validation_metrics.greedy_texts, []

    def count(model, tokenizer, prompts, **options):
        shares.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(validation_metrics, "greedy_texts", count)
    metrics.measure(model, Rank(0, noted))
    second = metrics.measure(model, Rank(1, noted))
    first = metrics.measure(model, Rank(0, noted))
    assert first == second == wanted
    assert shares == [6, 2, 5, 2, 6, 2]


def test_samples_are_the_first_four_of_the_validation_data(model, tokenizer, answered):
    path, pairs = answered
    metrics = ValidationMetrics(arguments(path), tokenizer, ENGINE)
    assert metrics.needs_model
    values, rows = metrics.measure(model)
    assert values == {}
    assert rows == [
        {"question": conversation(n)[-1]["content"], "answer": pairs[n][0], "expected": pairs[n][1]} for n in range(4)
    ]
    sharded = ValidationMetrics(arguments(path), tokenizer, SimpleNamespace(is_sharded=True))
    assert not sharded.needs_model
    assert not ValidationMetrics(arguments(path, sample_prompts="none"), tokenizer, ENGINE).needs_model
    assert not ValidationMetrics(arguments(path, valid_path=""), tokenizer, ENGINE).needs_model


def test_sample_prompts_from_files(model, tokenizer, answered, tmp_path):
    path, _ = answered
    plain = tmp_path / "questions.txt"
    plain.write_text("the little fox\n\n小明 saw\n", encoding="utf-8")
    metrics = ValidationMetrics(arguments(path, sample_prompts=str(plain)), tokenizer, SimpleNamespace(is_sharded=True))
    _, rows = metrics.measure(model)
    assert [(row["question"], row["expected"]) for row in rows] == [("the little fox", ""), ("小明 saw", "")]
    for row in rows:
        assert row["answer"] == answer_alone(model, tokenizer, [{"role": "user", "content": row["question"]}])
    records = [
        {"prompt": "fox", "completion": "dog"},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]},
        {"prompt": "saw", "chosen": "good", "rejected": "bad"},
    ]
    args = arguments(path, sample_prompts=write(tmp_path / "questions.jsonl", records))
    _, rows = ValidationMetrics(args, tokenizer, ENGINE).measure(model)
    assert [(row["question"], row["expected"]) for row in rows] == [("fox", "dog"), ("who?", ""), ("saw", "good")]
    assert rows[1]["answer"] == answer_alone(model, tokenizer, records[1]["messages"])


def test_sample_prompts_may_have_tools(tokenizer, answered, tmp_path):
    path, _ = answered
    tools = [{"type": "function", "function": {"name": "weigh", "parameters": {}}}]
    questions = write(tmp_path / "questions.jsonl", [{"prompt": "fox", "tools": tools}])
    metrics = ValidationMetrics(arguments(path, sample_prompts=questions), tokenizer, ENGINE)
    turns = [{"role": "user", "content": "fox"}]
    assert metrics.samples[0].prompt == encode_chat(tokenizer, turns, tools=tools, add_generation_prompt=True)[0]
    texts = write(tmp_path / "text.jsonl", [{"text": "the little fox"}])
    args = arguments(texts, PretrainArguments, from_weight="", sample_prompts=questions)
    with pytest.raises(UserError, match="a question has tools, and this stage learns from texts"):
        ValidationMetrics(args, tokenizer, ENGINE)


def test_pretraining_samples_continue_texts(model, tokenizer, tmp_path):
    texts = [" ".join(WORDS[(n * k) % 8] for k in range(1, 12)) for n in range(1, 6)]
    path = write(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    _, rows = ValidationMetrics(arguments(path, PretrainArguments, from_weight=""), tokenizer, ENGINE).measure(model)
    assert len(rows) == 4
    for text, row in zip(texts, rows, strict=False):
        assert text.startswith(row["question"] + row["expected"])
        assert row["question"]
        assert row["expected"]
        prompt = tokenizer.open_document(tokenizer.encode(row["question"]))
        (done,) = complete(model, [prompt], max_new_tokens=12, temperature=0, eos_token_id=tokenizer.end_ids,
                           tokenizer=tokenizer)  # fmt: skip
        assert row["answer"] == done.text.strip()


# ---- whose answer is expected, and what of it ---------------------------------------------------------------------


def expected_of(tmp_path, tokenizer, records, kind=SFTArguments, **flags):
    args = arguments(write(tmp_path / "data.jsonl", records), kind, eval_metric="exact", **flags)
    return [(q.text, q.expected) for q in ValidationMetrics(args, tokenizer, ENGINE).questions]


def test_of_preferences_the_chosen_reply_is_expected_and_of_judged_ones_the_good(tmp_path, tokenizer):
    pairs = [{"prompt": "fox", "chosen": "dog", "rejected": "apples"}]
    judged = [
        {"prompt": "the fox", "completion": "bad", "label": False},
        {"prompt": "the fox", "completion": "good", "label": True},
    ]
    assert expected_of(tmp_path, tokenizer, pairs, PreferenceArguments) == [("fox", "dog")]
    assert expected_of(tmp_path, tokenizer, judged, PreferenceArguments, loss_type="kto") == [("the fox", "good")]


class Says(torch.nn.Module):
    """Answers each prompt with a given text and the end of its turn, told by the prompt's length."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.config = ModelConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, **shape)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids = [[*tokenizer.encode(answer), tokenizer.end_ids[0]] for answer in answers]

    def forward(self, input_ids, *, document_ids=None, cache=None, head=None):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        if input_ids.shape[1] > 1:
            self.said, self.step = self.ids.pop(0), -1
        self.step += 1
        logits[:, :, self.said[self.step]] = 1.0
        return logits


def test_the_part_after_the_thinking_is_compared(tmp_path, tokenizer):
    form = "<think>\nfox {0}\n</think>\n<answer>\n{1}\n</answer>"
    records = [
        {"messages": [{"role": "user", "content": "saw"}, {"role": "assistant", "content": form.format(n, n % 3)}]}
        for n in range(6)
    ]
    args = arguments(
        write(tmp_path / "reason.jsonl", records), ReasonArguments, eval_metric="exact", batch_size=1,
        eval_max_new_tokens=0, sample_prompts="none",
    )  # fmt: skip
    metrics = ValidationMetrics(args, tokenizer, ENGINE)
    (n_tokens,) = {len(encode_chat(tokenizer, r["messages"])[0]) - len(q.prompt)
                   for r, q in zip(records, metrics.questions, strict=True)}  # fmt: skip
    assert n_tokens - 1 <= metrics.max_new_tokens / 2 <= n_tokens  # a newline follows the end of the turn
    metrics.max_new_tokens = 99  # here the tags are written letter by letter
    said = [
        form.format("other", 0),
        form.format("dog", 2),
        "2",
        form.format("", 0),
        "<think>\n1",
        "<answer>\n2\n</answer>",
    ]
    values, _ = metrics.measure(Says(tokenizer, said))
    assert values["exact"] == 4 / 6  # the second is wrong, the fifth has never answered


@pytest.mark.parametrize("layout", ["llama2", "llama3", "qwen3", "minimind3", "deepseek"])
def test_prompts_are_those_of_the_models_own_template(layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = make_tokenizer(layout, tmp_path / "tokenizer")
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    talks = [
        [{"role": "user", "content": "Hi " * n}, {"role": "assistant", "content": f"Hello {n}!"}] for n in (1, 4, 2)
    ]
    args = arguments(write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks]), eval_metric="exact,f1")
    metrics = ValidationMetrics(args, ours, ENGINE)
    for talk, question in zip(talks, metrics.questions, strict=True):
        wanted = theirs.apply_chat_template(talk[:1], return_dict=True, add_generation_prompt=True)["input_ids"]
        whole = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
        assert theirs.decode(question.prompt) == theirs.decode(wanted)
        assert question.prompt == whole[: len(question.prompt)]  # two newlines at the end are one token in theirs
        assert len(question.prompt) + question.n_expected >= len(whole) - 3  # what an end token is followed by
    # The right answer counts as right in the way this template writes it: behind an empty think block, for some.
    empty = "<think>\n\n</think>\n\n" if layout == "qwen3" else ""
    flags = {"eval_metric": "exact,f1", "batch_size": 1, "sample_prompts": "none", "eval_max_new_tokens": 40}
    args = arguments(str(tmp_path / "talks.jsonl"), **flags)
    by_length = sorted(talks, key=lambda talk: len(talk[0]["content"]))
    said = [empty + talk[1]["content"] for talk in by_length[:2]] + ["Hello you!"]
    values, _ = ValidationMetrics(args, ours, ENGINE).measure(Says(ours, said))
    assert values["exact"] == pytest.approx(2 / 3)
    assert values["f1"] == pytest.approx((1 + 1 + 0.5) / 3)


# ---- what cannot be measured is said before training ---------------------------------------------------------------


def test_a_missing_package_is_named(tokenizer, answered, monkeypatch):
    path, _ = answered
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for name, package in (("bleu", "sacrebleu"), ("rouge_l", "rouge-score")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            ValidationMetrics(arguments(path, eval_metric=f"loss,{name}"), tokenizer, ENGINE)
    ValidationMetrics(arguments(path, eval_metric="f1,exact"), tokenizer, ENGINE)


def test_what_a_chinese_answer_would_need_is_asked_for_at_the_start(tokenizer, tmp_path, monkeypatch):
    """The expected answers are English; a model may say anything, and a run must not end of it."""
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the fox"}]
    path = write(tmp_path / "english.jsonl", [{"messages": turns}])
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install jieba"):
        ValidationMetrics(arguments(path, eval_metric="rouge_l"), tokenizer, ENGINE)


def test_without_a_conversation_that_fits_nothing_can_be_measured(tokenizer, answered):
    path, _ = answered
    with pytest.raises(UserError, match=r"--eval_metric f1: .*valid\.jsonl has no conversation .* --max_seq_len 3;"):
        ValidationMetrics(arguments(path, eval_metric="f1", max_seq_len=3), tokenizer, ENGINE)


def test_a_sample_prompt_without_room_is_refused(tokenizer, answered, tmp_path):
    path, _ = answered
    (tmp_path / "long.txt").write_text("the little fox saw 12 apples " * 9)
    args = arguments(path, sample_prompts=str(tmp_path / "long.txt"), max_seq_len=40)
    with pytest.raises(UserError, match=r"--sample_prompts .* tokens, so --max_seq_len 40 has no room"):
        ValidationMetrics(args, tokenizer, ENGINE)


@pytest.mark.parametrize("n_samples", [0, 3])
def test_a_suite_is_the_evaluations(model, tokenizer, answered, tmp_path, n_samples):
    path, _ = answered
    questions = [
        {"id": f"q{n}", "question": f"what is {n}", "choices": ["a b", "c", f"d {n}"], "answer": n % 3, "subject": "x"}
        for n in range(7)
    ]
    (tmp_path / "openbookqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = {"suite_dir": str(tmp_path), "sample_prompts": "none", "eval_samples": n_samples}
    args = arguments(path, eval_metric="suite:openbookqa,exact", **settings)
    model = Transformer(model.config).train()
    values, _ = ValidationMetrics(args, tokenizer, ENGINE).measure(model)
    score = run_suite("openbookqa", model.eval(), tokenizer, data_dir=tmp_path, limit=n_samples)
    assert len(score.questions) == (n_samples or 7)
    assert values["suite:openbookqa"] == score.accuracy
    assert list(values) == ["exact", "suite:openbookqa"]
    for name, words in (("nosuch", "there is no suite 'nosuch'"), ("zh", "several"), ("piqa", "no files of the suite")):
        args = arguments(path, eval_metric=f"suite:{name}", **settings)
        with pytest.raises(UserError, match=words):
            ValidationMetrics(args, tokenizer, ENGINE)
    (tmp_path / "winogrande.jsonl").write_text(json.dumps(questions[0]) + "\n")
    with pytest.raises(UserError, match="needs a question with a blank"):  # not after the first steps
        ValidationMetrics(arguments(path, eval_metric="suite:winogrande", **settings), tokenizer, ENGINE)


def test_every_metric_of_answers_that_the_flags_know_is_there():
    assert tuple(validation_metrics.COMPARE) == ANSWER_METRICS


def test_settings_name_the_criterion_and_what_it_is_measured_on(tokenizer, answered):
    path, _ = answered
    args = arguments(path, eval_metric="exact,loss", eval_samples=3)
    assert ValidationMetrics(args, tokenizer, ENGINE).settings() == {
        "eval_metric": "exact", "eval_samples": 3, "eval_max_new_tokens": 12,
    }  # fmt: skip
    args = arguments(path, eval_metric="loss,exact", eval_samples=3)
    assert ValidationMetrics(args, tokenizer, ENGINE).settings() == {"eval_metric": "loss"}
