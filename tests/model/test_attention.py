"""Attention against loops over heads and positions."""

import math

import pytest
import torch

from minillm.model.attention import Attention
from minillm.model.attention_plan import AttentionPlan, document_mask, document_positions, window_mask
from minillm.model.rope import rope_tables

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0], [3, 3, 1, 1, 1, -1, -1, -1]])


def may_look(documents, row, query, key, window=None):
    if query == key:
        return True
    if window is not None and query - key >= window:
        return False
    return key < query and documents[row, query] == documents[row, key] and documents[row, query] >= 0


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 8, 100])
def test_masks(window):
    mask = document_mask(DOCUMENTS, window)
    assert mask.shape == (3, 1, 8, 8)
    for row in range(3):
        for query in range(8):
            for key in range(8):
                assert mask[row, 0, query, key].item() == bool(may_look(DOCUMENTS, row, query, key, window))
    if window is not None:
        assert torch.equal(window_mask(8, window, device=mask.device), document_mask(DOCUMENTS[1:2], window))


def test_document_positions():
    expected = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], list(range(8)), [0, 1, 0, 1, 2, 0, 1, 2]])
    assert torch.equal(document_positions(DOCUMENTS), expected)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(4, (5, 40), generator=generator).cumsum(1) // 5  # runs of uneven lengths
    for row, positions in zip(documents.tolist(), document_positions(documents).tolist(), strict=True):
        for t, position in enumerate(positions):
            start = t
            while start > 0 and row[start - 1] == row[t]:
                start -= 1
            assert position == t - start


def slow(attention, x, rope, documents, window):
    """The formula, one query of one head at a time."""
    n_rows, seq_len, _ = x.shape
    cos, sin = rope

    def heads(projection, norm):
        y = norm(projection(x).view(n_rows, seq_len, -1, attention.head_dim))
        half = cos.shape[-1]
        first, second, still = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, still], dim=-1)

    q, k = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    v = attention.v_proj(x).view(n_rows, seq_len, -1, attention.head_dim)
    out = torch.zeros_like(q)
    for row in range(n_rows):
        for head in range(q.shape[2]):
            group = head // (q.shape[2] // k.shape[2])
            for t in range(seq_len):
                keys = [s for s in range(seq_len) if may_look(documents, row, t, s, window)]
                scores = torch.stack([q[row, t, head] @ k[row, s, group] for s in keys]) / math.sqrt(q.shape[-1])
                out[row, t, head] = scores.softmax(0) @ v[row, keys, group]
    return attention.o_proj(out.flatten(2))


def test_against_loops(tools, shape, family, packed):
    torch.manual_seed(0)
    config = tools.config(shape, family)
    attention = Attention(config, 0).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 8, config.hidden_size, dtype=torch.float64, requires_grad=True)
    documents = DOCUMENTS if packed else torch.zeros(3, 8, dtype=torch.long)
    rope = rope_tables(document_positions(documents), config, dtype=torch.float64)
    mask = document_mask(documents, config.sliding_window) if packed or config.sliding_window else None
    ours = attention(x, rope, AttentionPlan(mask=mask, is_causal=mask is None), None)
    wanted = slow(attention, x, rope, documents, config.sliding_window)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    leaves = {"x": x, **dict(attention.named_parameters())}
    upstream = torch.randn_like(wanted)
    ours, wanted = (torch.autograd.grad(out, list(leaves.values()), upstream) for out in (ours, wanted))
    for name, gradient, reference in zip(leaves, ours, wanted, strict=True):
        assert ((gradient - reference).norm() / reference.norm()).item() < 1e-12, name
