"""What a training step asks of a GPU, counted without one: operators, waits, and the bytes kept for the gradient.

Tensors have no data here (``FakeTensorMode``): an operator that needs a number from the device, or a shape that depends
on numbers there, raises an error by itself, which proves that nothing waits. They lie on the CPU, since torch's CPU
build cannot pretend to have gradients elsewhere; what asks for the device is told that it is a GPU.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.config import ModelConfig
from minillm.data.batches import collate
from minillm.kernels import chunked_loss, linear_cross_entropy, products, varlen_attention
from minillm.kernels import linear_log_probs as linear_log_probs_module
from minillm.kernels.products import chunk_len
from minillm.losses import causal_lm_loss, linear_log_probs
from minillm.losses import linear_cross_entropy as linear_cross_entropy_of
from minillm.model import KVCache, RouterStats, Transformer
from minillm.model.attention_plan import AttentionPlan, attend

SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "use_qk_norm": True}
B, T = 2, 64
NO_KERNEL = (
    torch.ops.aten.detach,
    torch.ops.aten._unsafe_view,
    torch.ops.aten.empty_like,
    torch.ops.aten.promote_types,
)
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class Operators(TorchDispatchMode):
    """Counts operators that run a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.names: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        runs = function.namespace in ("aten", "torch_attn") and function.overloadpacket not in NO_KERNEL
        if runs and not is_view:
            self.names[function.overloadpacket.__name__] += 1
        return result


@pytest.fixture
def gpu(monkeypatch):
    """The choices of a CUDA device, on tensors without data that have gradients."""
    if not varlen_attention._torch_has_it():
        pytest.skip("this torch has no such attention")
    monkeypatch.setattr(varlen_attention, "is_available", lambda device, dtype, head_dim: dtype == torch.bfloat16)
    monkeypatch.setattr("minillm.model.moe.GROUPED_DEVICES", ("cpu",))
    monkeypatch.setattr(
        products, "chunk_len", lambda *args, device_type, **kwargs: chunk_len(*args, device_type="cuda", **kwargs)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cpu")


def loaded_batch():
    """Two rows of three documents and some padding, as the loader makes them."""
    rows = []
    for n in (20, 12):
        ids = np.arange(3 * n)
        rows.append({"input_ids": ids, "targets": ids, "position_ids": ids % n, "document_ids": ids // n})
    return collate(rows, T)


BATCH = loaded_batch()


def make_batch(device):
    """A batch of its shapes, without data."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in BATCH.items()}


def make_model(device, **settings):
    """A model in bfloat16 without data."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SHAPE | settings)).train()

    def moved(tensor):
        return torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(moved(parameter))
    model.tie_weights()
    return model


def step(model, batch, stats=None):
    causal_lm_loss(model, batch, stats)[0].backward()


# ---- waits -------------------------------------------------------------------------------------------------------


KINDS = [{}, {"sliding_window": 8}, {"use_qk_norm": True}, EXPERTS]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_nothing_waits_in_forward_loss_and_backward(gpu, settings, checkpointing):
    if "num_experts" in settings and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("experts one by one: their blocks' ends are read from the device")
    model, batch = make_model(gpu, **settings), make_batch(gpu)
    model.gradient_checkpointing = checkpointing
    stats = RouterStats(model.config, aux_loss_coef=0.1, z_loss_coef=0.1) if "num_experts" in settings else None
    with Operators() as operators:
        step(model, batch, stats)
    assert operators.names["_varlen_attn"] == SHAPE["num_hidden_layers"] * (2 if checkpointing else 1)
    assert operators.names["_varlen_attn_backward"] == SHAPE["num_hidden_layers"]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_batch_that_does_not_know_its_targets_waits(gpu):
    model, batch = make_model(gpu), make_batch(gpu)
    del batch["target_positions"]
    with pytest.raises(WAITS):
        step(model, batch)


def test_experts_one_by_one_wait(gpu, monkeypatch):
    monkeypatch.setattr("minillm.model.moe.GROUPED_MM", None)
    model, batch = make_model(gpu, **EXPERTS), make_batch(gpu)
    with pytest.raises(WAITS):
        step(model, batch)


def test_log_probabilities_wait_for_nothing(gpu):
    model, batch = make_model(gpu), make_batch(gpu)

    def head(hidden, weight):
        return linear_log_probs(hidden, weight, batch["targets"], batch["target_positions"])

    arguments = {name: batch[name] for name in ("position_ids", "document_ids", "document_bounds")}
    model(batch["input_ids"], head=head, **arguments).sum().backward()


# ---- operators ---------------------------------------------------------------------------------------------------


def operators_of(n_layers, device, backward):
    model, batch = make_model(device, num_hidden_layers=n_layers), make_batch(device)
    with Operators() as operators:
        loss_sum, _ = causal_lm_loss(model, batch)
        if not backward:
            return operators.names.copy()
        operators.names.clear()
        loss_sum.backward()
    return operators.names


def test_operators_of_a_block(gpu):
    """Uncompiled, by the difference of two models; what the compiler makes of them is fewer."""
    forward, backward = (operators_of(3, gpu, backward) - operators_of(2, gpu, backward) for backward in (False, True))
    assert sum(forward[name] for name in ("mm", "_varlen_attn")) == 8  # seven projections
    assert backward["mm"] == 14
    assert forward.total() <= 44, forward
    assert backward.total() <= 70, backward


# ---- kept for the gradient ---------------------------------------------------------------------------------------


def kept_bytes(n_layers, device, **settings):
    """Bytes of the tensors that a forward pass keeps, each storage once, parameters left out."""
    model, batch = make_model(device, num_hidden_layers=n_layers, **settings), make_batch(device)
    kept, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_lm_loss(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


def test_bytes_kept_by_a_block(gpu):
    """In bfloat16, every number that a gradient needs once; no mask, no repeated keys. The norms are our own."""
    n, heads, groups, head_dim, dim, width = B * T, 4, 2, 16, 64, 128
    stream = 2 * (2 * dim + 4)  # the inputs of two norms, and one float32 number for each
    projected = 2 * (2 * heads * head_dim + 2 * groups * head_dim)  # queries and mixed values, keys and values
    log_sums = 4 * heads
    feed_forward = 2 * 3 * width  # gate, up and their product
    generator_state = 16
    wanted = n * (stream + 2 * 2 * dim + projected + log_sums + feed_forward) + generator_state
    assert kept_bytes(3, gpu) - kept_bytes(2, gpu) == wanted


def test_with_a_mask_a_block_would_keep_more(monkeypatch):
    """Without the kernel a CPU keeps the mask of every layer."""
    if not varlen_attention._torch_has_it():
        pytest.skip("this torch has no such attention")
    with FakeTensorMode(allow_non_fake_inputs=True):
        without = kept_bytes(3, torch.device("cpu")) - kept_bytes(2, torch.device("cpu"))
    monkeypatch.setattr(varlen_attention, "is_available", lambda device, dtype, head_dim: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kept_bytes(3, torch.device("cpu")) - kept_bytes(2, torch.device("cpu")) < without


# ---- chunks of the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [6400, 32_000, 151_936])
@pytest.mark.parametrize("module", [linear_cross_entropy, linear_log_probs_module, chunked_loss])
def test_chunks_on_a_gpu_have_at_least_1024_positions(module, n_tokens):
    on_cpu, on_gpu = (chunk_len(n_tokens, numel=module.CHUNK_NUMEL, device_type=kind) for kind in ("cpu", "cuda"))
    assert on_gpu == max(1024, on_cpu)
    assert on_cpu * n_tokens <= module.CHUNK_NUMEL


@pytest.mark.parametrize("loss", ["cross-entropy", "log-probabilities"])
def test_the_output_weight_is_read_once_per_1024_positions(gpu, loss):
    """8,192 positions at a vocabulary of 150,000 are 8 chunks, where the CPU's budget would make 38, or 304."""
    hidden = torch.empty(8192, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(151_936, 64, dtype=torch.bfloat16, requires_grad=True)
    targets, rows = (torch.empty(8192, dtype=torch.long) for _ in range(2))
    with Operators() as operators:
        if loss == "cross-entropy":
            linear_cross_entropy_of(hidden, weight, targets, target_positions=rows)[0].backward()
        else:
            linear_log_probs(hidden[None], weight, targets[None], rows).sum().backward()
    n_products = 3 if loss == "cross-entropy" else 4  # the logits, once more for the gradient, and two gradients
    assert operators.names["mm"] == 8 * n_products


def test_adding_products_in_float32_keeps_digits():
    """64 chunks of a bfloat16 product: added in float32 the sum is nearer to float64 than added in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    chunks_of_a, chunks_of_b = (torch.randn(64, 32, 16, generator=generator).bfloat16() for _ in range(2))
    exact = torch.einsum("cnv,cnd->vd", chunks_of_a.double(), chunks_of_b.double())
    ours, short = None, torch.zeros(16, 16, dtype=torch.bfloat16)
    for a, b in zip(chunks_of_a, chunks_of_b, strict=True):
        ours = products.add_product(ours, a.T, b)
        short += a.T @ b
    assert ours.dtype == torch.float32
    errors = [float((total.double() - exact).norm() / exact.norm()) for total in (ours, short)]
    assert errors[0] < 2e-3
    assert errors[0] < errors[1] / 4


def test_a_product_is_added_as_it_is_written_where_torch_can(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_adds_into_float32", lambda dtype, device: True)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append((args, kwargs)) or kwargs["out"])
    total, a = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bfloat16)
    assert products.add_product(total, a, a) is total
    ((args, kwargs),) = calls
    assert args[0] is kwargs["out"] is total
    assert kwargs["out_dtype"] == torch.float32
    wide = torch.zeros(4, 4, dtype=torch.float64)
    products.add_product(wide, wide, wide)
    assert len(calls) == 1


# ---- decoding ----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator makes, views left out."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        came = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in came:
                self.n_bytes = max(self.n_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("ragged", [False, True])
def test_a_new_token_copies_no_keys(ragged):
    """Eight query heads over one key head, 200 slots: nothing is as large as the keys of a layer."""
    config = ModelConfig(**SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 16})
    torch.manual_seed(0)
    model = Transformer(config).eval()
    cache = KVCache(config, batch_size=3, max_len=256)
    ids = torch.randint(16, (3, 200))
    document_ids = torch.zeros_like(ids)
    document_ids[1, 150:] = -1
    with torch.inference_mode():
        model(ids, document_ids=document_ids if ragged else None, cache=cache)
        with Largest() as largest:
            model(ids[:, :1], cache=cache)
    keys = 3 * 200 * config.head_dim * 4
    assert largest.n_bytes < keys / 2


def test_grouped_queries_attend_as_repeated_keys_would():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, s, 8, generator=generator, dtype=torch.float64) for n, s in ((6, 1), (2, 9), (2, 9)))
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None, None, None]  # (3, 1, 1, 9)
    for plan in (AttentionPlan(mask=mask), AttentionPlan()):
        wide = (t.repeat_interleave(3, dim=1) for t in (k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=plan.mask)
        torch.testing.assert_close(attend(q, k, v, plan), wanted, rtol=0, atol=1e-12)
