"""Attention in blocks against torch's, over lengths around a block's, with and without documents."""

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels.block_attention import BLOCK_LEN, MAX_SEQ_LEN, block_attention, plan_blocks
from minillm.model.attention_plan import document_mask, window_mask


def qkv(seq_len, n_heads=6, n_groups=2, head_dim=10, n_rows=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seq_len)
    shapes = [(n_rows, seq_len, heads, head_dim) for heads in (n_heads, n_groups, n_groups)]
    # transposed, as they come out of the projections
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def documents(seq_len):
    """Two rows, cut at different places, the second with padding."""
    ids = torch.zeros(2, seq_len, dtype=torch.long)
    ids[0, seq_len // 3 :] = 1
    ids[0, seq_len // 2 :] = 2
    ids[1, (2 * seq_len) // 3 :] = 1
    ids[1, max(1, seq_len - 5) :] = -1
    return ids


HEADS = [(6, 2), (3, 3), (4, 1)]


@pytest.mark.parametrize("window_number, window", enumerate([None, 1, 5, BLOCK_LEN, BLOCK_LEN + 9]))
@pytest.mark.parametrize("length_number, seq_len", enumerate([2, 11, BLOCK_LEN, BLOCK_LEN + 1, 3 * BLOCK_LEN - 7]))
def test_equals_torch(length_number, seq_len, window_number, window):
    """Every length with every window; documents, and the three ways to share keys, in turn."""
    packed, heads = (length_number + window_number) % 2 == 1, HEADS[(length_number + window_number) % 3]
    q, k, v = qkv(seq_len, *heads)
    mask = document_mask(documents(seq_len), window) if packed else None
    if window is not None and not packed:
        mask = window_mask(seq_len, window, device=q.device)
    ours = block_attention(q, k, v, plan_blocks(mask, (2, seq_len), device=q.device, dtype=q.dtype))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    ours, wanted = (torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, wanted))
    for gradient, reference in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_gradcheck():
    q, k, v = qkv(5, 4, 2, 3)
    blocks = plan_blocks(document_mask(documents(5)), (2, 5), device=q.device, dtype=q.dtype)
    assert torch.autograd.gradcheck(lambda *qkv: block_attention(*qkv, blocks), (q, k, v))


def test_keys_that_no_row_may_see_are_left_out():
    """First keys are exact: one later would cut a document, one earlier would compute for nothing."""
    ids = documents(3 * BLOCK_LEN)
    mask = document_mask(ids)
    blocks = plan_blocks(mask, ids.shape, device=ids.device, dtype=torch.float32)
    for row, end_row, start, end, first in blocks.tiles:
        seen = mask[row:end_row, 0, start:end].any(dim=0).any(dim=0).nonzero()
        assert (first, end - 1) == (seen.min().item(), seen.max().item())
    assert [(tile.row, tile.end_row, tile.first) for tile in blocks.tiles] == [
        (0, 2, 0), (0, 2, 0), (0, 2, BLOCK_LEN + BLOCK_LEN // 2)
    ]  # fmt: skip
    window = plan_blocks(
        window_mask(4 * BLOCK_LEN, BLOCK_LEN + 9, device=ids.device), (2, 4 * BLOCK_LEN),
        device=ids.device, dtype=torch.float32,
    )  # fmt: skip
    assert [tile.first for tile in window.tiles] == [0, 0, BLOCK_LEN - 8, 2 * BLOCK_LEN - 8]
    one_document = plan_blocks(None, (2, 3 * BLOCK_LEN), device=ids.device, dtype=torch.float32)
    assert [tile.first for tile in one_document.tiles] == [0, 0, 0]


def test_long_rows_of_short_documents_get_tiles_of_their_own():
    """Row 0 cut after 2, 5, ... blocks, row 1 after 3, 6, ...: together they would reach back further than each."""
    position = torch.arange(8 * BLOCK_LEN)
    ids = torch.stack([position // (2 * BLOCK_LEN), torch.zeros_like(position)])
    mask = document_mask(ids)
    blocks = plan_blocks(mask, ids.shape, device=ids.device, dtype=torch.float64)
    assert {(tile.row, tile.end_row) for tile in blocks.tiles} == {(0, 1), (1, 2)}
    assert [tile.first for tile in blocks.tiles if tile.row == 0] == [0, 128, 256, 384]
    q, k, v = qkv(8 * BLOCK_LEN)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(block_attention(q, k, v, blocks), wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(block_attention(q, k, v, blocks), (q, k, v), upstream)
    for gradient, reference in zip(ours, torch.autograd.grad(wanted, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_bfloat16_is_as_close_as_a_product_of_that_dtype():
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in qkv(100, head_dim=32))
    out = block_attention(q, k, v, plan_blocks(None, (2, 100), device=q.device, dtype=q.dtype))
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    assert ((out - wide).norm() / wide.norm()).item() < 0.01  # scores are rounded to 8 bits


@pytest.mark.parametrize("seq_len, expected", [(9, True), (MAX_SEQ_LEN + 1, False), (1, False)])
def test_where_it_is_used(tools, monkeypatch, seq_len, expected):
    """In training on a CPU, up to a length, with gradients and without; never in eval mode or when switched off."""
    calls = []
    module = "minillm.model.attention_plan.block_attention"
    monkeypatch.setattr(module, lambda *args: calls.append(1) or block_attention(*args))
    model = tools.model(tools.config(max_position_embeddings=2048))
    tokens = tools.tokens(1, seq_len)
    model(tokens)
    assert (len(calls) == model.config.num_hidden_layers) == expected
    calls.clear()
    with torch.no_grad():  # a frozen copy of what is trained gives the same bits
        model(tokens)
    assert (len(calls) == model.config.num_hidden_layers) == expected
    calls.clear()
    model.eval()(tokens)
    model.train().block_attention = False
    model(tokens)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_the_probabilities_again_gives_the_same_bits_and_keeps_less(packed, dtype):
    seq_len = 3 * BLOCK_LEN - 7
    mask = document_mask(documents(seq_len)) if packed else None
    results, kept = [], []
    for keep in (True, False):
        q, k, v = qkv(seq_len, dtype=dtype)
        blocks = plan_blocks(mask, (2, seq_len), device=q.device, dtype=dtype, keep=keep)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = block_attention(q, k, v, blocks)
        kept.append(sum(tensor.numel() for tensor in saved))
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 3
