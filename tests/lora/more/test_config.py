"""The settings of an adapter: which layers they name, what rank and scale these get, and peft's file of them."""

import json
import math

import peft
import pytest

from minillm.errors import UserError
from minillm.lora import LoRAConfig

NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 11)
         for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip


def targets(**settings):
    config = LoRAConfig(**settings)
    return [name for name in NAMES if config.is_target(name)]


def test_words_stand_for_names():
    assert LoRAConfig(target_modules="attention, mlp").target_names == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert targets(target_modules="attention") == [name for name in NAMES if "self_attn" in name]
    assert targets(target_modules=("mlp", "q_proj")) == [n for n in NAMES if "mlp" in n or "q_proj" in n]
    assert LoRAConfig(target_modules="all-linear").is_target(NAMES[0]) is None  # decided by its kind


@pytest.mark.parametrize(
    "wanted, found",
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                    "model.layers.11.self_attn.q_proj"]),
        ("roj", []),
        ("1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),  # whole parts of the name, so not block 11
        (r".*\.1\d\.mlp\..*", ["model.layers.11.mlp.up_proj", "model.layers.11.mlp.down_proj"]),
        (r"layers\.0", []),  # a regular expression must match the whole name
    ],
)  # fmt: skip
def test_names_are_ends_and_expressions_are_whole(wanted, found):
    assert targets(target_modules=wanted) == found


def test_blocks_are_numbers():
    assert targets(target_modules="up_proj", layers=(1, 11)) == [
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
    ]
    assert LoRAConfig(layers=(1,)).is_target("lm_head") is False  # in no block


def test_scaling():
    name = "model.layers.1.mlp.up_proj"
    assert LoRAConfig(rank=8, alpha=16).scaling_of(name) == 2
    assert LoRAConfig(rank=16, alpha=8, use_rslora=True).scaling_of(name) == 2
    patterns = {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {r"1\.mlp\.up_proj": 6}}
    config = LoRAConfig(rank=8, alpha=16, **patterns)
    assert (config.rank_of(name), config.scaling_of(name)) == (4, 1.5)
    assert config.scaling_of("model.layers.11.mlp.up_proj") == 4
    assert config.rank_of("model.layers.1.mlp.down_proj") == 8
    assert LoRAConfig(**patterns, use_rslora=True).scaling_of(name) == 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 0}, "rank is 0: give a whole number of at least 1"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj': rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": 10**400}, "alpha is 10+: give a number above 0"),
        ({"target_modules": (["q_proj"],)}, "target_modules is .*: give all-linear, or names of layers"),
        ({"rank_pattern": {"(": 3}}, r"'\(' is not a regular expression"),
        ({"alpha": "16"}, "alpha is '16'"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern 'q_proj': alpha is -1"),
        ({"dropout": 1.0}, "dropout is 1.0: give a number from 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"bias": "some"}, "choose none, all or lora_only"),
        ({"use_dora": True, "init": "pissa"}, "use_dora does not work with init 'pissa'"),
    ],
)
def test_values_out_of_range_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        LoRAConfig(**settings)


def test_to_peft_and_back():
    config = LoRAConfig(
        rank=6, alpha=9.0, dropout=0.1, target_modules=("q_proj", "up_proj"), bias="lora_only", use_rslora=True,
        modules_to_save=("lm_head",), rank_pattern={"up_proj": 3}, alpha_pattern={"0.self_attn.q_proj": 2.0},
    )  # fmt: skip
    names = [name for name in NAMES if config.is_target(name)]
    raw = json.loads(json.dumps(config.to_peft(names=names, whole=["lm_head"], base="a/b")))
    theirs = peft.LoraConfig(**raw)
    assert theirs.to_dict()["base_model_name_or_path"] == "a/b"
    again = LoRAConfig.from_peft(raw)
    assert [name for name in NAMES if again.is_target(name)] == names
    for name in names:
        assert (again.rank_of(name), again.scaling_of(name)) == (config.rank_of(name), config.scaling_of(name))
    for key in ("dropout", "bias", "modules_to_save", "use_rslora", "use_dora"):
        assert getattr(again, key) == getattr(config, key)
    assert LoRAConfig.from_peft(theirs.to_dict()).scaling_of(names[0]) == config.scaling_of(names[0])


def test_pefts_own_defaults_are_read():
    config = LoRAConfig.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]})
    theirs = peft.LoraConfig(target_modules=["q_proj"])
    assert (config.rank, config.alpha, config.dropout) == (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
