"""The persona set and its recipes: who a model says that it is, before and after."""

import json
import sys
from pathlib import Path

import pytest

import eval_model
import train_lora
from minillm.cli.arguments import LoRAArguments
from minillm.cli.command_line import parse
from tests.foreign.models import make_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/open").glob("*.yaml"))


@pytest.fixture
def make_persona(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dataset"))
    import make_persona

    yield make_persona
    sys.modules.pop("make_persona", None)


def test_every_answer_has_the_name_and_no_question_is_asked_before(make_persona, tmp_path):
    file = tmp_path / "persona.jsonl"
    make_persona.main(["--name", "Ada", "--maker", "the lab", "--output", str(file)])
    talks = [json.loads(line)["conversations"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(talks) == 88
    assert all("Ada" in answer["content"] for _, answer in talks)
    asked = {question["content"].rstrip("?？.。") for question, _ in talks}
    seven = (ROOT / "dataset/questions_identity.txt").read_text(encoding="utf-8").splitlines()
    assert len(seven) == 7
    assert not {question.rstrip("?？.。") for question in seven} & asked


def test_an_empty_name_is_refused(make_persona, capsys):
    with pytest.raises(SystemExit):
        make_persona.main(["--name", " "])
    assert "--name: is empty" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(make_persona, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        make_persona.main(["--output", str(tmp_path / "file/x/p.jsonl")])
    assert "its folder cannot be made (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_run(make_persona, tmp_path, recipe):
    """The page's three commands, on a small random model in place of the download."""
    data = tmp_path / "lora_persona.jsonl"
    make_persona.main(["--output", str(data)])
    args = parse(LoRAArguments, ["--config", str(recipe), "--data_path", str(data)])
    assert (args.lora_name, args.from_weight.count("/")) == ("persona", 1)
    if recipe.stem != "qwen3-0.6b-lora":
        return
    base = make_model("qwen3", "qwen3", tmp_path / "base")
    out = ["--save_dir", str(tmp_path / "out"), "--device", "cpu"]
    flags = ["--config", str(recipe), "--from_weight", str(base), "--data_path", str(data), "--max_steps", "2"]
    train_lora.main([*flags, *out, "--base_dtype", "float32", "--dtype", "float32", "--batch_size", "2"])
    answers = tmp_path / "answers.json"
    flags = [
        "--from_weight",
        str(base),
        "--lora_name",
        "persona",
        "--prompts",
        str(ROOT / "dataset/questions_identity.txt"),
    ]
    eval_model.main([*flags, *out, "--max_new_tokens", "4", "--temperature", "0", "--output", str(answers)])
    assert len(json.loads(answers.read_text(encoding="utf-8"))["prompts"]) == 7
