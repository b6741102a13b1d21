"""Attention of packed documents on a GPU: where the documents lie, and what is made of torch's kernel.

The kernel itself runs on CUDA alone. A stand-in with its signature computes one document after the other, from
torch's description of its arguments, and takes its place here.
"""

import inspect
import itertools
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.config import ModelConfig
from minillm.data.batches import document_bounds
from minillm.kernels import varlen_attention
from minillm.kernels.varlen_attention import Documents, plain
from minillm.losses import causal_lm_loss
from minillm.model import Transformer, attention_plan
from minillm.model.attention_plan import plan_attention

KERNEL = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
if not varlen_attention._torch_has_it():
    pytest.skip("this torch has the kernel without windows or shared heads", allow_module_level=True)
WINDOWS = [None, 1, 3, 100]
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2}


def by_document(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """Attention of one sequence after the other: a query at i sees the keys from i − left to i + right."""
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q is cu_seq_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    bounds, out = cu_seq_q.tolist(), torch.empty_like(query)
    assert (bounds[0], bounds[-1]) == (0, len(query))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    for start, end in itertools.pairwise(bounds):
        assert 0 < end - start <= max_q == max_k
        index = torch.arange(end - start)
        ahead = index - index[:, None]
        seen = (ahead <= right) & ((ahead >= -left) | (left < 0))
        scores = torch.einsum("qhk,shk->hqs", query[start:end], key[start:end]) / query.shape[-1] ** 0.5
        shares = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("hqs,shk->qhk", shares, value[start:end])
    return out


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in instead of the kernel, and tensors on a CPU taken for those of a GPU; returns the calls."""
    calls = []
    kernel = lambda *args, **kwargs: calls.append(kwargs) or by_document(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen_attention, "is_available", lambda device, dtype, head_dim: True)
    return calls


def ragged(n_rows, seq_len, seed):
    """Document ids of rows with documents of random lengths, the last stretch of a row perhaps padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n_rows):
        lengths = torch.randint(1, 2 + seq_len // 2, (seq_len,), generator=generator)
        row = torch.arange(seq_len).repeat_interleave(lengths)[:seq_len]
        if torch.rand((), generator=generator) < 0.5:
            row[seq_len - int(torch.randint(1, seq_len + 1, (), generator=generator)) :] = -1
        rows.append(row)
    return torch.stack(rows)


def test_the_stand_in_has_the_kernels_arguments():
    theirs, ours = (inspect.signature(function).parameters for function in (KERNEL, by_document))
    assert [name for name in theirs if name in ours] == list(ours)
    assert all(theirs[name].kind == ours[name].kind for name in ours)
    assert varlen_attention._torch_has_it()


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_those_of_a_slow_loop(seed):
    document_ids = ragged(1 + seed % 4, 1 + seed, seed)
    bounds = []
    for row, ids in enumerate(document_ids.tolist()):
        for position, document in enumerate(ids):
            if position == 0 or document != ids[position - 1]:
                bounds.append(row * len(ids) + position)
    found = document_bounds(document_ids)
    assert found.dtype == torch.int32
    assert found.tolist() == [*bounds, document_ids.numel()]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_plain_expression(stand_in, n_groups, window):
    document_ids = ragged(3, 12, seed=n_groups)
    documents = Documents(document_bounds(document_ids), 12, window)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator, requires_grad=True)
    inputs = draw(3, 4, 12, 8), draw(3, n_groups, 12, 8), draw(3, n_groups, 12, 8)
    results = varlen_attention.varlen_attention(*inputs, documents), plain(*inputs, documents)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    upstream = torch.randn(results[0].shape, dtype=torch.float64, generator=generator)
    for ours, wanted in zip(*(torch.autograd.grad(out, inputs, upstream) for out in results), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    assert len(stand_in) == 1


def make_batch(document_ids, seed=0):
    ids = torch.randint(64, (2, *document_ids.shape), generator=torch.Generator().manual_seed(seed))
    targets = torch.where(document_ids >= 0, ids[1], -100)
    return {"input_ids": ids[0], "targets": targets, "document_ids": document_ids}


def loss_and_gradients(model, batch):
    loss_sum, _ = causal_lm_loss(model, batch)
    gradients = torch.autograd.grad(loss_sum, list(model.parameters()))
    return loss_sum, gradients


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_computes_the_same_as_with_a_mask(stand_in, window, checkpointing):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, sliding_window=window)).double().train()
    model.gradient_checkpointing = checkpointing
    batch = make_batch(ragged(3, 24, seed=1))
    wanted = loss_and_gradients(model, batch)
    assert not stand_in
    ours = loss_and_gradients(model, batch | {"document_bounds": document_bounds(batch["document_ids"])})
    assert len(stand_in) == SHAPE["num_hidden_layers"] * (2 if checkpointing else 1)
    assert ours[0].item() == pytest.approx(wanted[0].item(), rel=1e-12)
    for gradient, reference in zip(ours[1], wanted[1], strict=True):
        assert float((gradient - reference).norm()) <= 1e-11 * float(reference.norm()) + 1e-14


def test_changing_one_document_changes_no_bit_of_another(stand_in):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).train()
    document_ids = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 9 + [1] * 4 + [-1] * 3])
    batch = make_batch(document_ids)
    ids, bounds = batch["input_ids"], document_bounds(document_ids)
    before = model(ids, document_ids=document_ids, document_bounds=bounds)
    changed = ids.clone()
    changed[0, 5:12] = (ids[0, 5:12] + 1) % 64
    changed[1, 13:] = (ids[1, 13:] + 1) % 64  # padding
    after = model(changed, document_ids=document_ids, document_bounds=bounds)
    is_same = (before == after).all(dim=-1)
    assert is_same.tolist() == (ids == changed).tolist()


# ---- the choice --------------------------------------------------------------------------------------------------


def plan_on(device, dtype, *, bounds=True, head_dim=64, seq_len=8):
    ids = torch.zeros(2, seq_len, dtype=torch.long, device=device)
    return plan_attention(
        ids,
        document_ids=ids,
        document_bounds=torch.tensor([0, seq_len, 2 * seq_len], dtype=torch.int32, device=device) if bounds else None,
        cache=None,
        window=None,
        head_dim=head_dim,
        weight=torch.zeros(1, dtype=dtype, device=device),
        in_blocks=True,
        is_frozen=False,
    )


def test_the_plan_takes_the_kernel_where_it_can(monkeypatch):
    monkeypatch.setattr(varlen_attention, "_device_has_it", lambda device: True)
    # torch's CPU build cannot pretend to index on a device.
    stub = lambda ids, window: torch.ones(2, 1, 8, 8, device="cuda").bool()  # noqa: E731
    monkeypatch.setattr(attention_plan, "document_mask", stub)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.bfloat16, torch.float16):
            plan = plan_on("cuda", dtype)
            assert plan.documents is not None
            assert plan.mask is plan.blocks is None
            assert not plan.is_causal
            assert plan.documents.max_len == 8
        others = {
            "float32": plan_on("cuda", torch.float32),
            "no bounds": plan_on("cuda", torch.bfloat16, bounds=False),
            "odd heads": plan_on("cuda", torch.bfloat16, head_dim=20),
            "wide heads": plan_on("cuda", torch.bfloat16, head_dim=512),
            "one position": plan_on("cuda", torch.bfloat16, seq_len=1),
        }
        monkeypatch.setattr(varlen_attention, "_device_has_it", lambda device: False)
        others["old card"] = plan_on("cuda", torch.bfloat16)
        monkeypatch.setattr(varlen_attention, "_device_has_it", lambda device: True)
        monkeypatch.setattr(varlen_attention, "_torch_has_it", lambda: False)
        others["old torch"] = plan_on("cuda", torch.bfloat16)
        for name, plan in others.items():
            assert plan.documents is None, name
            assert plan.mask.dtype.is_floating_point, name  # made once, not in every layer
    monkeypatch.undo()
    assert plan_on("cpu", torch.bfloat16).blocks is not None


def test_a_torch_without_windows_or_shared_heads_is_not_taken(monkeypatch):
    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise NotImplementedError

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", of_torch_2_10)
    assert not varlen_attention._torch_has_it.__wrapped__()
