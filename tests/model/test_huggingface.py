"""Models on disk: transformers reads what we write, we read what it writes, faults are named."""

import dataclasses
import json
import re
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.config.families import ARCHITECTURES
from minillm.errors import UserError
from minillm.hub import huggingface as hf
from minillm.hub.huggingface import INDEX, WEIGHTS, load_model, save_model

CORRECTION = "e_score_correction_bias"


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shapes_of(directory):
    files = map(load_file, directory.glob("model*.safetensors"))
    return {name: tensor.shape for weights in files for name, tensor in weights.items()}


@torch.no_grad()
def test_transformers_opens_what_we_save(tools, shape, family, sharded, tmp_path):
    model = tools.model(tools.config(shape, family, eos_token_id=82)).eval()
    save_model(model, tmp_path, max_shard_size=30_000 if sharded else 2**30)
    assert (tmp_path / INDEX).is_file() == sharded
    # Eager: their grouped kernel demands widths that ours are not.
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert type(reference).__name__ == ARCHITECTURES[family]
    tokens = tools.tokens(1, 9)
    assert tools.difference(model(tokens), reference(tokens).logits) <= 1e-5
    wanted = reference.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = tokens
    for _ in range(8):
        ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours, wanted)


@torch.no_grad()
def test_we_open_what_transformers_saves(tools, shape, family, sharded, tmp_path):
    reference = tools.reference(tools.model(tools.config(shape, family))).eval()
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="30KB" if sharded else "1GB")
    assert (tmp_path / "theirs" / INDEX).is_file() == sharded
    model = load_model(tmp_path / "theirs").eval()
    assert model.config == tools.config(shape, family)
    save_model(model, tmp_path / "ours")
    assert shapes_of(tmp_path / "ours") == shapes_of(tmp_path / "theirs")  # the same names, too
    tokens = tools.tokens(2, 9)
    assert tools.difference(model(tokens), reference(tokens).logits) <= 1e-5


SHARED = {"num_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_shared_expert_without_a_gate_is_stored_with_one_of_zeros(tools, dtype, tmp_path):
    model = tools.model(tools.config(**SHARED), dtype=dtype).eval()
    save_model(model, tmp_path / "a")
    stored, name = load_file(tmp_path / "a" / WEIGHTS), "model.layers.1.mlp.shared_expert.down_proj.weight"
    gate = stored["model.layers.1.mlp.shared_expert_gate.weight"]
    assert (gate.shape, gate.dtype, gate.any().item()) == ((1, 48), dtype, False)
    assert torch.equal(stored[name], 2 * model.get_parameter(name))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", experts_implementation="eager", dtype=dtype
    ).eval()
    assert type(reference).__name__ == "Qwen2MoeForCausalLM"
    if dtype == torch.float32:
        tokens = tools.tokens(2, 9)
        assert tools.difference(model(tokens), reference(tokens).logits) <= 1e-5
    again = load_model(tmp_path / "a", dtype=dtype)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    reference.save_pretrained(tmp_path / "b")  # its configuration keeps what is ours
    again = load_model(tmp_path / "b", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_gate_that_was_trained_since_is_not_dropped(tools, tmp_path):
    save_model(tools.model(tools.config(**SHARED)), tmp_path)
    stored, name = load_file(tmp_path / WEIGHTS), "model.layers.1.mlp.shared_expert_gate.weight"
    save_file(stored | {name: torch.full((1, 48), 0.25)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is not zero.*shared_expert_gate false.*set it to true"):
        load_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"shared_expert_gate": True}))
    assert load_model(tmp_path).get_parameter(name)[0, 0] == 0.25
    save_file({key: tensor for key, tensor in stored.items() if key != name}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("value, why", [(float("nan"), "not finite"), (-float("inf"), "not finite"), (1e5, "6.55e")])
def test_weights_that_are_not_finite_are_not_saved(tools, value, why, tmp_path):
    model = tools.model(tools.config(family="mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = value
    name = r"model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight"
    with pytest.raises(UserError, match=rf"{name} has .*{why}.*nothing was written"):
        save_model(model, tmp_path / "new", dtype=torch.float16)
    assert not (tmp_path / "new").exists()
    if value == 1e5:
        save_model(model, tmp_path / "new", dtype=torch.bfloat16)


def test_doubling_must_not_overflow(tools, tmp_path):
    model = tools.model(tools.config(**SHARED))
    with torch.no_grad():
        model.model.layers[0].mlp.shared_expert.down_proj.weight[3, 5] = 4e4
    with pytest.raises(UserError, match=r"shared_expert\.down_proj\.weight has the number 8e\+04, and float16 ends at"):
        save_model(model, tmp_path, dtype=torch.float16)
    save_model(model, tmp_path)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_beyond_the_embedding_is_refused(tools, name):
    with pytest.raises(UserError, match=rf"{name} is 83: the 83 tokens \(vocab_size\) end at 82"):
        tools.config(**{name: 83})


@torch.no_grad()
def test_a_mixtral_with_a_window(tools, tmp_path):
    """The released ones have none; over 40 tokens a window of 7 changes what all but the first see."""
    values = tools.config(family="mixtral").to_hf() | {"sliding_window": 7}
    config = transformers.MixtralConfig(**values)
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.mul_(5.0)  # fresh weights barely attend to anything
    theirs.save_pretrained(tmp_path / "windowed")
    model = load_model(tmp_path / "windowed").eval()
    assert (model.config.model_type, model.config.sliding_window) == ("mixtral", 7)
    tokens = tools.tokens(2, 40)
    wanted = theirs(tokens).logits
    assert tools.difference(model(tokens), wanted) <= 1e-5
    save_model(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager").eval()
    assert tools.difference(again(tokens).logits, wanted) <= 1e-6
    model.config = dataclasses.replace(model.config, sliding_window=None)
    assert tools.difference(model(tokens)[:, :7], wanted[:, :7]) <= 1e-5
    assert tools.difference(model(tokens)[:, 7:], wanted[:, 7:]) > 1e-2


def test_round_trip_is_byte_equal(tools, shape, family, sharded, tmp_path):
    max_shard_size = 30_000 if sharded else 2**30
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
def test_dtype_of_files_and_of_loading(tools, family, dtype, tmp_path):
    model = tools.model(tools.config(family=family))
    save_model(model, tmp_path, dtype=dtype)
    stored = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith(CORRECTION)} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    loaded = load_model(tmp_path, dtype=torch.float64)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float64
        assert torch.equal(parameter, model.state_dict()[name].to(dtype).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_correction_bias_stays_in_float32_at_least(tools, dtype, tmp_path):
    """In a short dtype its small steps would be lost, and other experts chosen; transformers keeps it so too."""
    model = tools.model(tools.config(family="glm4_moe"))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    wide = torch.promote_types(dtype, torch.float32)
    assert not torch.equal(bias, bias.bfloat16().float())  # it does lose something
    save_model(model, tmp_path / "a", dtype=dtype)
    loaded = load_model(tmp_path / "a", dtype=dtype)
    save_model(loaded, tmp_path / "b")  # in the model's dtype
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    name = f"model.layers.1.mlp.gate.{CORRECTION}"
    for directory in ("a", "b"):
        stored = load_file(tmp_path / directory / WEIGHTS)[name]
        assert stored.dtype == wide
        assert torch.equal(stored, bias.to(wide))
    kept = loaded.state_dict()[name]
    assert kept.dtype == wide
    assert torch.equal(kept, bias.to(wide))
    assert not kept.requires_grad
    assert torch.equal(reference.state_dict()[name], bias)
    assert loaded.lm_head.weight.dtype == dtype


def test_one_tensor_at_a_time(tools, monkeypatch, family, tmp_path):
    """What is read goes into its place before the next is read: the weights are never in memory twice."""
    model = tools.model(tools.config(family=family))
    save_model(model, tmp_path)
    reads, alive, read = [], [], hf._InFile.read

    def counted(self):
        alive.append(sum(reference() is not None for reference in reads))
        tensor = read(self)
        reads.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(hf._InFile, "read", counted)
    loaded = load_model(tmp_path, dtype=torch.float64)  # in float32, what is read becomes the parameter itself
    assert len(reads) == len(load_file(tmp_path / WEIGHTS))
    assert max(alive) <= 1
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].double()), name


@torch.no_grad()
def test_layers_for_predicting_further_tokens_are_left_out(tools, tmp_path):
    """GLM-4.5 stores them behind the model's own; transformers ignores them. A layer too many is an error still."""
    model = tools.model(tools.config(family="glm4_moe")).eval()
    save_model(model, tmp_path, max_shard_size=30_000)
    before = load_model(tmp_path)

    def add_prediction_layer(weights):
        layer = {name.replace("layers.1.", "layers.2."): t for name, t in weights.items() if "layers.1." in name}
        weights |= {name: tensor.clone() for name, tensor in layer.items()}
        weights["model.layers.2.eh_proj.weight"] = torch.ones(48, 96)
        weights["model.layers.2.shared_head.norm.weight"] = torch.ones(48)

    change(tmp_path, add_prediction_layer)
    after = load_model(tmp_path)
    assert torch.equal(after(tools.tokens(2, 9)), before(tools.tokens(2, 9)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert tools.difference(after(tools.tokens(2, 9)), reference(tools.tokens(2, 9)).logits) <= 1e-5

    weights = load_file(tmp_path / WEIGHTS)
    del weights["model.layers.2.eh_proj.weight"]
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.layers\.2\..* is not part of this model"):
        load_model(tmp_path)


@torch.no_grad()
def test_stored_rotary_tables_are_left_out(tools, saved):
    """Checkpoints of 2023 have them."""
    before = load_model(saved)
    change(saved, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load_model(saved)(tools.tokens(1, 7)), before(tools.tokens(1, 7)))


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


def test_plain_state_dict_of_a_tied_model(tools, family, tmp_path):
    """torch.save stores the shared matrix under both names, and experts as they lie in memory."""
    model = tools.model(tools.config(family=family))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth", config=model.config, dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].double()), name


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
    names = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer, name in ((0, "gate"), (0, "up"), (1, "gate"))]
    listed = "; ".join(f"{name} has shape (7, 48) instead of (100, 48)" for name in names)
    wanted = f"the weights of {saved} do not fit their configuration, take both from one model: {listed}; and 1 more"
    assert str(error.value) == wanted


@pytest.mark.parametrize(
    "model_type, name, parts",
    [
        ("mixtral", "block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_of_another_shape_are_named_as_they_are_on_disk(tools, model_type, name, parts, tmp_path):
    model = tools.model(tools.config(family=model_type))
    save_model(model, tmp_path, max_shard_size=30_000)
    gate, up, down = parts
    first = f"model.layers.0.{name}"

    def edit(weights):
        for key in (first.format(3, gate), first.format(4, up), first.format(4, down), first.format(2, gate)):
            weights[key] = weights[key][:7].contiguous()

    change(tmp_path, edit)
    width = model.config.moe_intermediate_size
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert [problem.split(": ")[-1] for problem in str(error.value).split("; ")] == [
        f"{first.format(2, gate)} has shape (7, 48) instead of ({width}, 48)",
        f"{first.format(3, gate)} has shape (7, 48) instead of ({width}, 48)",
        f"{first.format(4, up)} has shape (7, 48) instead of ({width}, 48)",
        "and 1 more",
    ]

    def lose(weights):
        del weights[first.format(4, down)]
        weights[first.format(9, gate)] = torch.ones(1)

    save_model(model, tmp_path, max_shard_size=30_000)
    change(tmp_path, lose)
    missing, extra = re.escape(first.format(4, down)), re.escape(first.format(9, gate))
    with pytest.raises(UserError, match=f"{missing} is missing; {extra} is not part"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "other, problem",
    [("qwen3", "self_attn.k_norm.weight is not part of this model"), ("qwen3_moe", "mlp.gate_proj.weight is missing")],
)
def test_weights_of_another_family_than_config_json_says(tools, saved, other, problem, tmp_path):
    save_model(tools.model(tools.config(family=other)), tmp_path / "mixed")
    shutil.copy(saved / "config.json", tmp_path / "mixed")  # a Llama's
    with pytest.raises(UserError, match=rf"take both from one model: .*model\.layers\.0\.{re.escape(problem)}.* more$"):
        load_model(tmp_path / "mixed")


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
    with pytest.raises(UserError, match=f"{shard.name} is damaged, copy it again"):
        load_model(saved)
    shard.unlink()
    with pytest.raises(UserError, match=f"{INDEX} names {shard.name}, which is missing: copy that shard too"):
        load_model(saved)


@pytest.mark.parametrize("content", ['{"weight_map": {"a"', "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(saved, content):
    (saved / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX} is damaged, copy it again"):
        load_model(saved)


def test_another_family_is_refused_before_its_weights_are_read(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type 'mamba' is not supported; supported are: llama, mistral, qwen2"):
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
