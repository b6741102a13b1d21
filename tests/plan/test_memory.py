"""The moments of a step: against the peak of tensors that torch's profiler sees in real updates."""

import dataclasses

import pytest
import torch

from benchmarks.common import peak_bytes
from benchmarks.plan_memory import train
from minillm.config import ModelConfig
from minillm.kernels import linear_cross_entropy
from minillm.plan.activations import Step
from minillm.plan.engines import layout
from minillm.plan.memory import Layout, moments, peak
from minillm.plan.parameters import count_parameters, meta_model

SMALL = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 384}  # fmt: skip
LARGE_VOCABULARY = SMALL | {"vocab_size": 8192, "num_hidden_layers": 1}
GLM = SMALL | {"num_experts": 4, "n_shared_experts": 1, "scoring_func": "sigmoid", "moe_intermediate_size": 256}
BF16 = {"dtype": "bfloat16"}
CASES = {
    "activations": (SMALL, {}),
    "activations_bf16": (SMALL, BF16),
    "checkpointing": (SMALL, {"gradient_checkpointing": True}),
    "gradients": (SMALL | {"num_hidden_layers": 6}, {"batch_size": 1, "seq_len": 16}),
    "accumulation": (SMALL | {"tie_word_embeddings": False}, {"accumulation_steps": 2}),
    "logits": (LARGE_VOCABULARY, {}),
    "logits_bf16": (LARGE_VOCABULARY, BF16),
    "experts": (GLM, {}),
    "experts_bf16_checkpointing": (GLM, BF16 | {"gradient_checkpointing": True}),
    "lora": (SMALL, {"lora_rank": 4}),
    "lora_short_base": (SMALL, BF16 | {"lora_rank": 4, "base_dtype": "bfloat16"}),
}
PEAKS = {"gradients": "backward", "logits": "loss", "logits_bf16": "loss"}


def case(name: str) -> tuple[Step, Layout, object]:
    shape, changes = CASES[name]
    step = Step(config=ModelConfig(**shape), **({"batch_size": 4, "seq_len": 256} | changes))
    parameters = count_parameters(meta_model(step.config, lora_rank=step.lora_rank))
    return step, layout("ddp", step, parameters), parameters


@pytest.mark.parametrize("name", CASES)
def test_peak_is_what_the_profiler_sees(name):
    step, held, parameters = case(name)
    found = peak(step, parameters, held)
    measured = peak_bytes(lambda: train(step, 2), torch.device("cpu"))
    assert found.total == pytest.approx(measured, rel=0.03)
    assert found.name == PEAKS.get(name, found.name)


def test_several_chunks_hold_one_more(monkeypatch):
    """From the second chunk on the gradient of the one before is still there."""
    monkeypatch.setattr("minillm.plan.memory.CHUNK_NUMEL", 8192 * 256)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_NUMEL", 8192 * 256)
    step, held, parameters = case("logits")
    loss = moments(step, parameters, held)["loss"]
    assert loss.logits == 12 * 8192 * 256
    assert loss.total == pytest.approx(peak_bytes(lambda: train(step, 2), torch.device("cpu")), rel=0.03)


def test_moments_are_what_they_say():
    step, held, parameters = case("activations")
    found = moments(step, parameters, held)
    assert list(found) == ["loss", "backward", "update"]
    assert found["update"].total == 16 * parameters.total
    assert found["loss"].gradients == 0
    assert found["loss"].logits > 0 == found["backward"].logits
    assert peak(step, parameters, held).total == max(moment.total for moment in found.values())


def test_accumulation_keeps_gradients_and_no_more_activations():
    step, held, parameters = case("activations")
    one, several = (moments(dataclasses.replace(step, accumulation_steps=n), parameters, held)["loss"] for n in (1, 8))
    assert several.total - one.total == 4 * parameters.total


def test_checkpointing_pays_where_there_are_many_blocks():
    config = ModelConfig(**SMALL | {"num_hidden_layers": 16})
    parameters = count_parameters(meta_model(config))
    step = Step(config=config, batch_size=4, seq_len=256)
    plain = peak(step, parameters, layout("ddp", step, parameters)).total
    short = dataclasses.replace(step, gradient_checkpointing=True)
    assert peak(short, parameters, layout("ddp", short, parameters)).total < 0.5 * plain
