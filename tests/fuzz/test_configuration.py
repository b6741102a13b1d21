"""Configurations and command lines of any content: what was meant, or one clear error."""

import contextlib
import dataclasses
import io
import json
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.cli.arguments import (
    DistillArguments,
    LoRAArguments,
    PreferenceArguments,
    PretrainArguments,
    ReasonArguments,
    SFTArguments,
    TokenizerArguments,
)
from minillm.cli.command_line import parse
from minillm.config import PRESETS, ModelConfig
from minillm.config.families import ARCHITECTURES
from minillm.errors import UserError

from .strategies import TIMEOUT_S, as_json, damaged, examples, mutated, outcome, scratch, texts, values

pytestmark = pytest.mark.timeout(TIMEOUT_S)

# ---- the shape of a model ----------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 3e-6, "rope_theta": 5e5,
    "bos_token_id": 5, "eos_token_id": 7,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True, "head_dim": 14},
    "mixtral": {"num_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "use_qk_norm": True,
                  "norm_topk_prob": False, "first_k_dense_replace": 1},
    "glm4_moe": {"num_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 2, "scoring_func": "sigmoid",
                 "n_group": 4, "topk_group": 3, "use_qk_norm": True, "partial_rotary_factor": 0.5, "head_dim": 16},
}  # fmt: skip
SCALINGS = st.sampled_from([
    None,
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20, "truncate": False},
])  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
MORE_KEYS = (
    "rope_parameters", "layer_types", "mlp_only_layers", "num_local_experts", "n_routed_experts", "use_sliding_window",
    "hidden_act", "quantization_config", "use_moe", "dropout", "model_type", "decoder_sparse_step", "pretraining_tp",
)  # fmt: skip

shapes = st.builds(
    lambda family, scaling: SHAPE | FAMILIES[family] | {"rope_scaling": scaling},
    st.sampled_from(sorted(FAMILIES)),
    SCALINGS,
)
files = shapes.map(lambda shape: json.loads(json.dumps(ModelConfig(**shape).to_hf())))
minimind = st.fixed_dictionaries(
    {"model_type": st.just("minimind"), "hidden_size": st.sampled_from([64, 96])},
    optional={"n_routed_experts": st.integers(0, 4), "use_moe": st.booleans(), "num_experts": st.integers(0, 4)},
)
sensible = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 48, 1.0, 2.0, True, False, None])
odd_files = st.one_of(
    mutated(files | minimind, values | sensible),
    st.builds(
        lambda file, more: file | more,
        files | minimind,
        st.dictionaries(st.sampled_from([*FIELDS, *MORE_KEYS]), values | sensible, max_size=3),
    ),
    st.builds(
        lambda family, more: {"model_type": family} | more,
        st.sampled_from(sorted(ARCHITECTURES)),
        st.dictionaries(st.sampled_from(FIELDS), sensible),
    ),
)


def check_round_trip(config: ModelConfig) -> None:
    """Fail unless a configuration comes back from its file as it was, and says numbers that can be computed with."""
    file = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(file) == config
    assert ModelConfig.from_hf(file).to_hf() == config.to_hf()
    assert config.num_parameters() >= config.num_parameters(active=True) > 0
    assert config.flops_per_token(16) > 0


@examples(300)
@given(odd_files)
@example(
    {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "dynamic", "factor": float("-inf"), "original_max_position_embeddings": 2048},
    }
)
@example({"model_type": "llama", "rms_norm_eps": 10**400})
@example({"model_type": "llama", "num_hidden_layers": 10**12})
def test_a_config_json_is_understood_exactly_or_refused(raw):
    before = json.dumps(raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict):
        return
    config = outcome(ModelConfig.from_hf, raw)
    assert json.dumps(raw) == before
    if not isinstance(config, UserError):
        check_round_trip(config)


@examples(250)
@given(shapes, st.dictionaries(st.sampled_from(FIELDS), values | sensible | SCALINGS, max_size=3))
def test_a_shape_is_taken_exactly_or_refused(shape, changes):
    config = outcome(ModelConfig, **(shape | changes))
    if not isinstance(config, UserError):
        check_round_trip(config)


@examples(60)
@given(st.sampled_from(sorted(PRESETS)), st.dictionaries(st.sampled_from(FIELDS), sensible, max_size=2))
def test_presets_with_any_changes(name, changes):
    config = outcome(ModelConfig.preset, name, **changes)
    if not isinstance(config, UserError):
        check_round_trip(config)


@examples(120)
@given(st.data())
def test_a_damaged_config_json_is_named(data):
    content = json.dumps(data.draw(files)).encode()
    with scratch() as folder:
        path = folder / "config.json"
        path.write_bytes(data.draw(damaged(content) | st.binary(max_size=40) | values.map(as_json)))
        config = outcome(ModelConfig.from_hf, folder)
    if not isinstance(config, UserError):
        check_round_trip(config)
    else:
        assert str(folder) in str(config)


# ---- the command line --------------------------------------------------------------------------------------------

CLASSES = (
    PretrainArguments, SFTArguments, LoRAArguments, PreferenceArguments, DistillArguments, ReasonArguments,
    TokenizerArguments,
)  # fmt: skip
classes = st.sampled_from(CLASSES)
YAML_LIKE = (
    "1e-3", "0x1F", "1_000", "12:30", "2024-99-99", "2024-01-01", ".nan", ".inf", "~", "yes", "!!python/name:os",
    "&a [*a]", "*b", "? [1]\n: 2", "{[1]: 2}", "- 1", "%TAG", "<<: 3", "!!binary xx", "!!int x", "!!float x",
    "!!bool x", "!!timestamp x", "\t",
)  # fmt: skip


def parsed(cls, argv):
    """Return the arguments, or None for an error of ours or of the flags."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return parse(cls, argv)
    except UserError:
        return None
    except SystemExit as end:
        if end.code not in (0, 2):
            raise
        return None


def check_types(arguments) -> None:
    """Fail unless every value is of its field's type: what YAML brings is not checked by anything else."""
    for name, kind in get_type_hints(type(arguments)).items():
        value, choices = getattr(arguments, name), get_args(kind)
        if any(get_args(choice) for choice in choices):  # Literal[...] | None
            choices = (*get_args(choices[0]), None)
        allowed = (
            value in choices if choices and not isinstance(choices[0], type) else isinstance(value, choices or kind)
        )
        assert allowed, (name, value)
        assert kind is bool or not isinstance(value, bool), (name, value)


def names_of(cls) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@examples(50)
@given(
    classes.flatmap(
        lambda cls: st.tuples(
            st.just(cls),
            st.lists(
                st.tuples(
                    st.sampled_from([*names_of(cls), "config", "help", "x"]),
                    texts | values.map(str) | st.sampled_from(["1", "0.5", "true", "yarn:4", "none", "cosine"]),
                ),
                max_size=4,
            ),
        )
    ),
    st.booleans(),
    st.lists(texts, max_size=1),
)
def test_any_flags_are_understood_or_refused(chosen, joined, more):
    cls, flags = chosen
    words = [word for name, value in flags for word in ([f"--{name}={value}"] if joined else [f"--{name}", value])]
    arguments = parsed(cls, ["--data_path", __file__, *words, *more])
    if arguments is not None:
        check_types(arguments)


@examples(120)
@given(
    classes,
    st.binary(max_size=30)
    | st.text(max_size=30).map(str.encode)
    | st.lists(st.sampled_from(YAML_LIKE), max_size=3).map(lambda parts: "\n".join(parts).encode()),
)
@example(PretrainArguments, b"[" * 3000)
@example(PretrainArguments, b"seed: " + b"9" * 400)
def test_any_bytes_as_yaml_are_refused(cls, content):
    with scratch() as folder:
        (folder / "c.yaml").write_bytes(content)
        parsed(cls, ["--data_path", __file__, "--config", str(folder / "c.yaml")])


@examples(60)
@given(
    classes.flatmap(
        lambda cls: st.tuples(
            st.just(cls),
            st.dictionaries(st.sampled_from(names_of(cls)), values | sensible | st.sampled_from(YAML_LIKE), max_size=3),
        )
    ),
    st.booleans(),
)
def test_values_of_yaml_have_their_types_or_are_refused(chosen, is_raw):
    cls, content = chosen
    with scratch() as folder:
        path = folder / "c.yaml"
        text = "\n".join(f"{name}: {value}" for name, value in content.items()) if is_raw else yaml.safe_dump(content)
        path.write_bytes(text.encode(errors="surrogatepass"))
        arguments = parsed(cls, ["--config", str(path), "--data_path", __file__])
    if arguments is not None:
        check_types(arguments)
