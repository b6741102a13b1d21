"""Models and adapters on disk, damaged at a random place: what was saved, or one error that names the file."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.pth import infer_config
from minillm.lora import LoRAConfig, apply_lora, load_lora, save_lora
from minillm.model import Transformer

from .strategies import TIMEOUT_S, as_json, damaged, examples, mutated, outcome, scratch, texts, values

pytestmark = [
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]
SHAPE = {
    "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip
SPARSE = {"num_experts": 2, "num_experts_per_tok": 1, "use_qk_norm": True, "moe_intermediate_size": 4}
small = st.sampled_from([0, 1, 2, 3, 8, 12, True, False, None, 0.5, "x", [], {}, [1], -1, 10**400, 2**40])


class Hidden(list):
    """A list that is not printed beside every failure."""

    def __repr__(self):
        return f"Hidden({len(self)})"


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files of three small models: in one file, in shards, and with experts."""
    found = Hidden()
    for settings, shard_size in ((SHAPE, 2**30), (SHAPE, 600), (SHAPE | SPARSE, 2**30)):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        save_model(Transformer(ModelConfig(**settings)), folder, max_shard_size=shard_size)
        found.append(files_of(folder))
    return found


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    state = Transformer(ModelConfig(**SHAPE)).state_dict()
    return lambda: dict(state)


def check_answer(found, place) -> None:
    """Fail unless ``found`` is an error that names the place, or a model that computes."""
    if isinstance(found, UserError):
        assert str(place) in str(found)
        return
    with torch.no_grad():
        logits = found(torch.tensor([[0, min(1, found.config.vocab_size - 1)]]))
    assert logits.shape == (1, 2, found.config.vocab_size)


def write_with_one_spoiled(data, files: dict[str, bytes], folder: Path, *, n_head: int) -> None:
    """Write the files, one of them damaged (in its first ``n_head`` bytes, or anywhere), changed, or left out."""
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    how = damaged(content[:n_head]).map(lambda head: head + content[n_head:]) | damaged(content) | st.just(None)
    if name.endswith(".json"):
        how |= mutated(st.just(json.loads(content)), small | values).map(as_json)
    for each, written in (files | {name: data.draw(how)}).items():
        if written is not None:
            (folder / each).write_bytes(written)


@examples(250)
@given(st.data())
def test_a_damaged_model_is_refused_or_works(models, data):
    files = data.draw(st.sampled_from(models))
    with scratch() as folder:
        write_with_one_spoiled(data, files, folder, n_head=400)
        check_answer(outcome(load_model, folder), folder)


dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint16, torch.bool]
)
odd_tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(0, 3), max_size=4), dtypes
)


NAMES = (
    "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_experts.gate_proj.weight",
    "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.gate.e_score_correction_bias", "lm_head.weight", "tok_embeddings.weight", "freqs_cos",
    "cos_cached", "inv_freq", "pos_cis", "x.mlp.gate.weight",
)  # fmt: skip


@st.composite
def odd_states(draw, state: dict) -> dict:
    """A state dict with tensors left out, renamed, doubled, or of another shape or dtype."""
    state = dict(state)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        how = draw(st.sampled_from(["drop", "rename", "odd", "dtype", "add"]))
        if how == "drop" and len(state) > 1:
            del state[name]
        elif how == "rename":
            other = (
                draw(st.sampled_from(["module.", "_orig_mod.", "model.layers.7.", "model.layers.99999999999."])) + name
            )
            state[other] = state.pop(name)
        elif how == "odd":
            state[name] = draw(odd_tensors)
        elif how == "dtype":
            state[name] = state[name].to(draw(dtypes))
        else:
            state[draw(st.sampled_from(NAMES))] = draw(odd_tensors)
    return state


@examples(150)
@given(st.data())
def test_odd_tensors_in_a_directory_are_named(models, weights, data):
    state = data.draw(odd_states({name: tensor for name, tensor in weights().items() if name != "lm_head.weight"}))
    with scratch() as folder:
        (folder / "config.json").write_bytes(models[0]["config.json"])
        (folder / "model.safetensors").write_bytes(save({name: tensor.clone() for name, tensor in state.items()}))
        check_answer(outcome(load_model, folder), folder)


# ---- bare .pth files ---------------------------------------------------------------------------------------------


def as_pth(content, *, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def open_pth(path) -> list:
    """Return what the two readers of a .pth say."""
    config = ModelConfig(**SHAPE)
    found = [outcome(infer_config, path, given={"num_attention_heads": 2}), outcome(infer_config, path)]
    return [*found, outcome(load_model, path, config=config)]


@examples(200)
@given(st.data())
def test_a_damaged_pth_is_refused_or_works(weights, data):
    content = as_pth(weights(), old=data.draw(st.booleans()))
    begin = damaged(content[:300]).map(lambda head: head + content[300:])
    with scratch() as folder:
        path = folder / "model.pth"
        path.write_bytes(data.draw(begin | damaged(content) | st.binary(max_size=40)))
        *configs, model = open_pth(path)
        assert all(str(path) in str(found) for found in (*configs, model) if isinstance(found, UserError))
        check_answer(model, path)


@examples(150)
@given(st.data())
def test_a_pth_of_odd_tensors_is_refused_or_works(weights, data):
    state = data.draw(odd_states(weights()))
    if data.draw(st.booleans()):
        state = {"model": state, "optimizer": {}}
    with scratch() as folder:
        path = folder / "model.pth"
        path.write_bytes(as_pth(state))
        check_answer(open_pth(path)[-1], path)


@examples(60)
@given(values | st.dictionaries(st.integers() | texts | st.none(), values, max_size=2))
@example({5: torch.zeros(2)})
@example({})
def test_a_pth_of_other_things_is_refused(content):
    with scratch() as folder:
        path = folder / "model.pth"
        path.write_bytes(as_pth(content))
        assert all(isinstance(found, UserError) and str(path) in str(found) for found in open_pth(path))


class Evil:
    """Unpickled, it would call ``print``."""

    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@examples(40)
@given(st.sampled_from([0, 1, 2, 3, 4]), st.sampled_from(["bare", "zip", "in a dict"]))
def test_code_in_a_pth_is_never_run(weights, protocol, form):
    content = pickle.dumps({"a": Evil()} if form == "in a dict" else Evil(), protocol=protocol)
    if form != "bare":  # the pickle within a file that torch wrote
        file, whole = io.BytesIO(), zipfile.ZipFile(io.BytesIO(as_pth(weights())))
        with zipfile.ZipFile(file, "w") as changed:
            for name in whole.namelist():
                changed.writestr(name, content if name.endswith("data.pkl") else whole.read(name))
        content = file.getvalue()
    with scratch() as folder:
        for name in ("model.pth", "adapter.pth"):
            path = folder / name
            path.write_bytes(content)
            assert all(isinstance(found, UserError) for found in open_pth(path))
            assert isinstance(outcome(load_lora, Transformer(ModelConfig(**SHAPE)), path), UserError)
    assert not Evil.ran


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Shape, files and flat file of three adapters for models of seed 0: plain, DoRA and a whole layer, of experts."""
    found = Hidden()
    for shape, settings in (
        (SHAPE, {}),
        (SHAPE, {"use_dora": True, "modules_to_save": ("lm_head",), "rank_pattern": {"q_proj": 3}}),
        (SHAPE | SPARSE, {"target_modules": "experts"}),
    ):
        folder = tmp_path_factory.mktemp("adapter")
        model = model_of(shape)
        apply_lora(model, LoRAConfig(rank=2, **settings))
        save_lora(model, folder / "dir")
        save_lora(model, folder / "flat.pth")
        found.append((shape, files_of(folder / "dir"), (folder / "flat.pth").read_bytes()))
    return found


def model_of(shape: dict) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape))


def check_adapter(shape: dict, path) -> None:
    """Fail unless the adapter is refused, and the model then is as it was, or it works."""
    model = model_of(shape)
    names, before = set(model.state_dict()), model(torch.tensor([[0, 1]]))
    error = outcome(load_lora, model, path)
    if isinstance(error, UserError):
        assert set(model.state_dict()) == names
        assert torch.equal(model(torch.tensor([[0, 1]])), before)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert str(path) in str(error)
    else:
        assert model(torch.tensor([[0, 1]])).shape == before.shape


@examples(250)
@given(st.data())
def test_a_damaged_adapter_is_refused_or_works(adapters, data):
    shape, files, _ = data.draw(st.sampled_from(adapters))
    with scratch() as folder:
        write_with_one_spoiled(data, files, folder, n_head=300)
        check_adapter(shape, folder)


@examples(150)
@given(st.data())
def test_an_adapter_of_odd_tensors_is_refused_or_works(adapters, data):
    shape, files, flat = data.draw(st.sampled_from(adapters))
    stored = torch.load(io.BytesIO(flat), weights_only=True)
    settings = stored.pop("lora_config")
    state = data.draw(odd_states(stored))
    with scratch() as folder:
        how = data.draw(st.sampled_from(["with settings", "mutated settings", "without settings"]))
        if how == "with settings":
            state["lora_config"] = settings
        elif how == "mutated settings":
            state["lora_config"] = data.draw(mutated(st.just(settings), small | values))
        (folder / "flat.pth").write_bytes(as_pth(state))
        check_adapter(shape, folder / "flat.pth")


@examples(80)
@given(st.data())
def test_a_damaged_flat_adapter_is_refused_or_works(adapters, data):
    shape, _, content = data.draw(st.sampled_from(adapters))
    with scratch() as folder:
        (folder / "flat.pth").write_bytes(data.draw(damaged(content) | st.binary(max_size=40)))
        check_adapter(shape, folder / "flat.pth")
