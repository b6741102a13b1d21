"""Chapter 30: a training script of the library in a tiny world, in a folder that is deleted afterwards.

    python docs/course/code/ch30_run.py pretrain --learning_rate 0.5

Behind the stage (pretrain, sft, lora, dpo) come flags of its script; they replace those of ``FLAGS``. Files of the
world: texts.jsonl, few.jsonl (seven of its texts), valid.jsonl; old.jsonl and new.jsonl, conversations; pairs.jsonl.
lora and dpo start from a model that has learned old.jsonl. A run that ends with an error is no failure here.
"""

import contextlib
import importlib
import io
import itertools
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

from minillm.hub import open_model
from minillm.inference import complete
from minillm.tokenizer import encode_chat, train_bpe

ROOT = Path(__file__).parents[3]  # where the scripts are
ADJECTIVES = ("red", "old", "big", "wet", "shy", "odd", "fat", "new")
NOUNS = ("fox", "cat", "dog", "hen", "cow", "pig", "owl", "bee")
VERBS = ("sees", "hears", "likes", "calls", "meets", "helps", "finds", "warns")
FOODS = ("grapes", "fish", "bones", "corn", "grass", "apples", "mice", "honey")
NAMES = ("Who are you?", "What is your name?", "Who is this?", "Tell me your name.")
SHAPE = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2 --max_seq_len 64"
PLAIN = "--batch_size 4 --log_interval 20 --dtype float32 --device cpu --num_threads 1"
FLAGS = {
    "pretrain": "--data_path texts.jsonl --max_steps 100 --learning_rate 5e-3",
    "sft": "--data_path old.jsonl --from_weight= --max_steps 150 --learning_rate 1e-2",
    "lora": "--data_path new.jsonl --max_steps 60 --learning_rate 1e-2",
    "dpo": "--data_path pairs.jsonl --valid_path pairs.jsonl --max_steps 60 --learning_rate 1e-3",
}


def text(draw: random.Random) -> dict:
    """Return three sentences with the logarithm of their probability: fifteen words, each one of eight."""
    words = (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS)
    sentences = ["the {} {} {} the {} {}.".format(*map(draw.choice, words)) for _ in range(3)]
    return {"text": " ".join(sentences), "log_prob": -15 * math.log(8)}


def questions() -> list[tuple[str, str]]:
    """Return the eight questions of old.jsonl with their answers."""
    return [(f"What does the {noun} eat?", f"the {noun} eats {food}.") for noun, food in zip(NOUNS, FOODS, strict=True)]


def identity() -> list[tuple[str, str]]:
    """Return the four questions of new.jsonl with their answers."""
    return [(question, "the owl.") for question in NAMES]


def chat(question: str, answer: str) -> dict:
    """Return a conversation as a record."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@contextlib.contextmanager
def world():
    """Make the world in a new folder, go there, and come back."""
    draw, before = random.Random(0), Path.cwd()
    texts = [text(draw) for _ in range(400)]
    wrong = [answer for _, answer in questions()[1:]] + [questions()[0][1]]
    files = {
        "texts": texts,
        "few": texts[:7],
        "valid": [text(draw) for _ in range(40)],
        "old": [chat(*pair) for pair in questions()],
        "new": [chat(*pair) for pair in identity()],
        "pairs": [
            {"prompt": question, "chosen": answer, "rejected": other}
            for (question, answer), other in zip(questions(), wrong, strict=True)
        ],
    }
    torch.set_num_threads(1)  # the model is small
    with tempfile.TemporaryDirectory() as folder:
        for name, records in files.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
        os.chdir(folder)
        messages = itertools.chain.from_iterable(record["messages"] for record in files["old"] + files["new"])
        contents = [record["text"] for record in texts] + 20 * [f"{m['role']}\n{m['content']}" for m in messages]
        train_bpe(iter(contents), vocab_size=320).save("out/tokenizer")
        try:
            yield
        finally:
            os.chdir(before)


def train(stage: str, *flags: str, quiet: bool = False) -> int:
    """Run train_<stage>.py in this folder with ``FLAGS`` and ``flags``; return its exit code."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    main = importlib.import_module(f"train_{stage}").main
    words = f"{SHAPE} {PLAIN} {FLAGS[stage]}".split()
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        try:
            main([*words, *flags])
        except SystemExit as end:
            return end.code
    return 0


def prompt_of(tokenizer, question: str) -> list[int]:
    """Return the prompt of a question in the tokenizer's own format."""
    return encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)[0]


def ask(name: str, *, pairs=None, lora_name="", ends=None, prompt=prompt_of) -> None:
    """Ask the fine-tuned model questions; print how many answers are right, and how many end by themselves.

    Args:
        name: in front of each line. pairs: (question, right answer); None: those of old.jsonl.
        ends: ids that end an answer; None: the tokenizer's. prompt: from tokenizer and question to the prompt's ids.
    """
    model, tokenizer = open_model("out/full_sft_32", device="cpu", lora_name=lora_name)
    asked, expected = zip(*(pairs or questions()), strict=True)
    prompts = [prompt(tokenizer, question) for question in asked]
    ends = tokenizer.end_ids if ends is None else ends
    options = {"max_new_tokens": 40, "temperature": 0, "eos_token_id": ends, "tokenizer": tokenizer}
    answers = complete(model, prompts, **options)
    right = sum(answer.text == text for answer, text in zip(answers, expected, strict=True))
    print(f"{name}, first answer: {answers[0].text!r}")
    print(f"{name}, right answers: {right} of {len(answers)}")
    print(f"{name}, ended by themselves: {sum(a.finish_reason == 'eos' for a in answers)} of {len(answers)}")


if __name__ == "__main__":
    stage, *flags = sys.argv[1:]
    with world():
        if stage in ("lora", "dpo"):
            train("sft", quiet=True)
        code = train(stage, *flags)
        print(f"exit code {code}")
        if code == 0 and stage == "sft":
            ask("old questions")
        elif code == 0 and stage == "lora":
            ask("new questions", pairs=identity(), lora_name="lora")
            ask("old questions", lora_name="lora")
