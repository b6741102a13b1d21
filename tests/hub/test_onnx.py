"""The ONNX export in onnxruntime: prefill, decoding with the cache, other batches and lengths, padding."""

import numpy as np
import pytest
import torch

from benchmarks.gguf_parity import make_model
from minillm.errors import UserError
from minillm.hub import load_model
from minillm.hub.onnx import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
BOUND = 1e-5  # relative to the largest logit
MODELS = {
    "qwen3": {"head_dim": 10, "num_hidden_layers": 2},  # QK-norm, heads of another width
    "mistral": {"sliding_window": 4, "tie_word_embeddings": False, "num_hidden_layers": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Return a model and its session in onnxruntime."""
    folder = tmp_path_factory.mktemp("onnx")
    model = load_model(make_model(request.param, folder / "model", **MODELS[request.param])).eval()
    export_onnx(model, folder / "model.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model", "model.onnx"]
    return model, onnxruntime.InferenceSession(str(folder / "model.onnx"))


def run(pair, ids, mask=None, positions=None, past=None):
    """Return the logits and the new past of one call."""
    model, session = pair
    config = model.config
    n_rows, n_new = ids.shape
    if past is None:
        empty = np.zeros((n_rows, config.num_key_value_heads, 0, config.head_dim), np.float32)
        past = [empty] * (2 * config.num_hidden_layers)
    n_past = past[0].shape[2]
    if mask is None:
        mask = np.ones((n_rows, n_past + n_new), np.int64)
    if positions is None:
        positions = (mask.cumsum(axis=1) - 1).clip(0)[:, -n_new:]
    names = [f"past_key_values.{n // 2}.{'value' if n % 2 else 'key'}" for n in range(len(past))]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits, *present = session.run(None, inputs | dict(zip(names, past, strict=True)))
    return torch.from_numpy(logits), present


def tokens(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 600, shape)


def difference(ours, wanted) -> float:
    return float((ours - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("n_rows, n_tokens", [(1, 1), (1, 9), (4, 7), (2, 30)])
def test_prefill_of_other_batches_and_lengths(pair, n_rows, n_tokens):
    ids = tokens(n_rows, n_tokens)
    logits, present = run(pair, ids)
    assert difference(logits, pair[0](torch.from_numpy(ids))) <= BOUND
    assert present[0].shape[2] == n_tokens


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 1, 1), (5, 1, 1, 1), (4, 3, 6)])
def test_decoding_with_the_cache(pair, cuts):
    ids, past, parts, start = tokens(2, sum(cuts)), None, [], 0
    for width in cuts:
        logits, past = run(pair, ids[:, start : start + width], past=past)
        parts.append(logits)
        start += width
    assert difference(torch.cat(parts, dim=1), pair[0](torch.from_numpy(ids))) <= BOUND


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pair):
    lengths, n_tokens, n_more = (3, 8, 5), 8, 4
    ids = tokens(3, n_tokens + n_more)
    mask = np.array([[0] * (n_tokens - n) + [1] * (n + n_more) for n in lengths])
    logits, past = run(pair, ids[:, :n_tokens], mask[:, :n_tokens])
    parts = [logits]
    for place in range(n_tokens, n_tokens + n_more):
        positions = mask[:, : place + 1].sum(axis=1, keepdims=True) - 1
        logits, past = run(pair, ids[:, place : place + 1], mask[:, : place + 1], positions, past)
        parts.append(logits)
    logits = torch.cat(parts, dim=1)
    for row, n in enumerate(lengths):
        expected = pair[0](torch.from_numpy(ids[row : row + 1, n_tokens - n :]))[0]
        assert difference(logits[row, n_tokens - n :], expected) <= BOUND
    assert difference(run(pair, ids[:, :n_tokens])[0][0, -3:], parts[0][0, -3:]) > 1e-3  # seeded: the mask matters


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = load_model(make_model("mixtral", tmp_path / "moe"))
    with pytest.raises(UserError, match="mixtral is a mixture of experts"):
        export_onnx(model, tmp_path / "model.onnx")
    model = load_model(make_model("llama", tmp_path / "llama"))
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers that are not finite"):
        export_onnx(model, tmp_path / "model.onnx", overwrite=True)
