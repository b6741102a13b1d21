"""What ranks hold: ZeRO's own figures, and ours beside them."""

import pytest

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.plan.activations import Step
from minillm.plan.engines import ENGINES, layout, snapshot_bytes, zero_bytes
from minillm.plan.memory import moments
from minillm.plan.parameters import count_parameters, meta_model

CONFIG = ModelConfig.preset("base")
PARAMETERS = count_parameters(meta_model(CONFIG))
GB = 1e9


def held(engine: str, *, ranks: int = 8, **changes):
    step = Step(config=CONFIG, batch_size=4, seq_len=512, on_gpu=True, **({"dtype": "bfloat16"} | changes))
    return layout(engine, step, PARAMETERS, ranks=ranks)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example(stage, gigabytes):
    """ZeRO (2020), figure 1: 7.5 billion parameters, 64 ranks, K = 12."""
    assert zero_bytes(7.5e9, stage=stage, ranks=64) / GB == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 60.9), (2, 31.4), (3, 1.9)])
def test_the_same_with_float32_weights(stage, gigabytes):
    """16 bytes too, but 4 + 4 + 8: the optimizer's part is smaller, so that stage 1 saves less."""
    size = zero_bytes(7.5e9, stage=stage, ranks=64, weight=4, gradient=4, optimizer=8)
    assert size / GB == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_in_bfloat16_is_the_paper(stage):
    found = held(f"zero{stage}")
    total = found.weights + found.gradients + found.optimizer
    assert total == pytest.approx(zero_bytes(PARAMETERS.total, stage=stage, ranks=8))
    assert found.short_weights


def test_deepspeed_in_float32_has_masters_besides():
    first, third = (held(engine, dtype="float32") for engine in ("zero1", "zero3"))
    n = PARAMETERS.total
    assert first.weights + first.gradients + first.optimizer == n * (4 + 4 + 12 / 8)
    assert third.weights + third.gradients + third.optimizer == n * 16 / 8  # stage 3 needs no second copy


def test_fsdp_shares_everything_and_gathers_one_block_ahead():
    one, found = held("ddp", ranks=1), held("fsdp")
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(found, name) == getattr(one, name) / 8
    assert found.gathered == 2 * (2 * max(PARAMETERS.blocks) + PARAMETERS.outside)
    assert held("fsdp", dtype="float32").gathered == 2 * found.gathered


def test_fsdp_keeps_whole_gradients_between_micro_batches():
    step = Step(config=CONFIG, batch_size=1, seq_len=64, accumulation_steps=2, dtype="bfloat16", on_gpu=True)
    found = moments(step, PARAMETERS, layout("fsdp", step, PARAMETERS, ranks=8))
    assert found["loss"].gradients == 4 * PARAMETERS.total
    assert found["update"].gradients == 4 * PARAMETERS.total / 8


def test_ddp_copies_gradients_into_buckets():
    assert held("ddp", ranks=1).buffers == 0
    assert held("ddp", ranks=2).buffers == 4 * PARAMETERS.total


def test_offload_moves_to_the_host():
    second, third = held("zero2_offload"), held("zero3_offload")
    n = PARAMETERS.total
    assert (second.weights, second.gradients, second.optimizer) == (2 * n, 0, 0)
    assert second.host == n * (12 + 4) / 8
    assert (third.weights, third.host) == (0, n * (12 + 4 + 2) / 8)


def test_of_an_adapter_only_the_trained_part_has_state():
    parameters = count_parameters(meta_model(CONFIG, lora_rank=8))
    step = Step(config=CONFIG, batch_size=1, seq_len=64, lora_rank=8, base_dtype="bfloat16", dtype="bfloat16")
    found = layout("ddp", step, parameters)
    assert found.weights == 2 * PARAMETERS.total + 4 * parameters.trained
    assert found.optimizer == 8 * parameters.trained
    assert snapshot_bytes(parameters) == 12 * parameters.trained


def test_each_engine_is_known_and_others_are_not():
    for engine in ENGINES:
        assert held(engine).weights >= 0
    with pytest.raises(UserError, match=r"engine zero4.*zero3"):
        held("zero4")
