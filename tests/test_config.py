"""The configuration: derived sizes, presets, Hugging Face's file both ways, refusals."""

import json

import pytest
import torch
import transformers

from minillm.config import PRESETS, ModelConfig
from minillm.errors import UserError
from minillm.model import Transformer


def test_derived_sizes():
    config = ModelConfig(hidden_size=384, num_attention_heads=6)
    assert (config.head_dim, config.intermediate_size) == (64, 1024)  # 8 · 384 / 3 = 1,024
    assert ModelConfig(hidden_size=512).intermediate_size == 1408  # 1,365.3 rounded up to a multiple of 64


@pytest.mark.parametrize("name, millions", [("small", 26), ("base", 104), ("demo", 0.9)])
def test_presets_have_the_stated_size(name, millions):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert n_parameters == config.num_parameters()
    assert n_parameters / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"use_qk_norm": True, "head_dim": 40}])
def test_parameters_are_counted(changes):
    config = ModelConfig(num_hidden_layers=2, **changes)
    with torch.device("meta"):
        assert config.num_parameters() == sum(p.numel() for p in Transformer(config).parameters())


def test_flops_of_a_token():
    """Two per weight and product forward, four backward; scores and mixing 2·H·K·T each, three times."""
    config = ModelConfig.preset("demo")
    matrices = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384) + 128 * 1024
    norms = 9 * 128
    assert config.flops_per_token(100) == 6 * (matrices + norms) + 4 * 3 * 2 * 2 * 128 * 100


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", [{}, {"use_qk_norm": True, "head_dim": 24, "tie_word_embeddings": False}])
def test_round_trip(preset, family, tmp_path):
    config = ModelConfig.preset(preset, **family, rms_norm_eps=1e-6, rope_theta=5e5, eos_token_id=3, bos_token_id=0)
    assert ModelConfig.from_hf(config.to_hf()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.head_dim == config.head_dim
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_what_old_files_leave_out_is_their_default():
    """A Llama file of transformers 4: no kv heads, theta at the top level, a list of end tokens."""
    old = {
        "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 12, "eos_token_id": [2, 3], "rope_scaling": None,
    }  # fmt: skip
    config = ModelConfig.from_hf(old)
    assert (config.num_key_value_heads, config.rope_theta, config.eos_token_id) == (2, 10000.0, 2)
    assert (config.tie_word_embeddings, config.rms_norm_eps) == (False, 1e-6)
    assert ModelConfig.from_hf(old | {"rope_theta": 5e5}).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 8"),
        ({"hidden_size": 100, "head_dim": 8}, "the Llama family does not allow it"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"head_dim": 8.0}, "head_dim is 8.0"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"intermediate_size": 100.0}, "intermediate_size is 100.0"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


def test_qwen3_takes_any_head_width():
    assert ModelConfig(hidden_size=100, head_dim=8, use_qk_norm=True).head_dim == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are: llama, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_settings_that_would_change_the_result_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(ModelConfig.preset("demo").to_hf() | changes)


def test_rope_scaling_beside_rope_parameters_counts_in_transformers_too():
    """The reason to refuse it: to_hf writes rope_parameters, a user adds rope_scaling, and they apply it."""
    values = ModelConfig.preset("demo").to_hf() | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert transformers.AutoConfig.for_model(**values).rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_rope_scaling_that_changes_nothing_is_read(scaling):
    values = ModelConfig.preset("demo").to_hf() | {"rope_scaling": scaling}
    assert (
        ModelConfig.from_hf(values).rope_theta
        == transformers.AutoConfig.for_model(**values).rope_parameters["rope_theta"]
    )


@pytest.mark.parametrize("content", ["[1]", "null", '"llama"'])
def test_a_file_that_holds_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        ModelConfig.from_hf(tmp_path)


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(UserError, match="unknown preset 'huge'; there are: small, base, demo"):
        ModelConfig.preset("huge")
