"""Every way in which people name weights and adapters."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.errors import UserError
from minillm.hub.names import HUB_FILES, download, find_adapter, find_weights, how_to_make
from minillm.hub.pth import infer_config
from minillm.lora.more.files import read_adapter


def make(out, *names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")


@pytest.fixture
def out(tmp_path):
    """Directories as runs leave them; what makes a directory a model is its config.json."""
    make(tmp_path, *(f"{name}/config.json" for name in ("full_sft_32", "full_sft_32/best", "reason_32", "reason_64")))
    make(tmp_path, "full_sft_512_moe/config.json", "full_sft_32-2/config.json", "old/best/config.json", "rlhf_512.pth")
    for run, file in (("cut_32", "config.json"), ("lora/cut_32", "adapter_config.json")):
        for step, n_bytes in ((2, 2), (10, 2), (11, 3)):  # the last one's file is shorter than its manifest says
            checkpoint = f"{run}/checkpoints/step-{step:08d}"
            make(tmp_path, f"{checkpoint}/{file}")
            manifest = {"files": {file: {"bytes": n_bytes, "sha256": ""}}}
            (tmp_path / checkpoint / "manifest.json").write_text(json.dumps(manifest))
    make(tmp_path, "lora/a_32/adapter_config.json", "lora/a_32.pth", "tokenizer/tokenizer.json", "gguf/m.gguf")
    make(tmp_path, "m.onnx", "M.GGUF", "half/model.safetensors", "broken_32/checkpoints/step-00000001/config.json")
    return tmp_path


def find(out, name, **more):
    return find_weights(name, save_dir=str(out), **({"hidden_size": 512, "any_width": True} | more))


def test_names_that_mean_weights(out):
    for name in ("full_sft_32", "full_sft_512_moe", "full_sft_32-2", "full_sft_32/best"):
        assert find(out, name) == out / name
        assert find(out, str(out / name)) == out / name
    assert find(out, "full_sft") == out / "full_sft_32"  # the only width
    assert find(out, "full_sft", has_experts=True) == out / "full_sft_512_moe"
    assert find(out, "reason", hidden_size=64) == out / "reason_64"
    assert find(out, "rlhf") == out / "rlhf_512.pth"  # as other projects keep them
    newest = out / "cut_32/checkpoints/step-00000010"
    assert find(out, str(newest)) == find(out, str(newest.parent)) == find(out, "cut_32/checkpoints") == newest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora/a_32", "is an adapter, not a model.*--lora_name"), ("tokenizer", "holds only a tokenizer"),
        ("gguf", "holds GGUF weights"), ("m.onnx", "is a ONNX file"), ("M.GGUF", "is a GGUF file"),
        ("cut_32", "interrupted run.*--from_resume.*step-00000010"), ("half", "has no config.json"),
        ("cut", "interrupted run.*--from_resume.*step-00000010"), ("old", "give one of its models, .*old/best"),
        ("broken_32/checkpoints", "holds no intact checkpoint"),
        ("reason", "no weights 'reason'.* full_sft_32, .*reason_32, reason_64"),
    ],
)  # fmt: skip
def test_what_is_not_a_model_is_named(out, name, words):
    with pytest.raises(UserError, match=words):
        find(out, name)


def test_every_name_that_an_error_lists_is_accepted(out):
    for wrong, look, listed in (("nothing", find, "/ there are: "), ("none", adapter, "/lora/ there are: ")):
        with pytest.raises(UserError, match=listed) as error:
            look(out, wrong)
        names = str(error.value).partition(listed)[2].partition(" (")[0].split(", ")
        assert len(names) >= 1
        for name in names:
            assert look(out, name).name == name


def test_the_runs_of_the_demo_are_listed_beside_those_of_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "out/demo/full_sft_128/config.json")
    with pytest.raises(UserError, match=r"in out/ there are: out/demo/full_sft_128 \(python train_dpo.py makes them"):
        find("out", "rlhf")


def test_the_only_run_of_the_demo_is_used_whatever_its_width(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "out/demo/full_sft_64/config.json")
    assert find_weights("full_sft", save_dir="out", hidden_size=512, any_width=True) == Path("out/demo/full_sft_64")
    with pytest.raises(UserError, match="no weights 'full_sft'"):
        find_weights("full_sft", save_dir="out", hidden_size=512)
    make(tmp_path, "out/demo/full_sft_128/config.json")
    assert find_weights("full_sft", save_dir="out", hidden_size=512, any_width=True).name == "full_sft_128"


# ---- adapters ----------------------------------------------------------------------------------------------------


def adapter(out, name):
    return find_adapter(name, save_dir=str(out), model_suffix="_32")


def test_names_that_mean_an_adapter(out):
    for name in ("a", "a_32", str(out / "lora/a_32")):
        assert adapter(out, name) == out / "lora/a_32"
    assert adapter(out, "a_32.pth") == out / "lora/a_32.pth"
    assert adapter(out, str(out / "lora/cut_32/checkpoints/step-00000002")).name == "step-00000002"


def test_the_adapters_of_the_demo_are_used_if_out_has_none_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "out/demo/lora/a_32/adapter_config.json", "out/demo/lora/b_32/adapter_config.json")
    assert adapter("out", "a") == adapter("out", "a_32") == Path("out/demo/lora/a_32")
    make(tmp_path, "out/lora/a_32/adapter_config.json")
    assert adapter("out", "a") == Path("out/lora/a_32")
    listed = r"nor out/lora/c_32 holds one; in out/lora/ there are: a_32, out/demo/lora/a_32, out/demo/lora/b_32 "
    with pytest.raises(UserError, match=listed):
        adapter("out", "c")
    with pytest.raises(UserError, match="there are: none"):
        adapter("other", "a")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("full_sft_32", "is a model, not an adapter: give it to --from_weight"),
        ("cut", "lora/cut_32 is an interrupted run.*--from_resume.*step-000000"),
        ("b", r"neither b nor .*b_32 holds one; in .*lora/ there are: a_32 \(train_lora.py makes one\)"),
    ],
)
def test_what_is_not_an_adapter_is_named(out, name, words):
    with pytest.raises(UserError, match=words):
        adapter(out, name)


def test_files_of_tensors_say_which_they_are(tmp_path):
    torch.save({"model.layers.0.x.lora.A.weight": torch.ones(1, 2), "lora_config": {}}, tmp_path / "adapter.pth")
    torch.save({"model.embed_tokens.weight": torch.ones(1, 2)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"adapter.pth is an adapter, not a model: .* --lora_name"):
        infer_config(tmp_path / "adapter.pth")
    with pytest.raises(UserError, match=r"model.pth is not an adapter.*a model is given to --from_weight"):
        read_adapter(tmp_path / "model.pth")


# ---- what makes them, and hubs -----------------------------------------------------------------------------------


def test_the_commands_that_are_missing(out):
    both = "`python train_pretrain.py`, then `python train_sft.py`"
    assert how_to_make("full_sft", save_dirs=["nowhere"]) == both
    assert how_to_make("rlhf", save_dirs=["nowhere"]) == f"{both}, then `python train_dpo.py`"
    assert how_to_make("rlhf", save_dirs=["nowhere", str(out)]) == "`python train_dpo.py`"


@pytest.fixture
def hub(out, monkeypatch):
    """A hub with one model; ``asked`` are the calls."""
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings))
        return str(out / "full_sft_32")

    module = SimpleNamespace(__spec__=SimpleNamespace(), snapshot_download=snapshot_download, asked=asked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    download.cache_clear()
    yield module
    download.cache_clear()


def test_a_hub_name_is_downloaded_once(out, hub):
    make(out, "full_sft_32/model.safetensors")
    assert find(out, "Qwen/Qwen3-0.6B") == find(out, "Qwen/Qwen3-0.6B") == out / "full_sft_32"
    (name, settings), *others = hub.asked
    assert (name, others) == ("Qwen/Qwen3-0.6B", [])
    assert settings["allow_patterns"] == list(HUB_FILES)
    assert "*.bin" not in settings["allow_patterns"]  # the same weights a second time


def test_pickled_weights_are_downloaded_where_there_are_no_others(out, hub):
    find(out, "gpt/old")
    assert ["*.bin" in settings["allow_patterns"] for _, settings in hub.asked] == [False, True]


def test_what_exists_is_not_asked_for(out, hub, monkeypatch):
    monkeypatch.chdir(out)
    for name in ("full_sft_32/nothing", "out/full_sft_999", "full_sft", "Qwen/model.gguf"):
        with pytest.raises(UserError, match="no weights"):
            find(out / "none", name)
    assert not hub.asked


def test_without_a_network_the_command_is_given(out, hub):
    def fail(name, **_):
        raise OSError("no network")

    hub.snapshot_download = fail
    command = r"pip install huggingface_hub && hf download Qwen/Qwen3-0.6B --local-dir out/Qwen3-0.6B"
    with pytest.raises(UserError, match=rf"no network.*modelscope.*{command}.*then --from_weight out/Qwen3-0.6B"):
        find(out, "Qwen/Qwen3-0.6B")
