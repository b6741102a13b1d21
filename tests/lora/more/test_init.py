"""What A and B start with: the distributions, the decompositions, and what they need."""

import pytest
import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora.more.experts import new_slot
from minillm.lora.more.init import ORTHOGONAL_GAIN, ORTHOGONAL_STD, initialize

LAYERS = {"wide": nn.Linear(300, 70), "tall": nn.Linear(50, 400)}


def values(layer, init, rank=6, scaling=0.7, seed=0, std=0.0):
    """Return A and B of a new adapter."""
    lora = new_slot(layer, rank=rank, dropout=0.0)
    initialize(lora, layer, init, scaling=scaling, std=std, generator=torch.Generator().manual_seed(seed))
    return lora.A.weight.detach(), lora.B.weight.detach()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
def test_shapes_types_and_a_generator_of_their_own(name, init):
    layer = LAYERS[name]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b = values(layer, init)
    assert (tuple(a.shape), tuple(b.shape)) == ((6, layer.in_features), (layer.out_features, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values(layer, init)[0], a)
    if init not in ("pissa", "olora"):
        assert not torch.equal(values(layer, init, seed=1)[0], a)
    narrow = values(nn.Linear(20, 30).bfloat16(), init, rank=3)
    wide = values(nn.Linear(20, 30).double(), init, rank=3)
    assert ({t.dtype for t in narrow}, {t.dtype for t in wide}) == ({torch.float32}, {torch.float64})


def test_kaiming_is_what_torch_draws_for_a_linear_layer():
    a, b = values(LAYERS["wide"], "kaiming", rank=64)
    reference = torch.empty(64, 300)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert not b.any()
    assert a.abs().max() <= 300**-0.5
    assert a.std().item() == pytest.approx(reference.std().item(), rel=0.02)
    assert abs(a.mean().item()) < 1e-3


def test_gaussian_is_narrower_for_larger_ranks():
    for rank in (4, 64):
        a, b = values(LAYERS["wide"], "gaussian", rank=rank)
        assert not b.any()
        assert a.std().item() == pytest.approx(1 / rank, rel=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal_columns_of_a_small_length(name):
    a, b = values(LAYERS[name], "orthogonal")
    torch.testing.assert_close(b.T @ b, ORTHOGONAL_GAIN**2 * torch.eye(6), rtol=0, atol=1e-9)
    assert a.std().item() == pytest.approx(ORTHOGONAL_STD, rel=0.1)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_a_may_start_smaller(init):
    (a, b), (smaller, same) = values(LAYERS["wide"], init, rank=64), values(LAYERS["wide"], init, rank=64, std=1e-3)
    own = {"gaussian": 1 / 64, "orthogonal": ORTHOGONAL_STD}[init]
    assert smaller.std().item() == pytest.approx(1e-3, rel=0.03)
    torch.testing.assert_close(smaller / 1e-3, a / own)  # the same numbers, smaller
    assert torch.equal(b, same)


@pytest.mark.parametrize("name", LAYERS)
def test_pissa_is_the_best_product_of_its_rank(name):
    layer = LAYERS[name].double()
    a, b = values(layer, "pissa")
    u, singular, vt = torch.linalg.svd(layer.weight, full_matrices=False)
    torch.testing.assert_close(0.7 * b @ a, u[:, :6] * singular[:6] @ vt[:6], rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-12)  # the root of the singular values on either side
    assert torch.linalg.matrix_norm(layer.weight - 0.7 * b @ a, 2).item() == pytest.approx(singular[6].item())
    LAYERS[name].float()


@pytest.mark.parametrize("name", LAYERS)
def test_olora_is_the_first_of_q_and_r(name):
    layer = LAYERS[name]
    a, b = values(layer, "olora")
    q, r = torch.linalg.qr(layer.weight)
    assert torch.equal(b, q[:, :6])
    assert torch.equal(a, r[:6])
    torch.testing.assert_close(b.T @ b, torch.eye(6), rtol=0, atol=1e-5)


def test_an_embedding_starts_unchanged():
    for init in ("kaiming", "gaussian"):
        a, b = values(nn.Embedding(9, 40), init, rank=5)
        assert (tuple(a.shape), tuple(b.shape)) == ((5, 9), (40, 5))
        assert not a.any()
        assert b.std().item() == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_what_does_not_work_is_refused(init):
    with pytest.raises(UserError, match=r"rank 51: init .* at most 50 for a layer 50 -> 400"):
        values(LAYERS["tall"], init, rank=51)
    with pytest.raises(UserError, match="does not work for an embedding: choose kaiming or gaussian"):
        values(nn.Embedding(9, 40), init, rank=5)
    with pytest.raises(
        UserError, match="'xavier' is unknown: choose one of kaiming, gaussian, orthogonal, pissa, olora"
    ):
        values(LAYERS["tall"], "xavier")
