"""Hugging Face's config.json, both ways, for every family; transformers is the reference."""

import json
import re

import pytest
import transformers

from minillm.config import PRESETS, ModelConfig
from minillm.config.families import ARCHITECTURES, N_EXPERTS
from minillm.errors import UserError

# ---- ours to theirs ----------------------------------------------------------------------------------------------


def test_transformers_opens_what_we_write(tools, make_config, family, scaling, tmp_path):
    config = make_config(family, rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.architectures) == (family, [ARCHITECTURES[family]])
    tools.assert_same(config, theirs)
    assert type(theirs) is type(tools.open_theirs({"model_type": family}))


def test_round_trip(make_config, family, scaling, tmp_path):
    config = make_config(family, rope_scaling=scaling)
    assert ModelConfig.from_hf(config.to_hf()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == config
    assert ModelConfig.from_hf(str(tmp_path)).to_hf() == config.to_hf()
    assert ModelConfig.from_hf(transformers.AutoConfig.from_pretrained(tmp_path).to_dict()) == config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True, "head_dim": 24, "tie_word_embeddings": False}])
def test_round_trip_of_presets(tools, preset, changes):
    config = ModelConfig.preset(preset, **changes, rms_norm_eps=1e-6, eos_token_id=3, bos_token_id=0)
    assert ModelConfig.from_hf(config.to_hf()) == config
    tools.assert_same(config, tools.open_theirs(config.to_hf()))


def test_a_mistral_without_window_is_a_llama(tools, make_config):
    values = make_config("mistral").to_hf() | {"sliding_window": None}
    config = ModelConfig.from_hf(values)
    assert config == make_config("mistral", sliding_window=None)
    assert config.model_type == "llama"
    assert tools.parameters_of(values) == config.num_parameters()


def test_a_sparse_family_without_experts_is_dense(tools, make_config):
    values = make_config("qwen3_moe").to_hf() | {"num_experts": 0}
    config = ModelConfig.from_hf(values)
    assert (config.model_type, config.num_experts) == ("qwen3", 0)
    assert tools.parameters_of(values) == config.num_parameters()


# ---- theirs to ours ----------------------------------------------------------------------------------------------

CUSTOM = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 60, "max_position_embeddings": 128, "rms_norm_eps": 2e-5, "initializer_range": 0.05,
    "bos_token_id": 4, "eos_token_id": [6, 7], "pad_token_id": 2, "tie_word_embeddings": True, "head_dim": 10,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 3e4, "factor": 2.0, "beta_fast": 16},
}  # fmt: skip
CUSTOM_SPECIAL = {
    "llama": {},
    "mistral": {"sliding_window": 33},
    "qwen2": {"use_sliding_window": False, "sliding_window": 33, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": False, "sliding_window": 33},
    "mixtral": {"sliding_window": 33, "num_local_experts": 6, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.1},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "norm_topk_prob": True,
        "mlp_only_layers": [1, 0],
    },
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 50, "qkv_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 1,
        "use_sliding_window": False, "sliding_window": 33, "max_window_layers": 2,
    },
    "glm4_moe": {
        "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "norm_topk_prob": False,
        "n_shared_experts": 2, "first_k_dense_replace": 2, "routed_scaling_factor": 1.5, "n_group": 3, "topk_group": 2,
        "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.8,
    },
}  # fmt: skip


def test_their_customised_class_is_read(tools, family):
    theirs = tools.open_theirs({"model_type": family} | CUSTOM | CUSTOM_SPECIAL[family])
    config = ModelConfig.from_hf(theirs.to_dict())
    assert config.model_type == family
    tools.assert_same(config, theirs)
    assert config.rope_scaling["original_max_position_embeddings"] == 128


def test_their_default_class_is_read(tools, family):
    # The default head of GLM, 4096 // 96 = 42, would turn 21 numbers; published ones have 128.
    said = {"head_dim": 128} if family == "glm4_moe" else {}
    theirs = tools.open_theirs({"model_type": family} | said)
    tools.assert_same(ModelConfig.from_hf(theirs.to_dict()), theirs)
    tools.assert_same(ModelConfig.from_hf({"model_type": family} | said), theirs)


# Defaults that do not fit the other values.
MISFITS = {
    ("qwen2", "num_key_value_heads"): "num_attention_heads 8 is not a multiple of num_key_value_heads 32",
    ("qwen3", "num_key_value_heads"): "num_attention_heads 8 is not a multiple of num_key_value_heads 32",
    ("qwen2_moe", "num_key_value_heads"): "num_attention_heads 8 is not a multiple of num_key_value_heads 16",
    ("qwen3_moe", "num_experts_per_tok"): "num_experts_per_tok is 8: choose from 1 to num_experts 6",
    ("glm4_moe", "num_experts_per_tok"): "num_experts_per_tok is 8: choose from 1 to num_experts 6",
    ("glm4_moe", "n_routed_experts"): "n_group 3, topk_group 2: num_experts 128 must divide",
    ("glm4_moe", "n_group"): "n_group 1, topk_group 2",
    ("glm4_moe", "topk_group"): "those chosen must hold num_experts_per_tok 3",
    ("glm4_moe", "partial_rotary_factor"): "an even number of a head's 10",
}


def test_what_a_file_leaves_out_is_what_transformers_takes(tools, family):
    """Each of its values, one after the other."""
    whole = {"model_type": family} | CUSTOM | CUSTOM_SPECIAL[family]
    for name in CUSTOM | CUSTOM_SPECIAL[family]:
        values = {key: value for key, value in whole.items() if key != name}
        if message := MISFITS.get((family, name)):
            with pytest.raises(UserError, match=message):
                ModelConfig.from_hf(values)
        else:
            tools.assert_same(ModelConfig.from_hf(values), tools.open_theirs(values))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "only_dense, step, sparse",
    [([], 1, [0, 1, 2, 3, 4]), ([1, 4], 1, [0, 2, 3]), ([], 2, [1, 3]), ([0, 1, 3], 2, []), ([0, 4], 3, [2])],
)
def test_which_blocks_have_experts(tools, make_config, model_type, only_dense, step, sparse):
    values = make_config(model_type).to_hf() | {"mlp_only_layers": only_dense, "decoder_sparse_step": step}
    values["num_hidden_layers"] = 5
    if not sparse:
        with pytest.raises(UserError, match="none of the 5 blocks"):
            ModelConfig.from_hf(values)
        return
    config = ModelConfig.from_hf(values)
    assert list(filter(config.has_experts, range(5))) == sparse
    assert config.to_hf()["mlp_only_layers"] == only_dense
    assert config.num_parameters() == tools.parameters_of(values)  # as many blocks of each kind as in theirs


@pytest.mark.parametrize(
    "model_type, name",
    [
        ("llama", "num_key_value_heads"), ("llama", "head_dim"), ("llama", "bos_token_id"), ("llama", "eos_token_id"),
        ("mistral", "sliding_window"), ("mistral", "head_dim"), ("mistral", "eos_token_id"),
        ("qwen2", "num_key_value_heads"), ("qwen3", "num_key_value_heads"), ("mixtral", "sliding_window"),
        ("mixtral", "head_dim"), ("qwen3_moe", "mlp_only_layers"),
        ("qwen2_moe", "mlp_only_layers"), ("qwen2_moe", "bos_token_id"),
    ],
)  # fmt: skip
def test_null_is_not_the_same_as_silence(tools, model_type, name):
    values = {"model_type": model_type} | CUSTOM | CUSTOM_SPECIAL[model_type] | {name: None}
    tools.assert_same(ModelConfig.from_hf(values), tools.open_theirs(values))


def test_null_for_the_kv_heads_means_no_groups_in_every_family():
    """As in transformers 4, which wrote such files; 5 refuses some of them."""
    assert ModelConfig.from_hf({"model_type": "mistral", "num_key_value_heads": None}).num_key_value_heads == 32


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "intermediate_size", "tie_word_embeddings"])
def test_null_that_means_nothing_is_refused(name):
    values = {"model_type": "qwen3", "vocab_size": 11} | {name: None}
    with pytest.raises(UserError, match=f"null instead of a value for: {name}$"):
        ModelConfig.from_hf(values)


def test_no_end_token_at_all():
    assert ModelConfig.from_hf({"model_type": "llama", "eos_token_id": []}).eos_token_id is None


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_both_names_of_the_number_of_experts(tools, model_type, name):
    values = {"model_type": model_type} | CUSTOM | CUSTOM_SPECIAL[model_type] | {"num_experts_per_tok": 2}
    for old in N_EXPERTS[model_type]:
        values.pop(old, None)
    values[name] = 5
    config = ModelConfig.from_hf(values)
    assert config.num_experts == 5
    tools.assert_same(config, tools.open_theirs(values))


def test_two_numbers_of_experts_are_refused():
    values = {"model_type": "glm4_moe", "n_routed_experts": 8, "num_local_experts": 16, "head_dim": 128}
    with pytest.raises(UserError, match=r"two numbers of experts: \{'n_routed_experts': 8, 'num_local_experts': 16\}"):
        ModelConfig.from_hf(values)
    assert ModelConfig.from_hf(values | {"num_local_experts": 8}).num_experts == 8
    with pytest.raises(UserError, match="two numbers of experts"):
        ModelConfig.from_hf({"model_type": "mixtral", "num_local_experts": 8, "num_experts": 4})


# ---- rotary positions: the old layout and the new ----------------------------------------------------------------

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


ROPES = [
    {"rope_theta": 7e3},
    {"rope_theta": 70000, "rope_scaling": None},
    {"rope_theta": 7e3, "rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 7e3, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}},
    {"rope_theta": 7e3, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
    {"rope_theta": 7e3, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4, "attention_factor": None}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings": 16},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}},
    {"rope_parameters": {"rope_theta": 7e3}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7e3},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e3}, "rope_theta": 8e3},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e3, "factor": 8.0, **LLAMA3}},
    {"rope_parameters": {"rope_theta": 7e3}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 7e3, "rope_type": "linear", "factor": 2.0}, "rope_scaling": {}},
]


def test_both_layouts_of_rope(tools, family):
    plain = {name: value for name, value in CUSTOM.items() if name != "rope_parameters"}
    for rope in ROPES:
        values = {"model_type": family} | plain | CUSTOM_SPECIAL[family] | rope
        tools.assert_same(ModelConfig.from_hf(values), tools.open_theirs(values))


@pytest.mark.parametrize(
    "rope, factor",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 0.5),
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"partial_rotary_factor": 0.25, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}, 1.0),
        ({"partial_rotary_factor": 0.25, "rope_parameters": {"rope_theta": 1e4}}, 0.25),
    ],
)
def test_the_turned_part_of_a_head(tools, rope, factor):
    values = {"model_type": "glm4_moe", "head_dim": 64} | rope
    config = ModelConfig.from_hf(values)
    assert config.partial_rotary_factor == factor
    written = config.to_hf()  # releases differ in where they look, and take 0.5 where they find nothing
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == factor
    tools.assert_same(config, tools.open_theirs(values))


def test_dynamic_scaling_keeps_its_original_length(tools):
    """Theirs is max_position_embeddings; ours is the longest sequence, which is what the scaling is for."""
    scaling = {"rope_type": "dynamic", "factor": 2.5, "original_max_position_embeddings": 32}
    config = ModelConfig(max_position_embeddings=80, rope_scaling=scaling)
    assert tools.open_theirs(config.to_hf()).max_position_embeddings == 32
    assert ModelConfig.from_hf(config.to_hf()).max_position_embeddings == 80
    # Another length beside max_position_embeddings is not read by transformers, so neither by us.
    foreign = {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": scaling}
    config = ModelConfig.from_hf(foreign)
    assert (config.max_position_embeddings, config.rope_scaling) == (64, {"rope_type": "dynamic", "factor": 2.5})


def test_rope_scaling_beside_rope_parameters_wins(tools):
    """to_hf writes both; who edits rope_scaling changes the model in transformers, and so in ours."""
    values = ModelConfig.preset("demo").to_hf() | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert tools.open_theirs(values).rope_parameters["rope_type"] == "linear"
    assert ModelConfig.from_hf(values).rope_scaling == {"rope_type": "linear", "factor": 2.0}


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


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),  # theirs has one in the output, too
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("mistral", {"n_routed_experts": 8, "use_qk_norm": True}, "use_qk_norm=True, n_routed_experts=8"),
        ("mixtral", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("mistral", {"layer_types": ["sliding_attention"], "sliding_window": None}, "layer_types="),
        ("mixtral", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("glm4_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts=1"),
        ("qwen3_moe", {"n_shared_experts": 2}, "n_shared_experts=2"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1"),
        ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config"),
    ],
)
def test_settings_that_would_change_the_result_are_refused(make_config, model_type, changes, message):
    fix = rf".*\(model_type '{model_type}'\); correct the file, or use another model$"
    with pytest.raises(UserError, match=f"uses what this model does not have: {message}{fix}"):
        ModelConfig.from_hf(make_config(model_type).to_hf() | changes)


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("llama", {"partial_rotary_factor": 0.6}, r"combination: llama has no partial_rotary_factor=0\.6; leave"),
        ("mixtral", {"norm_topk_prob": False}, "combination: mixtral has no norm_topk_prob=False"),
        ("qwen2_moe", {"routed_scaling_factor": 2.5}, r"combination: qwen2_moe has no routed_scaling_factor=2\.5"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "none of the 3 blocks"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, r"mlp_only_layers is \('1',\): it must be a list of numbers"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, r"combination: qwen3_moe has no routed_scaling_factor=2\.5"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_type 'longrope' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, r"it needs \['factor'\]"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, r"it needs \['factor'\]"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5"),
        ("qwen3", {"rope_scaling": {"full_attention": {"rope_theta": 1e4}}}, r"has the keys \['full_attention'\]"),
        ("qwen2", {"num_attention_heads": "6"}, "num_attention_heads is '6'"),
        ("qwen2", {"num_attention_heads": "6", "head_dim": None}, "num_attention_heads is '6'"),
        ("qwen2", {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    ],
)
def test_values_that_cannot_be_are_refused(make_config, model_type, changes, message):
    values = make_config(model_type).to_hf() | {"rope_parameters": None} | changes
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(values)


def test_their_default_glm_turns_an_odd_part_of_its_heads():
    with pytest.raises(UserError, match=r"partial_rotary_factor is 0\.5: .* an even number of a head's 42"):
        ModelConfig.from_hf({"model_type": "glm4_moe"})


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_an_unknown_family_lists_those_there_are(model_type):
    supported = "llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, glm4_moe, minimind"
    with pytest.raises(UserError, match=f"model_type {model_type!r} is not supported; supported are: {supported}$"):
        ModelConfig.from_hf({"model_type": model_type})


@pytest.mark.parametrize("content", ["[1]", "null", '"llama"'])
def test_a_file_that_holds_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        ModelConfig.from_hf(tmp_path)


def test_a_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"layer_types": 3}, "layer_types is 3: it must be a list"),
        ({"layer_types": [["full_attention"]]}, "layer_types="),
        ({"mlp_only_layers": [0, "1"]}, "mlp_only_layers="),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": float("-inf"), "original_max_position_embeddings": 2048}},
         "factor is -inf"),
        ({"model_type": "mixtral", "num_local_experts": [4], "num_experts": [5]}, "two numbers of experts"),
        ({"model_type": "minimind", "hidden_size": 10**400, "intermediate_size": None}, "hidden_size is 10+"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf({"model_type": "llama", "max_position_embeddings": 2048} | changes)


def test_a_file_is_named(tmp_path):
    unfit = b'{"model_type": "llama", "vocab_size": 0}'
    for content in (b"\xff\xfe{}", b"[" * 100_000, b'{"model_type": "gpt2"}', unfit):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(tmp_path))):
            ModelConfig.from_hf(tmp_path)
