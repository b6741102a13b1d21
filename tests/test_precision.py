"""Which device and dtype are chosen, and the scaled float16 step on tiny tensors."""

import pytest
import torch

from minillm import precision
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these parts."""

    def machine(*, cuda=None, mps=False, fast_cpu=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(precision, "cpu_has_fast_bfloat16", lambda: fast_cpu)

    return machine


@pytest.mark.parametrize(
    ("parts", "chosen"),
    [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": (8, 0)}, "cuda:3"), ({"cuda": (7, 0), "mps": True}, "cuda:3")],
)
def test_auto_device(machine, parts, chosen):
    machine(**parts)
    assert precision.choose_device("auto", local_rank=3) == torch.device(chosen)


def test_a_named_device(machine):
    machine(cuda=(9, 0), mps=True)
    assert precision.choose_device("cpu") == CPU
    assert precision.choose_device("cuda", local_rank=2) == torch.device("cuda", 2)  # each rank has its own
    assert precision.choose_device("cuda:1", local_rank=2) == torch.device("cuda", 1)
    assert precision.choose_device("mps").type == "mps"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "gpu", "tpu9", "meta", ""], ids="name-{}".format)
def test_a_device_that_is_not_there(machine, name):
    machine()
    with pytest.raises(UserError, match=f"--device {name[:4]}") as error:
        precision.choose_device(name)
    assert "cpu" in str(error.value)  # the way out
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parts", "device", "dtype"),
    [
        ({"cuda": (9, 0)}, CUDA, torch.bfloat16), ({"cuda": (8, 0)}, CUDA, torch.bfloat16),
        ({"cuda": (7, 5)}, CUDA, torch.float16), ({"cuda": (7, 0), "fast_cpu": True}, CUDA, torch.float16),
        ({"mps": True}, MPS, torch.float32), ({"fast_cpu": True, "mps": True}, MPS, torch.float32),
        ({"fast_cpu": True}, CPU, torch.bfloat16), ({}, CPU, torch.float32), ({"cuda": (9, 0)}, CPU, torch.float32),
    ],
)  # fmt: skip
def test_auto_dtype(machine, parts, device, dtype):
    machine(**parts)
    assert precision.choose_dtype("auto", device) is dtype


def test_a_named_dtype():
    for device in (CPU, CUDA, MPS):
        assert precision.choose_dtype("float32", device) is torch.float32
        assert precision.choose_dtype("bfloat16", device) is torch.bfloat16
    assert precision.choose_dtype("float16", CUDA) is torch.float16
    with pytest.raises(UserError, match="--dtype float16 on a CPU"):
        precision.choose_dtype("float16", CPU)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_fast_bfloat16_on_a_cpu(monkeypatch, bf16, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert precision.cpu_has_fast_bfloat16() == (bf16 or amx)


def test_a_torch_without_the_probes_says_no(monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert precision.cpu_has_fast_bfloat16() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_runs_products_in_its_dtype(dtype):
    weight = torch.eye(3, requires_grad=True)
    with precision.autocast(CPU, dtype):
        out = torch.ones(1, 3) @ weight
    assert out.dtype is dtype
    out.float().sum().backward()
    assert weight.grad.dtype is torch.float32  # the weights and their gradients stay float32


def test_autocast_leaves_float64_alone():
    with precision.autocast(CPU, torch.float64):
        assert (torch.ones(2, 2, dtype=torch.float64) @ torch.ones(2, 2, dtype=torch.float64)).dtype is torch.float64


def test_only_float16_is_scaled():
    assert precision.grad_scaler(CPU, torch.float16).is_enabled()
    for dtype in (torch.float32, torch.bfloat16):
        scaler = precision.grad_scaler(CPU, dtype)
        assert not scaler.is_enabled()
        assert scaler.scale(torch.tensor(3.0)) == 3.0


def one_step(weight, loss, dtype, max_norm, divisor=64.0):
    """Forward, backward and clip. The loss is divided outside the float16 part, as ``Run`` does by its count."""
    engine = Engine(Ranks(), CPU, dtype)
    engine.attach(torch.optim.SGD([weight], lr=1.0))
    with precision.autocast(CPU, dtype):
        value = loss(weight)
    engine.backward(value.float() / divisor)
    return engine, engine.clip(max_norm)


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 10.0])
def test_a_scaled_step_equals_the_plain_one(max_norm):
    """All values are exact in float16, so unscaling before clipping must give the plain step to the bit."""
    results = []
    for dtype in (torch.float32, torch.float16):
        weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        engine, norm = one_step(weight, lambda w: (w @ torch.tensor([[3.0], [4.0]])).sum(), dtype, max_norm)
        assert norm == 5 / 64  # before clipping, without the scale
        assert engine.step()
        assert weight.grad is None
        results.append(weight.detach())
    assert torch.equal(*results)
    scale = min(1.0, max_norm / (5 / 64)) / 64 if max_norm else 1 / 64
    change = torch.tensor([[1.0, -2.0]]) - results[0]
    torch.testing.assert_close(change, torch.tensor([[3.0, 4.0]]) * scale, rtol=5e-5, atol=0)


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """1e-4 / 1e4 is zero in float16, whose smallest number is 6e-8; times the scale of 65536 it is not."""
    small = torch.full((1, 1), 1e-4)
    weight = torch.nn.Parameter(torch.ones(1, 1))
    with precision.autocast(CPU, torch.float16):
        value = (weight @ small).sum()
    (value.float() / 1e4).backward()
    assert weight.grad == 0.0
    weight.grad = None
    _, norm = one_step(weight, lambda w: (w @ small).sum(), torch.float16, 0.0, divisor=1e4)
    # 1e-2 because float16 keeps 11 bits of 1e-4 and of its product
    assert float(norm) == pytest.approx(1e-8, rel=1e-2)


def test_an_overflow_skips_the_update_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.ones(1, 2))
    before = weight.detach().clone()
    engine, _ = one_step(weight, lambda w: (w * float("inf")).sum(), torch.float16, 1.0)
    scale = engine.scaler.get_scale()
    assert not engine.step()
    assert torch.equal(weight, before)
    assert engine.scaler.get_scale() == scale / 2
    assert weight.grad is None
