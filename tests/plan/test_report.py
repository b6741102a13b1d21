"""The figures of a plan fit each other."""

import pytest

from minillm.cli.command_line import parse
from minillm.plan.arguments import PlanArguments
from minillm.plan.report import make_plan


def plan_of(*flags: str) -> dict:
    return make_plan(parse(PlanArguments, [*flags]))


@pytest.fixture(scope="module")
def plan():
    return plan_of("--preset", "small", "--batch_size", "16", "--ranks", "2", "--gpus", "T4,A100-80")


def test_numbers_of_the_run(plan):
    assert plan["parameters"]["total"] == plan["parameters"]["trained"] == 25_829_888
    assert plan["tokens"] == 20 * 25_829_888
    assert plan["tokens_per_update"] == 16 * 512 * 2
    assert plan["memory"]["snapshot"] == 12 * 25_829_888
    assert plan_of("--async_save", "0", "--gpus", "T4")["memory"]["snapshot"] == 0
    assert plan_of("--tokens", "1e9", "--gpus", "T4")["tokens"] == 1e9


def test_the_largest_micro_batch_is_the_largest(plan):
    most = plan["gpus"]["T4"]["engines"]["ddp"]["largest_batch_size"]
    assert most > 16
    for rows, fits in ((most, True), (most + 1, False)):
        again = plan_of("--preset", "small", "--batch_size", str(rows), "--ranks", "2", "--gpus", "T4")
        assert again["gpus"]["T4"]["engines"]["ddp"]["fits"] is fits


def test_hours_follow_the_peak_and_the_dtype(plan):
    t4, a100 = plan["gpus"]["T4"], plan["gpus"]["A100-80"]
    assert (t4["dtype"], a100["dtype"]) == ("float16", "bfloat16")
    assert t4["hours"] / a100["hours"] == pytest.approx(312 / 65)
    slower = plan_of("--preset", "small", "--ranks", "2", "--gpus", "T4", "--gradient_checkpointing")
    assert 1.2 < slower["gpus"]["T4"]["hours"] / t4["hours"] < 4 / 3


def test_advice_names_the_smallest_gpu_or_the_way_out(plan):
    assert plan["recommendation"][0].startswith("It fits T4, the whole model on each GPU")
    wide = ["--hidden_size", "4096", "--num_hidden_layers", "24", "--num_attention_heads", "32", "--gpus", "3090"]
    alone = plan_of("--preset", "base", "--batch_size", "64", "--max_seq_len", "1024", "--gpus", "T4")
    assert not alone["gpus"]["T4"]["engines"]["ddp"]["fits"]
    assert "--gradient_checkpointing takes" in " ".join(alone["recommendation"])
    many = plan_of(*wide, "--batch_size", "1", "--ranks", "16", "--gradient_checkpointing")
    assert "It fits 3090, --parallel fsdp" in " ".join(many["recommendation"])
