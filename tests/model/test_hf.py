"""Models on disk: transformers reads what we write, we read what it writes, faults are named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.errors import UserError
from minillm.model.hf import INDEX, WEIGHTS, load_model, save_model


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("max_shard_size", [2**30, 30_000], ids=["one file", "sharded"])
@torch.no_grad()
def test_transformers_opens_what_we_save(tools, shape, family, max_shard_size, tmp_path):
    model = tools.model(tools.config(shape, family, eos_token_id=82)).eval()
    save_model(model, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).is_file() == (max_shard_size < 2**30)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(reference).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    tokens = tools.tokens(1, 9)
    assert tools.difference(model(tokens), reference(tokens).logits) <= 1e-5
    wanted = reference.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = tokens
    for _ in range(8):
        ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"], ids=["one file", "sharded"])
@torch.no_grad()
def test_we_open_what_transformers_saves(tools, shape, family, max_shard_size, tmp_path):
    reference = tools.reference(tools.model(tools.config(shape, family))).eval()
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).is_file() == (max_shard_size == "30KB")
    model = load_model(tmp_path).eval()
    assert model.config == tools.config(shape, family)
    tokens = tools.tokens(2, 9)
    assert tools.difference(model(tokens), reference(tokens).logits) <= 1e-5


@pytest.mark.parametrize("max_shard_size", [2**30, 30_000])
def test_round_trip_is_byte_equal(tools, shape, family, max_shard_size, tmp_path):
    model = tools.model(tools.config(shape, family))
    save_model(model, tmp_path / "a", max_shard_size=max_shard_size)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", max_shard_size=max_shard_size)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_smaller_save_leaves_no_stale_shards(tools, tmp_path):
    model = tools.model(tools.config())
    save_model(model, tmp_path, max_shard_size=30_000)
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == [WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_files_and_of_loading(tools, dtype, tmp_path):
    model = tools.model(tools.config())
    save_model(model, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    loaded = load_model(tmp_path, dtype=torch.float64)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float64
        assert torch.equal(parameter, model.state_dict()[name].to(dtype).double())


def test_tied_matrices_are_one(tools, tmp_path):
    save_model(tools.model(tools.config()), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))


def test_plain_state_dict(tools, tmp_path):
    model = tools.model(tools.config("no groups, untied"))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth", config=model.config)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(UserError, match="give the model's configuration"):
        load_model(tmp_path / "w.pth")
    torch.save({"a": 1}, tmp_path / "no.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save(object, tmp_path / "code.pth")
    for name in ("no.pth", "broken.pth", "code.pth"):
        with pytest.raises(UserError, match=rf"{name} is not a plain state dict"):
            load_model(tmp_path / name, config=model.config)


def test_plain_state_dict_of_a_tied_model(tools, tmp_path):
    """torch.save stores the shared matrix under both names."""
    model = tools.model(tools.config())
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth", config=model.config, dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.double())


@pytest.fixture
def saved(tools, tmp_path):
    save_model(tools.model(tools.config()), tmp_path / "model", max_shard_size=30_000)
    return tmp_path / "model"


def change(directory, edit):
    """Rewrite the weights of a saved model as one file, edited."""
    weights = {}
    for path in directory.glob("model-*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (directory / INDEX).unlink()
    edit(weights)
    save_file(weights, directory / WEIGHTS)


def test_wrong_shapes_are_named_with_both(saved):
    def edit(weights):
        for layer in (0, 1):
            for name in ("gate_proj", "up_proj"):
                key = f"model.layers.{layer}.mlp.{name}.weight"
                weights[key] = weights[key][:7].contiguous()

    change(saved, edit)
    with pytest.raises(UserError) as error:
        load_model(saved)
    assert str(error.value).count("has shape (7, 48) instead of (100, 48)") == 3
    assert "and 1 more" in str(error.value)


def test_missing_and_unknown_tensors_are_named(saved):
    def edit(weights):
        del weights["model.norm.weight"]
        weights["model.layers.7.extra"] = torch.ones(1)

    change(saved, edit)
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing; model\.layers\.7\.extra is not part"):
        load_model(saved)


def test_a_missing_or_damaged_shard_is_named(saved):
    shard = sorted(saved.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        load_model(saved)
    shard.unlink()
    with pytest.raises(UserError, match=f"names {shard.name}, which is missing"):
        load_model(saved)


@pytest.mark.parametrize("content", ['{"weight_map": {"a"', "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(saved, content):
    (saved / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX} is damaged"):
        load_model(saved)


def test_another_family_is_refused_before_its_weights_are_read(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type 'mamba' is not supported; supported are: llama, qwen3"):
        load_model(saved)


def test_nothing_there(tmp_path, saved):
    with pytest.raises(UserError, match="neither a directory nor"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_model(tmp_path / "empty")
    shutil.copy(saved / "config.json", tmp_path / "empty")
    with pytest.raises(UserError, match="no weights in"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path / "empty")
