"""A tiny world on disk, and a way to run a training script in it from its command line."""

import json
import shutil
from types import SimpleNamespace

import pytest

from minillm.tokenizer import train_bpe

WORDS = ["the", "little", "fox", "saw", "12", "apples", "and", "an", "old", "dog", "had", "345", "小明", "水果"]
SHAPE = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "4", "--num_key_value_heads", "2"]
PLAIN = ["--dtype", "float32", "--device", "cpu", "--num_threads", "1"]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(length)) + "."


def documents(n: int, first: int = 0) -> list[dict]:
    """Texts of 1 to 40 words."""
    return [{"text": sentence(number, 1 + number * 13 % 40)} for number in range(first, first + n)]


def conversations(n: int, first: int = 0) -> list[dict]:
    """Conversations of 1 to 3 turns, some with a system turn; questions and answers of 1 to 9 words."""
    records = []
    for number in range(first, first + n):
        messages = [{"role": "system", "content": "be brief"}] if number % 4 == 0 else []
        for turn in range(1 + number % 3):
            messages.append({"role": "user", "content": sentence(number + turn, 1 + (number * 5 + turn) % 9)})
            messages.append({"role": "assistant", "content": sentence(number * 3 + turn, 1 + (number + turn) % 7)})
        records.append({"messages": messages})
    return records


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_bpe((sentence(number, 20) for number in range(60)), vocab_size=300)


def write_lines(path, records):
    """Write a JSON Lines file; strings among the records are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_world(tiny_tokenizer):
    """Call it with a folder: data files in it, and a save_dir ``out`` with the tokenizer."""

    def make_world(folder):
        tiny_tokenizer.save(folder / "out" / "tokenizer")
        data = {
            "text": write_lines(folder / "text.jsonl", documents(30)),
            "text_valid": write_lines(folder / "text_valid.jsonl", documents(5, first=100)),
            "chat": write_lines(folder / "chat.jsonl", conversations(12)),
            "chat_valid": write_lines(folder / "chat_valid.jsonl", conversations(4, first=100)),
        }
        return SimpleNamespace(folder=folder, out=folder / "out", tokenizer=tiny_tokenizer, write=write_lines, **data)

    return make_world


@pytest.fixture
def world(make_world, tmp_path):
    return make_world(tmp_path)


@pytest.fixture
def world_with(once, make_world, flags, tmp_path):
    """Call it with a name, a script's main and its flags: a world in which that has run, once for all tests.

    {text} and the like in the flags are files of the world.
    """

    def world_with(name, main, *argv):
        def build(folder):
            made = make_world(folder)
            main([*flags(made), *(str(word).format(**vars(made)) for word in argv)])

        shutil.copytree(once(name, build), tmp_path, dirs_exist_ok=True)
        return make_world(tmp_path)

    return world_with


@pytest.fixture(scope="session")
def flags():
    """Flags of a tiny float32 model in a world's save_dir."""
    return lambda world: ["--save_dir", str(world.out), *SHAPE, *PLAIN]


@pytest.fixture
def call(capsys, flags):
    """Run a script's main in a world; return exit code, output, error output and what main returned."""

    def call(main, world, *argv):
        capsys.readouterr()
        result, code = None, 0
        try:
            result = main([*flags(world), *map(str, argv)])
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, err=shown.err, result=result)

    return call


@pytest.fixture
def refused():
    """Assert that a call ended with one clear line that holds ``words``, and left no model behind."""

    def refused(done, world, *words):
        assert done.code == 2, done
        assert done.err.startswith("error: ")
        assert done.err.endswith("\n")
        assert done.err.count("\n") == 1, done.err
        assert all(word in done.err for word in words), done.err
        begun = [path.name for path in world.out.iterdir() if path.name.split("_")[0] in ("pretrain", "full")]
        assert begun == [], "a run directory was made"

    return refused


@pytest.fixture
def read_jsonl():
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
