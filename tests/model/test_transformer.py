"""The whole model against transformers', packed against unpacked, recomputed against kept."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.losses import linear_cross_entropy
from minillm.model import Transformer, attention_plan
from minillm.model.moe import Router


def ragged_batch(tokens):
    """Return ids (3, 11), lengths and targets (−100 outside): rows of 11, 4 and 1 tokens, some not to be learnt."""
    input_ids, lengths = tokens(3, 11), [11, 4, 1]
    targets = tokens(3, 11, seed=1)
    targets[0, 3] = targets[1, 0] = -100
    for row, length in enumerate(lengths):
        targets[row, length:] = -100
    return input_ids, lengths, targets


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare_with_reference(tools, model, bound, blocks):
    model.block_attention = blocks
    reference = tools.reference(model)
    input_ids, lengths, targets = ragged_batch(tools.tokens)
    mask = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    wanted = reference(input_ids, attention_mask=mask.long()).logits
    document_ids = torch.where(mask, 0, -1)
    ours = model(input_ids, document_ids=document_ids)
    assert ours.dtype == wanted.dtype
    assert tools.difference(ours[mask], wanted[mask]) <= bound
    # without document_ids the causal mask alone keeps right padding out of what comes before it
    assert tools.difference(model(input_ids)[mask], wanted[mask]) <= bound
    ours = gradients(model, F.cross_entropy(ours.flatten(0, 1), targets.flatten()))
    wanted = gradients(reference, F.cross_entropy(wanted.flatten(0, 1), targets.flatten()))
    for name, gradient in ours.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) <= bound, name


def test_logits_and_gradients_equal_transformers(tools, shape, family, blocks):
    compare_with_reference(tools, tools.model(tools.config(shape, family)), 1e-5, blocks)


def test_in_float64(tools, shape, family, float64_reference, blocks):
    compare_with_reference(tools, tools.model(tools.config(shape, family), dtype=torch.float64), 1e-10, blocks)


def test_given_positions_equal_transformers(tools, family, float64_reference, blocks):
    """Any positions: far from zero, and with gaps."""
    model = tools.model(tools.config(family=family), dtype=torch.float64)
    model.block_attention = blocks
    positions = torch.tensor([[5, 6, 9, 10, 30], [0, 1, 2, 3, 4]])
    wanted = tools.reference(model)(
        tools.tokens(2, 5), position_ids=positions, attention_mask=torch.ones(2, 5, dtype=torch.long)
    ).logits
    assert tools.difference(model(tools.tokens(2, 5), position_ids=positions), wanted) <= 1e-10
    assert tools.difference(model(tools.tokens(2, 5))[:1], wanted[:1]) > 1e-3  # positions do matter


@pytest.mark.parametrize("windowed, window", [*(("mistral", w) for w in (1, 70, 128, 149, 150, 400)), ("mixtral", 70)])
def test_window_over_long_rows_equals_transformers(tools, windowed, window, float64_reference, blocks):
    """Windows within, at and beyond the blocks of our attention; causal rows and packed documents."""
    changes = {"sliding_window": window, "max_position_embeddings": 256}
    model = tools.model(tools.config(family=windowed, **changes), dtype=torch.float64)
    model.block_attention = blocks
    reference = tools.reference(model)
    tokens = tools.tokens(2, 150)
    document_ids = torch.tensor([[0] * 100 + [1] * 50, [0] * 20 + [1] * 125 + [-1] * 5])
    wanted = reference(tokens).logits
    assert tools.difference(model(tokens), wanted) <= 1e-10
    alone = reference(tokens[1:, 20:145]).logits[0]
    packed = model(tokens, document_ids=document_ids)
    assert tools.difference(packed[1, 20:145], alone) <= 1e-10
    assert torch.isfinite(packed).all()
    upstream = torch.randn(125, 83, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = gradients(model, (packed[1, 20:145] * upstream).sum())
    wanted = gradients(reference, (alone * upstream).sum())
    for name, gradient in ours.items():
        size = wanted[name].norm()
        if window == 1 and name.endswith(("q_proj.weight", "k_proj.weight")):
            size = wanted["model.embed_tokens.weight"].norm()  # the true gradient is zero: one key is no choice
        assert float((gradient - wanted[name]).norm() / size) <= 1e-10, name


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_packed_rows_equal_documents_alone(tools, shape, family, blocks, dtype, bound):
    """Logits and gradients; positions restart by themselves, or are given."""
    config = tools.config(shape, family)
    if dtype == torch.float32:  # with uneven weights float32 is 3e-6 away from float64, packed or not
        torch.manual_seed(0)
        model = Transformer(config)
    else:
        model = tools.model(config, dtype=dtype)
    model.block_attention = blocks
    tokens = tools.tokens(2, 12)
    document_ids = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 7 + [1] * 3 + [-1] * 2])
    positions = torch.tensor([[*range(5), 0, *range(6)], [*range(7), *range(3), 0, 0]])
    spans = [(0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 7), (1, 7, 10)]
    targets = torch.full((2, 12), -100)
    for row, start, end in spans:
        targets[row, start:end] = tools.tokens(end - start, seed=9 + start)
    packed = model(tokens, document_ids=document_ids)
    assert torch.isfinite(packed).all()
    assert torch.equal(packed, model(tokens, document_ids=document_ids, position_ids=positions))
    alone = [model(tokens[row : row + 1, start:end]) for row, start, end in spans]
    for (row, start, end), wanted in zip(spans, alone, strict=True):
        assert tools.difference(packed[row, start:end], wanted[0]) <= bound
    packed = gradients(model, F.cross_entropy(packed.flatten(0, 1), targets.flatten(), reduction="sum"))
    wanted = gradients(
        model,
        sum(
            F.cross_entropy(logits[0], targets[row, start:end], reduction="sum")
            for (row, start, end), logits in zip(spans, alone, strict=True)
        ),
    )
    # Keys' gradients are the small rest of large terms, and experts sum in another order when their tokens are others:
    # in float32 packed and alone are each up to 1.2e-6 from float64, where they differ by 1e-15.
    bound *= 2 if config.num_experts and dtype == torch.float32 else 1
    for name, gradient in packed.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) <= bound, name


@pytest.mark.parametrize("long_documents", [False, True])
@pytest.mark.parametrize("window", [None, 70])
def test_one_document_changes_no_bit_of_another(tools, window, long_documents, blocks):
    model = tools.model(tools.config(sliding_window=window))
    model.block_attention = blocks
    length = 300 if long_documents else 9
    document_ids = torch.tensor([[0] * length + [1] * (length + 1) + [2] * length + [-1] * 3])
    tokens = tools.tokens(1, 3 * length + 4)
    before = model(tokens, document_ids=document_ids)
    changed = tokens.clone()
    changed[0, length : 2 * length + 1] = tools.tokens(length + 1, seed=5)
    after = model(changed, document_ids=document_ids)
    others = (document_ids == 0) | (document_ids == 2)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_padding_sees_only_itself(tools, blocks):
    """A padded position is as if alone, at whatever position it stands; nobody sees it; no gradient is NaN."""
    model = tools.model(tools.config(), dtype=torch.float64)
    model.block_attention = blocks
    document_ids = torch.tensor([[0] * 4 + [-1] * 3, [-1] * 7])
    tokens = tools.tokens(2, 7)
    before = model(tokens, document_ids=document_ids)
    for row, t in ((0, 5), (1, 0), (1, 6)):
        alone = model(tokens[row : row + 1, t : t + 1])[0, 0]  # attention to oneself alone knows no position
        assert tools.difference(before[row, t], alone) <= 1e-12
        changed = tokens.clone()
        changed[row, t] = (changed[row, t] + 1) % 83
        same = model(changed, document_ids=document_ids) == before
        assert not same[row, t].all()
        same[row, t] = True
        assert same.all()
    for name, gradient in gradients(model, before.square().sum()).items():
        assert torch.isfinite(gradient).all(), name


def test_a_row_of_padding_is_finite_and_teaches_nothing(tools, blocks):
    model = tools.model(tools.config())
    model.block_attention = blocks
    targets = torch.full((2, 7), -100)
    document_ids = torch.full((2, 7), -1)
    loss_sum, n_targets = model(
        tools.tokens(2, 7), document_ids=document_ids, head=lambda h, w: linear_cross_entropy(h, w, targets)
    )
    assert (loss_sum.item(), n_targets.item()) == (0.0, 0.0)
    assert all((gradient == 0).all() for gradient in gradients(model, loss_sum).values())
    assert torch.isfinite(model(tools.tokens(2, 7), document_ids=document_ids)).all()


def test_recomputation_gives_the_same_gradients(tools, family, blocks):
    """Dropout must draw the same masks again, and leave the generator where it would have been."""
    dropout = 0.3 if blocks else 0.0
    model = tools.model(tools.config(family=family))
    model.block_attention = blocks
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, out: F.dropout(out, dropout))
    tokens = tools.tokens(2, 9)
    document_ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [-1]])

    def run(recompute):
        torch.manual_seed(3)
        model.gradient_checkpointing = recompute
        loss = model(tokens, document_ids=document_ids).square().sum()
        return gradients(model, loss), torch.rand(1)

    (kept, after_kept), (recomputed, after_recomputed) = run(False), run(True)
    assert torch.equal(after_kept, after_recomputed)
    torch.manual_seed(3)
    assert torch.equal(after_kept, torch.rand(1)) == (dropout == 0)  # it did draw
    for name, gradient in kept.items():
        assert float((recomputed[name] - gradient).norm() / gradient.norm()) <= 1e-7, name


def test_recomputation_keeps_less(tools):
    model = tools.model(tools.config())
    kept = {}
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model(tools.tokens(2, 32))
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_sees_hidden_states_and_output_weight(tools, monkeypatch, tied):
    """The loss in chunks of 4 positions, run by ``head=``, against all logits at once."""
    losses = importlib.import_module("minillm.kernels.linear_cross_entropy")
    monkeypatch.setattr(losses, "CHUNK_NUMEL", 4 * 83)
    model = tools.model(tools.config("narrow heads, untied", tie_word_embeddings=tied), dtype=torch.float64)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens, targets = tools.tokens(2, 9), tools.tokens(2, 9, seed=1)
    targets[0, 2:6] = -100
    logits = model(tokens)
    hidden, weight = model(tokens, head=lambda hidden, weight: (hidden, weight))
    assert weight is model.lm_head.weight
    assert tools.difference(hidden @ weight.T, logits) <= 1e-14
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ours, n_targets = model(tokens, head=lambda h, w: linear_cross_entropy(h, w, targets))
    assert n_targets == (targets != -100).sum()
    assert ours.dtype == hidden.dtype == torch.float64
    assert abs((ours - wanted).item()) <= 1e-10
    wanted = gradients(model, wanted)
    for name, gradient in gradients(model, ours).items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) <= 1e-12, name


def test_fresh_weights():
    """N(0, 0.02²), the projections into the stream smaller by 1/sqrt(2 L), the first loss near ln V."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("demo", num_hidden_layers=3, hidden_size=192))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            wanted = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.002, name
    tokens = torch.randint(1024, (4, 32))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1024), abs=0.1)


def test_seed_decides_the_weights():
    def first(seed):
        torch.manual_seed(seed)
        return Transformer(ModelConfig.preset("demo")).model.layers[0].mlp.up_proj.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_under_autocast_close_to_float32(tools, family, monkeypatch):
    model = tools.model(tools.config(family=family))
    tokens = tools.tokens(2, 12)
    # Rounding may well choose another expert, so the second run takes the choices of the first.
    choose, choices = Router._choose, []
    monkeypatch.setattr(Router, "_choose", lambda *args: choices.append(choose(*args)) or choices[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = model(tokens)
    monkeypatch.setattr(Router, "_choose", lambda *args: choices.pop(0))
    assert short.dtype == torch.bfloat16
    assert tools.difference(short.float(), model(tokens)) < 0.03  # bfloat16 has 8 bits: a few 1/256 over two layers


def test_a_frozen_model_computes_attention_again_instead_of_keeping_it(tools, monkeypatch):
    kept, model = [], tools.model(tools.config())
    plan = attention_plan.plan_blocks

    def noting(*args, keep, **options):
        kept.append(keep)
        return plan(*args, keep=keep, **options)

    monkeypatch.setattr(attention_plan, "plan_blocks", noting)
    model.train()
    model(tools.tokens(2, 9))
    model.requires_grad_(False)
    model(tools.tokens(2, 9))
    assert kept == [True, False]
