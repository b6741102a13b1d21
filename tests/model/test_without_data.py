"""The model where there is no data: shapes on "meta", fake tensors, an exported graph; and a replaced output layer."""

import functools
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.config import ModelConfig
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.model.attention_plan import document_positions, needs_equal_heads
from minillm.model.norm import RMSNorm

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2}
KINDS = [{}, {"use_qk_norm": True}, {"attention_bias": True}, {"sliding_window": 4}]


def loss_of(model, device="cpu"):
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    return causal_lm_loss(model, {"input_ids": ids, "targets": ids, "document_ids": ids})[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_shapes_are_computed_without_data(settings, training):
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SHAPE, **settings)).train(training)
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    logits = model(ids, document_ids=ids)
    assert (logits.device.type, logits.shape) == ("meta", (2, 8, 64))
    logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.is_meta
    with FakeTensorMode():
        model = Transformer(ModelConfig(**SHAPE, **settings)).train(training)
        ids = torch.zeros(2, 8, dtype=torch.long)
        logits = model(ids, document_ids=ids)
        assert (logits.device.type, logits.shape) == ("cpu", (2, 8, 64))
        logits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_on_meta_keeps_its_dtype(dtype):
    with torch.device("meta"):
        norm = RMSNorm(8, 1e-6)
    assert norm(torch.zeros(3, 8, device="meta", dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_model_takes_any_length(training):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).train(training)
    ids = torch.randint(64, (2, 13))
    seq_len = torch.export.Dim("seq_len", min=2, max=64)
    exported = torch.export.export(model, (ids[:, :8].clone(),), dynamic_shapes={"input_ids": {1: seq_len}}).module()
    for n in (8, 13):
        assert torch.allclose(exported(ids[:, :n]), model(ids[:, :n]), atol=1e-6)


def test_a_replaced_output_layer_is_run_and_named():
    """A hook that, say, fetches the weight must be run; what it costs in memory is said."""
    model = Transformer(ModelConfig(**SHAPE))
    wanted = loss_of(model)
    calls, forward = [], model.lm_head.forward
    model.lm_head.forward = functools.partial(lambda hidden: calls.append(1) or forward(hidden))
    with pytest.warns(UserWarning, match="output layer's forward was replaced"):
        found = loss_of(model)
    assert calls == [1]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_adapted_output_layer_is_no_surprise():
    model = Transformer(ModelConfig(**SHAPE))
    wanted = loss_of(model)
    apply_lora(model, rank=2, target_modules=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_of(model).item() == pytest.approx(wanted.item(), rel=1e-6)  # B is 0


def test_positions_start_over_with_each_document():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 3, 3, 5, 5, 5, -1]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 2, 0]]


def test_heads_are_shared_only_where_the_kernel_can(monkeypatch):
    monkeypatch.setattr("minillm.model.attention_plan.SHARES_HEADS_ON_MPS", False)
    needs = {(d, m): needs_equal_heads(d, masked=m) for d in ("cpu", "cuda", "mps") for m in (False, True)}
    assert [key for key, value in needs.items() if value] == [("cuda", True), ("mps", False), ("mps", True)]
    monkeypatch.setattr("minillm.model.attention_plan.SHARES_HEADS_ON_MPS", True)
    assert not needs_equal_heads("mps", masked=True)


def test_repeated_heads_give_the_same(monkeypatch):
    """As on a device whose kernel cannot share them."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).eval()
    ids = torch.randint(64, (2, 9))
    wanted = model(ids, document_ids=ids // 60)
    monkeypatch.setattr("minillm.model.attention_plan.needs_equal_heads", lambda device, masked: True)
    assert torch.allclose(model(ids, document_ids=ids // 60), wanted, atol=1e-6)
