"""The operations: against torch's counter, which sees every product that really runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.plan.flops import attention_shares, chinchilla_tokens, count_flops, hours
from minillm.plan.parameters import meta_model

DENSE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96}  # fmt: skip
MIXTRAL = DENSE | {"num_experts": 4, "num_experts_per_tok": 2}
T = 128


def counted(config: ModelConfig, **attributes) -> tuple[float, float]:
    """Return (forward, forward and backward) operations per token, by torch's counter."""
    torch.manual_seed(0)
    model = Transformer(config).train()
    for name, value in attributes.items():
        setattr(model, name, value)
    ids = torch.randint(config.vocab_size, (2, T))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(ids)
    with FlopCounterMode(display=False) as training:
        causal_lm_loss(model, {"input_ids": ids, "targets": ids})[0].backward()
    return forward.get_total_flops() / (2 * T), training.get_total_flops() / (2 * T)


UNTIED = DENSE | {"tie_word_embeddings": False, "num_key_value_heads": 1}


@pytest.mark.parametrize("shape", [DENSE, UNTIED, MIXTRAL], ids=["tied", "untied", "moe"])
def test_forward_and_training_are_what_the_counter_sees(shape):
    config = ModelConfig(**shape)
    flops = count_flops(meta_model(config), T)
    forward, training = counted(config)
    computed = attention_shares(T, on_gpu=False)[1]  # our blocks leave out pairs that are counted by convention
    assert computed == (T + 64) / (2 * T)
    norms = 2 * 64 * (2 * 3 + 1)  # "2 per parameter" counts their scales too, which are no matrices
    expected = flops.matrices - norms + flops.output + computed * flops.attention
    assert forward == pytest.approx(expected, rel=1e-9)
    assert training == pytest.approx(3 * expected, rel=1e-9)
    assert flops.training == pytest.approx(3 * flops.forward)


def test_checkpointing_runs_the_blocks_twice():
    config = ModelConfig(**DENSE)
    flops = count_flops(meta_model(config), T, gradient_checkpointing=True)
    plain, repeated = counted(config)[1], counted(config, gradient_checkpointing=True)[1]
    skipped = (1 - attention_shares(T, on_gpu=False)[1]) * flops.attention
    # The down projection's own product is not repeated: nothing kept comes after it.
    down, norms = 2 * 64 * 96 * 3, 2 * 64 * (2 * 3 + 1)
    assert repeated - plain == pytest.approx(flops.recomputed - skipped - down - norms, rel=1e-9)
    assert count_flops(meta_model(config), T).recomputed == 0


def test_attention_of_causal_rows():
    needed, computed = attention_shares(4, on_gpu=True)
    assert needed == 10 / 16  # 1 + 2 + 3 + 4 of 4 x 4 pairs
    assert computed == 1.0
    assert attention_shares(4096, on_gpu=False)[1] == 1.0  # long rows take torch's kernel


def test_an_adapter_saves_the_gradients_of_frozen_weights():
    config = ModelConfig(**DENSE)
    whole, adapter = (count_flops(meta_model(config, lora_rank=rank), T) for rank in (0, 4))
    assert adapter.forward == whole.forward
    assert 2 / 3 < adapter.training / whole.training < 1


def test_hours_and_tokens_by_hand():
    """Hoffmann et al. (2022), table 3: 67e9 parameters go with 1.5e12 tokens, at 5.76e23 operations."""
    assert chinchilla_tokens(67e9) == pytest.approx(1.5e12, rel=0.15)
    flops = count_flops(meta_model(ModelConfig(**DENSE)), T, gradient_checkpointing=True)
    one = hours(flops, 1e9, peak=1e12, mfu=0.5)
    assert one == pytest.approx(1e9 * (flops.training + flops.recomputed) / 0.5e12 / 3600)
    assert hours(flops, 1e9, peak=1e12, mfu=0.5, ranks=4) == pytest.approx(one / 4)
