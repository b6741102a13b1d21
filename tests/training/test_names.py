"""Every way in which people name weights."""

import sys
from types import SimpleNamespace

import pytest

from minillm.errors import UserError
from minillm.model.names import find_weights


@pytest.fixture
def out(tmp_path):
    """Directories as runs leave them; what makes a directory a model is its config.json."""
    for name in ("full_sft_32", "reason_32", "reason_64", "cut_32/checkpoints/step-00000002",
                 "cut_32/checkpoints/step-00000010"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("lora/a_32/adapter_config.json", "tokenizer/tokenizer.json", "gguf/m.gguf", "m.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def find(out, name, **more):
    return find_weights(name, save_dir=str(out), **({"hidden_size": 512, "any_width": True} | more))


def test_names_that_mean_weights(out):
    assert find(out, "full_sft_32") == out / "full_sft_32"
    assert find(out, "full_sft") == out / "full_sft_32"  # the only width
    assert find(out, "reason", hidden_size=64) == out / "reason_64"
    newest = out / "cut_32/checkpoints/step-00000010"
    assert find(out, str(newest)) == find(out, str(newest.parent)) == newest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora/a_32", "is an adapter, not a model.*--lora_name"), ("tokenizer", "holds a tokenizer alone"),
        ("gguf", "holds GGUF weights"), ("cut_32", "interrupted run.*--from_resume.*step-00000010"),
        ("reason", "full_sft_32, reason_32, reason_64"),
    ],
)  # fmt: skip
def test_what_is_not_a_model_is_named(out, name, words):
    with pytest.raises(UserError, match=words):
        find(out, name)
    with pytest.raises(UserError, match="is a ONNX file"):
        find(out, str(out / "m.onnx"))


def test_a_hub_name_is_downloaded_or_the_command_is_given(out, monkeypatch):
    asked = SimpleNamespace(__spec__=SimpleNamespace(), snapshot_download=lambda name, **_: str(out / "full_sft_32"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", asked)
    assert find(out, "Qwen/Qwen3-0.6B") == out / "full_sft_32"

    def fail(name, **_):
        raise OSError("no network")

    asked.snapshot_download = fail
    with pytest.raises(UserError, match=r"no network.*hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B"):
        find(out, "Qwen/Qwen3-0.6B")
