"""What the flags of the shape mean together: a mixture of experts from any preset, and flags that need one."""

import inspect

import pytest

from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse
from minillm.cli.eval_arguments import EvalArguments
from minillm.cli.model_arguments import EXPERT_FLAGS, ModelArguments
from minillm.config import PRESETS, ModelConfig
from minillm.errors import UserError
from minillm.hub.weights import preset_config


@pytest.fixture
def config(tmp_path):
    """Call it with flags; returns the configuration that training would take."""
    (tmp_path / "data.txt").write_text("a")
    return lambda *words: preset_config(parse(PretrainArguments, ["--data_path", str(tmp_path / "data.txt"), *words]))


@pytest.mark.parametrize("preset", PRESETS)
def test_use_moe_gives_any_preset_the_experts_of_preset_moe(config, preset):
    ours, moe = config("--preset", preset, "--use_moe"), ModelConfig.preset("moe")
    for name in (*EXPERT_FLAGS, "norm_topk_prob", "model_type"):
        if name != "moe_intermediate_size":
            assert getattr(ours, name) == getattr(moe, name), name
    dense = ModelConfig.preset(preset)
    assert (ours.hidden_size, ours.num_hidden_layers) == (dense.hidden_size, dense.num_hidden_layers)
    assert ours.moe_intermediate_size == ours.intermediate_size == dense.intermediate_size
    assert config("--preset", preset) == dense


def test_the_preset_moe_needs_no_flag(config):
    assert config("--preset", "moe") == config("--preset", "moe", "--use_moe") == ModelConfig.preset("moe")


@pytest.mark.parametrize(
    "words, family, shared",
    [
        ("", "glm4_moe", 1), ("--scoring_func sigmoid --n_shared_experts 2", "glm4_moe", 2),
        ("--scoring_func softmax", "mixtral", 0), ("--scoring_func softmax --use_qk_norm", "qwen3_moe", 0),
        ("--scoring_func softmax --n_shared_experts 2", "qwen2_moe", 2),
        ("--scoring_func softmax --n_shared_experts 1 --shared_expert_gate", "qwen2_moe", 1),
        ("--scoring_func softmax --use_qk_norm --norm_topk_prob 0 --num_experts_per_tok 1", "qwen3_moe", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", [["--use_moe"], ["--preset", "moe"]])
def test_scores_decide_the_family(config, start, words, family, shared):
    made = config(*start, *words.split())
    assert (made.model_type, made.n_shared_experts, made.num_experts) == (family, shared, 4)


def test_every_flag_of_the_experts_arrives(config):
    flags = {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "sigmoid",
    }  # fmt: skip
    made = config("--use_moe", *(word for name, value in flags.items() for word in (f"--{name}", str(value))))
    assert {name: getattr(made, name) for name in flags} == flags


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num_experts 8", "--num_experts 8: goes with --use_moe"),
        ("--scoring_func softmax", "--scoring_func softmax: goes with --use_moe"),
        ("--first_k_dense_replace 0", "--first_k_dense_replace 0: goes with --use_moe"),
        ("--norm_topk_prob 0", "--norm_topk_prob False: goes with --use_moe"),
        ("--use_moe --num_experts 0", "--num_experts 0: must be at least 1"),
        ("--use_moe --moe_intermediate_size 0", "--moe_intermediate_size 0: must be at least 1"),
        ("--use_moe --first_k_dense_replace -1", "--first_k_dense_replace -1: must be at least 0"),
        ("--use_moe --num_experts_per_tok 5", "num_experts_per_tok is 5: choose from 1 to num_experts 4"),
        ("--use_moe --num_experts_per_tok 1", "--num_experts_per_tok 1: .* learns nothing; .*--norm_topk_prob 0"),
        ("--use_moe --scoring_func softmax --n_shared_experts 1 --use_qk_norm", "no family has .*: qwen2_moe has no"),
        ("--use_moe --shared_expert_gate", "no family has this combination: glm4_moe has no shared_expert_gate=True"),
        ("--shared_expert_gate", "--shared_expert_gate True: goes with --use_moe"),
        ("--rope_theta 0", "--rope_theta 0.0: must be positive"),
        ("--use_moe --n_shared_experts 0", "n_shared_experts is 0"),
        ("--router_aux_loss_coef -1", "--router_aux_loss_coef -1.0: must be at least 0"),
        ("--router_z_loss_coef nan", "--router_z_loss_coef nan: must be at least 0"),
        ("--router_bias_update_speed -0.5", "--router_bias_update_speed -0.5: must be at least 0"),
    ],
)
def test_what_cannot_be(config, words, message):
    with pytest.raises(UserError, match=message):
        config(*words.split())


def test_evaluation_checks_the_same_flags():
    with pytest.raises(UserError, match="--num_experts 8: goes with --use_moe"):
        EvalArguments(num_experts=8).check()
    EvalArguments(use_moe=True, num_experts_per_tok=1).check()  # only training refuses a single expert


def test_every_field_has_a_help_text():
    lines = inspect.getsource(ModelArguments).splitlines()
    for name in ModelArguments.__annotations__:
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        assert lines[index + 1].strip().startswith('"""'), name
