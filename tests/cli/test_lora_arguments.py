"""The flags of train_lora.py: what they mean for the adapter, and each range check."""

import dataclasses

import pytest

from minillm.cli.arguments import LoRAArguments
from minillm.errors import UserError
from minillm.lora import LoRAConfig


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_the_known_flags_are_there_with_defaults_that_others_rely_on(file):
    known = {"lora_name", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "replay_path", "monitor"}
    assert {field.name for field in dataclasses.fields(LoRAArguments)} >= known
    args = LoRAArguments(data_path=file)
    args.check()
    assert args.from_weight == "full_sft"
    assert args.lora_config == LoRAConfig()


def test_every_flag_reaches_the_adapter(file):
    args = LoRAArguments(
        data_path=file, lora_rank=4, lora_alpha=3.5, lora_dropout=0.25, target_modules="q_proj, mlp",
        lora_layers="0, 2", rank_pattern="down_proj=16,layers.0.mlp.up_proj=2", alpha_pattern="down_proj=8.5",
        lora_bias="all", modules_to_save="lm_head, embed_tokens", use_rslora=True, use_dora=True,
        lora_init="orthogonal", lora_init_std=0.01,
    )  # fmt: skip
    args.check()
    assert args.lora_config == LoRAConfig(
        rank=4, alpha=3.5, dropout=0.25, target_modules="q_proj, mlp", layers=(0, 2),
        rank_pattern={"down_proj": 16, "layers.0.mlp.up_proj": 2}, alpha_pattern={"down_proj": 8.5}, bias="all",
        modules_to_save=("lm_head", "embed_tokens"), use_rslora=True, use_dora=True, init="orthogonal",
        init_std=0.01,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_rank", 0, "rank is 0"), ("lora_alpha", 0.0, "alpha is 0.0"), ("lora_dropout", 1.0, "dropout is 1.0"),
        ("lora_layers", "a,1", "--lora_layers a,1: must be numbers"),
        ("rank_pattern", "down_proj", "--rank_pattern down_proj: must be NAME=NUMBER"),
        ("rank_pattern", "down_proj=1.5", "--rank_pattern down_proj=1.5: must be NAME=NUMBER"),
        ("rank_pattern", "down_proj=0", "rank_pattern 'down_proj': rank is 0"),
        ("alpha_pattern", "=3", "--alpha_pattern =3: must be NAME=NUMBER"),
        ("from_weight", "", "--from_weight is empty"),
        ("lora_name", "", "--lora_name ''"), ("lora_name", "a/b", "--lora_name 'a/b'"),
        ("loraplus_ratio", 0.0, "--loraplus_ratio 0.0: must be positive"),
        ("monitor_interval", -1, "--monitor_interval -1: must not be negative"),
        ("replay_ratio", 1.0, "--replay_ratio 1.0: must lie between 0 and 1"),
        ("replay_path", "nowhere.jsonl", "--replay_path nowhere.jsonl: no such file"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(file, name, value, message):
    with pytest.raises(UserError) as raised:
        LoRAArguments(data_path=file, **{name: value}).check()
    assert message in str(raised.value)


def test_settings_that_do_not_go_together_are_refused(file):
    with pytest.raises(UserError, match="init_std does not work with init 'kaiming': choose gaussian or orthogonal"):
        LoRAArguments(data_path=file, lora_init_std=0.01).check()
    with pytest.raises(UserError, match=r"init_std is -0\.1: give a number from 0"):
        LoRAArguments(data_path=file, lora_init="gaussian", lora_init_std=-0.1).check()
    with pytest.raises(UserError, match="use_dora does not work with init 'pissa'"):
        LoRAArguments(data_path=file, use_dora=True, lora_init="pissa").check()
