"""The planner's arguments: what they mean, and what is refused."""

import pytest

from minillm.cli.command_line import parse
from minillm.errors import UserError
from minillm.plan.arguments import PlanArguments


def test_shape_flags_are_those_of_training():
    args = parse(PlanArguments, ["--preset", "base", "--use_moe", "--num_experts", "8", "--vocab_size", "100"])
    config = args.config
    assert (config.hidden_size, config.num_experts, config.vocab_size) == (768, 8, 100)
    assert args.async_save


def test_micro_batches_follow_from_the_global_batch():
    args = parse(PlanArguments, ["--batch_size", "4", "--ranks", "2", "--global_batch_size", "64"])
    assert args.micro_batches == 8
    assert parse(PlanArguments, ["--accumulation_steps", "3"]).micro_batches == 3


def test_gpus_by_name():
    assert parse(PlanArguments, ["--gpus", "4090, H100"]).gpu_names == ["4090", "H100"]
    assert len(parse(PlanArguments, []).gpu_names) == 12


def test_longer_rows_need_scaled_positions():
    flags = ["--preset", "demo", "--max_seq_len", "4096"]
    with pytest.raises(UserError, match="--max_seq_len 4096: the model has 2048 positions"):
        parse(PlanArguments, flags)
    assert parse(PlanArguments, [*flags, "--rope_scaling", "yarn:4"]).config.max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--tokens", "nan"], "--tokens nan"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0"),
        (["--mfu", "1.5"], "--mfu 1.5"),
        (["--global_batch_size", "12", "--batch_size", "8"], "multiple of batch_size x ranks = 8"),
        (["--base_dtype", "bfloat16"], "goes with --lora_rank"),
        (["--gpus", "4090,TPU"], "--gpus TPU: choose from"),
        (["--num_experts", "4"], "goes with --use_moe"),
        (["--hidden_size", "100", "--num_attention_heads", "8"], "not a multiple"),
    ],
)
def test_bad_values_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        parse(PlanArguments, flags)
