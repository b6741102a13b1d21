"""Decoding with the cache against the full forward."""

import pytest
import torch

from minillm.errors import UserError
from minillm.model import KVCache


def full_logits(model, tokens):
    """Return the logits of the last token of one row, without a cache."""
    return model(tokens[None])[0, -1]


def prefill(model, rows, cache):
    """Store rows of different lengths at once, padded on the right; return each one's last logits."""
    longest = max(len(row) for row in rows)
    input_ids = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    document_ids = torch.where(torch.arange(longest)[None] < lengths[:, None], 0, -1)
    logits = model(input_ids, document_ids=document_ids, cache=cache)
    return logits[torch.arange(len(rows)), lengths - 1]


@pytest.mark.parametrize("lengths", [(7,), (5, 5), (1, 6, 3)])
@torch.no_grad()
def test_greedy_decoding_equals_full_forward(tools, shape, family, lengths):
    model = tools.model(tools.config(shape, family)).eval()
    rows = [tools.tokens(length, seed=seed) for seed, length in enumerate(lengths)]
    cache = KVCache(model.config, batch_size=len(rows), max_len=max(lengths) + 6)
    logits = prefill(model, rows, cache)
    for _ in range(6):
        for row, tokens in enumerate(rows):
            wanted = full_logits(model, tokens)
            assert tools.difference(logits[row], wanted) <= 1e-5
            assert logits[row].argmax() == wanted.argmax()
        chosen = logits.argmax(-1)
        rows = [torch.cat([tokens, chosen[row : row + 1]]) for row, tokens in enumerate(rows)]
        logits = model(chosen[:, None], cache=cache)[:, 0]
    assert cache.lengths.tolist() == [length + 6 for length in lengths]


@torch.no_grad()
def test_prompt_in_pieces(tools, family):
    """A long prompt may be stored piece by piece, pieces of several tokens looking back at all before them."""
    model = tools.model(tools.config(family=family)).eval()
    tokens = tools.tokens(2, 13)
    cache = KVCache(model.config, batch_size=2, max_len=13)
    pieces = [model(tokens[:, start:end], cache=cache) for start, end in ((0, 5), (5, 6), (6, 13))]
    assert tools.difference(torch.cat(pieces, dim=1), model(tokens)) <= 1e-5


@torch.no_grad()
def test_ragged_pieces(tools, family):
    """Rows of different lengths go on with pieces of different lengths."""
    model = tools.model(tools.config(family=family), dtype=torch.float64).eval()
    a, b = tools.tokens(9, seed=1), tools.tokens(9, seed=2)
    cache = KVCache(model.config, batch_size=2, max_len=10, dtype=torch.float64)
    prefill(model, [a[:2], b[:5]], cache)
    logits = prefill(model, [a[2:8], b[5:6]], cache)
    assert cache.lengths.tolist() == [8, 6]
    for row, tokens in enumerate((a[:8], b[:6])):
        assert tools.difference(logits[row], full_logits(model, tokens)) <= 1e-12


@pytest.mark.parametrize("window", [1, 2, 5, 9, 30])
@torch.no_grad()
def test_decoding_beyond_the_window(tools, window):
    """Token by token, rows of different lengths, in float64; a row alone reads no more keys than it may see."""
    model = tools.model(tools.config(sliding_window=window), dtype=torch.float64).eval()
    rows = [tools.tokens(20, seed=seed) for seed in range(3)]
    lengths = [1, 8, 4]
    cache = KVCache(model.config, batch_size=3, max_len=20, dtype=torch.float64)
    alone = KVCache(model.config, batch_size=1, max_len=20, dtype=torch.float64)
    prefill(model, [row[:length] for row, length in zip(rows, lengths, strict=True)], cache)
    model(rows[0][None, :1], cache=alone)
    for _ in range(12):
        new = torch.stack([row[length : length + 1] for row, length in zip(rows, lengths, strict=True)])
        logits = model(new, cache=cache)[:, 0]
        lengths = [length + 1 for length in lengths]
        for row, length, ours in zip(rows, lengths, logits, strict=True):
            assert tools.difference(ours, full_logits(model, row[:length])) <= 1e-12
        assert tools.difference(model(new[:1], cache=alone)[0, 0], logits[0]) <= 1e-12
        keys = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
        alone.begin(1, None)
        assert alone.mask is None
        assert alone.store(0, keys, keys)[0].shape[2] == min(window, lengths[0] + 1)


@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_padding_far_beyond_the_window_is_finite(tools, window):
    """A long piece for one row puts the other's padding where its window holds no slot at all."""
    model = tools.model(tools.config(sliding_window=window)).eval()
    a, b = tools.tokens(20, seed=1), tools.tokens(20, seed=2)
    cache = KVCache(model.config, batch_size=2, max_len=20)
    prefill(model, [a[:10], b[:1]], cache)
    document_ids = torch.tensor([[0] + [-1] * 8, [0] * 9])
    logits = model(torch.stack([a[10:19], b[1:10]]), document_ids=document_ids, cache=cache)
    # torch's CPU kernel makes zeros of a query without keys; a softmax by the book would make 0 / 0.
    assert cache.mask.any(dim=-1).all()
    assert torch.isfinite(logits).all()
    assert tools.difference(logits[0, 0], full_logits(model, a[:11])) <= 1e-5
    assert tools.difference(logits[1, 8], full_logits(model, b[:10])) <= 1e-5
    assert torch.isfinite(model(torch.stack([a[:3], b[:3]]), document_ids=torch.full((2, 3), -1), cache=cache)).all()
    assert cache.mask.any(dim=-1).all()


@torch.no_grad()
def test_select_keeps_the_chosen_rows(tools):
    model = tools.model(tools.config()).eval()
    rows = [tools.tokens(length, seed=length) for length in (6, 2, 4)]
    cache = KVCache(model.config, batch_size=3, max_len=8)
    prefill(model, rows, cache)
    cache.select(torch.tensor([2, 1]))
    assert cache.lengths.tolist() == [4, 2]
    following = torch.tensor([[5], [6]])
    logits = model(following, cache=cache)[:, 0]
    for row, tokens in enumerate((rows[2], rows[1])):
        assert tools.difference(logits[row], full_logits(model, torch.cat([tokens, following[row]]))) <= 1e-5
    cache.select(torch.tensor([], dtype=torch.long))
    assert cache.lengths.shape == (0,)


@torch.no_grad()
def test_shorter_dtype(tools):
    model = tools.model(tools.config()).eval()
    tokens = tools.tokens(1, 6)
    cache = KVCache(model.config, batch_size=1, max_len=6, dtype=torch.bfloat16)
    logits = [model(tokens[:, t : t + 1], cache=cache) for t in range(6)]
    assert cache.keys[0].dtype == torch.bfloat16
    assert tools.difference(logits[-1][0, 0], full_logits(model, tokens[0])) < 0.02  # keys of 8 bits


def test_too_long_names_the_sizes(tools):
    model = tools.model(tools.config()).eval()
    cache = KVCache(model.config, batch_size=1, max_len=4)
    with pytest.raises(UserError, match="4 slots and would need 5: make it with a larger max_len"):
        model(tools.tokens(1, 5), cache=cache)


@torch.no_grad()
def test_a_refusal_spoils_nothing(tools):
    """What fits may still be stored after something that did not; with ragged rows the fullest one decides."""
    model = tools.model(tools.config()).eval()
    rows = [tools.tokens(length, seed=length) for length in (2, 6)]
    cache = KVCache(model.config, batch_size=2, max_len=7)
    prefill(model, rows, cache)
    with pytest.raises(UserError, match="7 slots and would need 8"):
        model(tools.tokens(2, 2), cache=cache)
    assert cache.lengths.tolist() == [2, 6]
    following = torch.tensor([[5], [6]])
    logits = model(following, cache=cache)[:, 0]
    for row, tokens in enumerate(rows):
        assert tools.difference(logits[row], full_logits(model, torch.cat([tokens, following[row]]))) <= 1e-5
