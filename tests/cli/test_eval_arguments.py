"""The flags of eval_model.py: what goes with what."""

import pytest

from minillm.cli.eval_arguments import EvalArguments
from minillm.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_what_goes_together_passes(file):
    EvalArguments().check()
    EvalArguments(model_mode=3, task_file=file, n_samples=4, thinking="hide").check()
    EvalArguments(model_mode=2, pairs_file=file, answer_pairs=True).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs_file": "nowhere.jsonl"}, "--pairs_file nowhere.jsonl: no such file"),
        ({"model_mode": 0, "pairs_file": "{file}"}, "--pairs_file needs a chat model"),
        ({"answer_pairs": True}, "--answer_pairs needs --pairs_file"),
        ({"thinking": "plain"}, "--thinking plain"),
        ({"n_samples": 4}, "--n_samples 4"),
        ({"n_samples": 0, "model_mode": 3}, "--n_samples 0"),
        ({"n_samples": 2, "model_mode": 3, "task_file": "{file}", "temperature": 0.0}, "all samples would be equal"),
        ({"model_mode": 3, "task_file": "{file}", "text_metrics": True}, "--text_metrics"),
        ({"text_metrics": True}, "--text_metrics needs --task_file"),
        ({"n_shot": 2}, "--n_shot needs --suite"),
        ({"suite_random": True}, "--suite_random needs --suite"),
        ({"suite": "all", "suite_limit": -1}, "--suite_limit -1"),
        ({"suite": "all", "suite_dir": "nowhere"}, "--suite_dir nowhere: no such directory"),
        ({"suite": "all", "suite_dir": ".", "suite_resume": True}, "--suite_resume needs --output"),
        ({"output": "nowhere/out.json"}, "--output nowhere/out.json"),
    ],
)
def test_what_does_not_is_named(file, changes, message):
    changes = {name: file if value == "{file}" else value for name, value in changes.items()}
    with pytest.raises(UserError) as error:
        EvalArguments(**changes).check()
    assert message in str(error.value)
