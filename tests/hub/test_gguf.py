"""GGUF files: read back by the ``gguf`` package, the order of rows by llama.cpp's formula, and run by llama.cpp itself.

llama.cpp needs minutes to compile, so it is not among the test packages; those tests are skipped without it.
``benchmarks/gguf_parity.py`` runs the complete comparison.
"""

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch

from benchmarks.gguf_parity import CASES, LOGITS_BOUND, compare_ids, compare_models, make_model, tokenizer_directories
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub import export_gguf, gguf_file, load_model
from minillm.hub.gguf import gguf_name, model_settings, pairs_from_halves
from minillm.hub.gguf_file import dequantize_q8_0, encode, quantize_q8_0
from minillm.hub.gguf_tokenizer import BLANKS, CONTRACTIONS, tokenizer_settings
from minillm.hub.hard_texts import hard_texts
from minillm.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
LAYOUTS_TO_RUN = ("llama2_chatml", "metaspace_chatml", "llama3", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that makes the model of a case, once."""
    made = {}

    def make(case: str):
        if case not in made:
            made[case] = make_model(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return make


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return tokenizer_directories(tmp_path_factory.mktemp("tokenizers"))


def read_tensors(path) -> dict[str, np.ndarray]:
    """Return all tensors in float32, as the gguf package decodes them."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


def expected_tensors(model) -> dict[str, torch.Tensor]:
    """Return the tensors that the file must hold, named and ordered by other means than the exporter's."""
    config, expected = model.config, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name == "lm_head.weight" and config.tie_word_embeddings and config.model_type != "qwen2_moe":
            continue
        if config.model_type in ("llama", "mistral", "mixtral") and (".q_proj." in name or ".k_proj." in name):
            half = config.head_dim // 2
            order = [i // 2 + (i % 2) * half for i in range(config.head_dim)]
            tensor = torch.cat([head[order] for head in tensor.split(config.head_dim)])
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            block = "blk." + name.split(".")[2]
            expected |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        else:
            expected[gguf_name(name, config)] = tensor.squeeze(0) if "shared_expert_gate" in name else tensor
    return expected


# ---- the container -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read_back(models, case, tmp_path):
    directory = models(case)
    export_gguf(directory, tmp_path / "model.gguf", dtype="f32")
    stored, expected = read_tensors(tmp_path / "model.gguf"), expected_tensors(load_model(directory))
    rope_freqs = stored.pop("rope_freqs.weight", None)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(stored[name], tensor.numpy()), name
    assert (rope_freqs is not None) == ("llama3" in case)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_formats(models, dtype, tmp_path):
    directory = models("glm4_moe")  # rows of 48, 36 and 100 numbers
    notes = export_gguf(directory, tmp_path / "model.gguf", dtype=dtype)
    kinds = {
        tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    wanted = expected_tensors(load_model(directory))
    for name, tensor in wanted.items():
        is_small = tensor.ndim == 1 or "gate_inp" in name
        form = "f32" if is_small else "f16" if dtype == "q8_0" else dtype
        assert kinds[name] == form, name
    assert any("stay f16" in note for note in notes) == (dtype == "q8_0")
    for name, stored in read_tensors(tmp_path / "model.gguf").items():
        expected = wanted[name]
        if kinds[name] != "f32":
            expected = expected.to(torch.bfloat16 if kinds[name] == "bf16" else torch.float16).float()
        assert np.array_equal(stored, expected.numpy()), name


def test_q8_0_keeps_whole_rows_and_the_rest_is_float16(tmp_path):
    directory = make_model("llama", tmp_path / "model", hidden_size=64, head_dim=16, num_attention_heads=4)
    notes = export_gguf(directory, tmp_path / "model.gguf", dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 100
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert notes == ["3 matrices stay f16, because their rows are not multiples of 32 numbers: blk.0.ffn_down.weight, "
                     "blk.1.ffn_down.weight, blk.2.ffn_down.weight"]  # fmt: skip


def test_q8_0_equals_the_package_byte_for_byte():
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((50, 96)).astype(np.float32) * 10.0 ** generator.integers(-6, 4, (50, 1))
    numbers[0], numbers[1, 32:64], numbers[2, 0] = 0, 0, 127
    numbers[2, 1:32] = np.arange(31) + 0.5  # halves, with a scale of 1
    numbers[3, :32] = -numbers[2, :32]
    expected = gguf.quantize(numbers.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    ours = quantize_q8_0(numbers.astype(np.float32))
    assert ours.tobytes() == expected.tobytes()
    assert np.array_equal(
        dequantize_q8_0(ours).reshape(50, 96), gguf.dequantize(expected, gguf.GGMLQuantizationType.Q8_0)
    )


def test_bfloat16_equals_the_package_bit_for_bit():
    numbers = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * 1e3
    expected = gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType.BF16)
    assert bytes(encode(numbers, "bf16")) == expected.tobytes()


def test_settings_are_read_back(models, tmp_path):
    export_gguf(models("glm4_moe"), tmp_path / "model.gguf", dtype="f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = load_tokenizer(models("glm4_moe"))
    assert values["general.architecture"] == "glm4moe"
    assert values["glm4moe.rope.dimension_count"] == 6
    assert values["glm4moe.leading_dense_block_count"] == 1
    assert values["glm4moe.expert_group_used_count"] == 2
    assert values["glm4moe.expert_weights_scale"] == 1.5
    assert values["glm4moe.expert_weights_norm"] is True
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert (
        values["tokenizer.ggml.eos_token_id"]
        == values["tokenizer.ggml.eot_token_id"]
        == tokenizer.token_id("<|eot_id|>")
    )
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert len(values["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 7
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 6}]"
    assert values["tokenizer.ggml.token_type"][-7:] == [5] * 7
    assert "<|start_header_id|>" in values["tokenizer.chat_template"]


# ---- the order of rows ---------------------------------------------------------------------------


def neighbours_turned(heads: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Return (T, heads, K) turned as llama.cpp's ``llama`` graph does: numbers 2i and 2i + 1 of a head together."""
    dim = heads.shape[-1]
    angles = positions[:, None, None] * theta ** (-np.arange(0, dim, 2) / dim)
    even, odd, cos, sin = heads[..., 0::2], heads[..., 1::2], np.cos(angles), np.sin(angles)
    turned = np.empty_like(heads)
    turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return turned


def halves_turned(heads: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Return (T, heads, K) turned as in Hugging Face's layout: numbers i and i + K/2 together."""
    dim = heads.shape[-1]
    angles = positions[:, None, None] * theta ** (-np.arange(0, dim, 2) / dim)
    first, second, cos, sin = heads[..., : dim // 2], heads[..., dim // 2 :], np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def scores(x, q_weight, k_weight, turn, *, n_heads=4, n_kv_heads=2, head_dim=8) -> np.ndarray:
    """Return the products of all queries and keys, (H, T, T)."""
    positions = np.arange(len(x))
    q = turn((x @ q_weight.T).reshape(len(x), n_heads, head_dim), positions, 1e4)
    k = turn((x @ k_weight.T).reshape(len(x), n_kv_heads, head_dim), positions, 1e4)
    return np.einsum("thk,shk->hts", q, k.repeat(n_heads // n_kv_heads, axis=1))


def with_query_heads(weight, head_dim):
    """The classic mistake: keys are reordered as if they had as many heads as queries."""
    n_heads, dim = 4, weight.shape[1]
    return weight.view(n_heads, 2, len(weight) // n_heads // 2, dim).transpose(1, 2).reshape(weight.shape)


def test_reordered_rows_give_the_same_scores():
    generator = torch.Generator().manual_seed(0)
    x, q, k = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (9, 32, 16))
    expected = scores(x.numpy(), q.numpy(), k.numpy(), halves_turned)
    ours = scores(x.numpy(), pairs_from_halves(q, 8).numpy(), pairs_from_halves(k, 8).numpy(), neighbours_turned)
    assert np.abs(ours - expected).max() < 1e-12 * np.abs(expected).max()
    for reorder in (lambda weight, _: weight, with_query_heads):  # seeded: rows as they are, and too many heads
        wrong_k = scores(x.numpy(), pairs_from_halves(q, 8).numpy(), reorder(k, 8).numpy(), neighbours_turned)
        assert np.abs(wrong_k - expected).max() > 0.1 * np.abs(expected).max()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, changes, reason",
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "no dynamic RoPE"),
        ("qwen3", {"rope_scaling": CASES["llama, llama3"]["rope_scaling"]}, "no llama3 RoPE"),
        ("llama, yarn", {"rope_scaling": CASES["llama, yarn"]["rope_scaling"] | {"truncate": False}}, "fixed bounds"),
        ("qwen2", {"head_dim": 10}, "hidden_size / num_attention_heads"),
        ("qwen2_moe", {"norm_topk_prob": True}, "never divides"),
        ("qwen2_moe", {"shared_expert_gate": False}, "0/0"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "all of its layers have experts"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always divides"),
        ("qwen3_moe", {"first_k_dense_replace": 1}, "all of its layers have experts"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(case, changes, reason):
    from benchmarks.gguf_parity import SHAPE

    config = ModelConfig(**(SHAPE | {"vocab_size": 50} | CASES[case] | changes))
    with pytest.raises(UserError, match=reason):
        model_settings(config, [], name="x")


def test_a_window_limits_the_context(models):
    notes = []
    config = ModelConfig.from_hf(models("mistral"))
    assert model_settings(config, notes, name="x")["llama.context_length"] == 110
    assert "no sliding window" in notes[0]
    notes.clear()
    model_settings(dataclasses.replace(config, sliding_window=None), notes, name="x")
    assert notes == []


def test_bad_requests(models, tmp_path):
    directory = models("llama")
    with pytest.raises(UserError, match=r"dtype 'q4': choose one of f32"):
        export_gguf(directory, tmp_path / "a.gguf", dtype="q4")
    with pytest.raises(UserError, match=r"no config\.json"):
        export_gguf(tmp_path, tmp_path / "a.gguf")
    with pytest.raises(UserError, match="is a directory"):
        export_gguf(directory, tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(directory, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"
    export_gguf(directory, tmp_path / "a.gguf", overwrite=True)
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"


BAD_NUMBERS = [(float("nan"), "f32", "not finite"), (float("inf"), "bf16", "not finite"), (7e4, "f16", "too large")]


@pytest.mark.parametrize("value, dtype, reason", BAD_NUMBERS)
def test_numbers_that_a_format_cannot_hold(tmp_path, value, dtype, reason):
    from safetensors.torch import load_file, save_file

    directory = make_model("llama", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"blk\.1\.ffn_up\.weight has .*{reason}"):
        export_gguf(directory, tmp_path / "model.gguf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"old")
    written = []

    def encode_until_full(*args, **options):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(args)
        return encode(*args, **options)

    monkeypatch.setattr(gguf_file, "encode", encode_until_full)
    with pytest.raises(UserError, match=r"cannot write .*model\.gguf: No space left on device"):
        export_gguf(models("llama"), tmp_path / "model.gguf", overwrite=True)
    assert (tmp_path / "model.gguf").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_are_read_one_at_a_time(models, tmp_path, monkeypatch):
    from minillm.hub.huggingface import Weights

    alive, most = set(), []
    read = Weights.read

    def counted(self, name, **options):
        tensor = read(self, name, **options)
        alive.add(name)
        most.append(len(alive))
        import weakref

        weakref.finalize(tensor.untyped_storage(), alive.discard, name)
        return tensor

    monkeypatch.setattr(Weights, "read", counted)
    export_gguf(models("qwen3_moe"), tmp_path / "model.gguf")
    assert len(most) > 20
    assert max(most) <= 2  # the next is read while the last is still named


# ---- tokenizers ----------------------------------------------------------------------------------


def settings_of(directory, **options) -> tuple[dict, list[str]]:
    notes: list[str] = []
    tokenizer = load_tokenizer(directory)
    return tokenizer_settings(tokenizer, notes, vocab_size=tokenizer.vocab_size, **options), notes


def test_our_byte_level_tokenizer_needs_tekken_without_contractions(directories):
    settings, notes = settings_of(directories["ours, bpe"])
    assert settings["tokenizer.ggml.pre"] == "tekken"
    assert not any(merge.startswith("' ") for merge in settings["tokenizer.ggml.merges"])
    assert "'s" in settings["tokenizer.ggml.tokens"]
    assert [note.split(": ", 1)[1] for note in notes] == [BLANKS.description, CONTRACTIONS.description]


@pytest.mark.parametrize("text, blanks, contractions", [
    ("  你好", True, False), ("\u3000\u3000第", True, False), ("  5", True, False), (" 5", False, False),
    ("  a", False, False), ("\n\n你", False, False), ("'sA", False, True), ("'small", False, False),
    ("e\u0301's", False, True), ("it's", False, False),
])  # fmt: skip
def test_known_differences(text, blanks, contractions):
    assert (BLANKS.applies(text), CONTRACTIONS.applies(text)) == (blanks, contractions)


def test_other_merges_are_noticed(directories, tmp_path, monkeypatch):
    """Seeded: with the merges of contractions, "'small'" would be cut as "'s" and "mall"."""
    monkeypatch.setattr("minillm.hub.gguf_tokenizer._makes_contraction", lambda *pair: False)
    with pytest.raises(UserError, match=r"no tokenizer of llama\.cpp gives the same ids.*allow_token_differences"):
        settings_of(directories["ours, bpe"])
    settings, notes = settings_of(directories["ours, bpe"], allow_differences=True)
    assert settings["tokenizer.ggml.tokens"]
    assert "hard texts get other ids" in notes[0]


def test_tokens_that_are_never_encoded_get_another_name(directories):
    """The newline is a byte in this layout, so " \\n", which its vocabulary has, is never made."""
    tokenizer = load_tokenizer(directories["llama2"])
    settings, _ = settings_of(directories["llama2"])
    token_id = tokenizer.token_id("\u2581\n")
    assert settings["tokenizer.ggml.tokens"][token_id] == f"[UNREACHABLE{token_id}]"
    assert settings["tokenizer.ggml.token_type"][token_id] == 5


def test_other_kinds_are_refused(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no tokenizer of this kind"):
        settings_of(tmp_path)


def test_hard_texts_are_many_and_the_same_each_time():
    texts = hard_texts([b"ab", b"\xff"])
    assert len(texts) > 1500
    assert texts == hard_texts([b"ab", b"\xff"])
    assert {"aabb", "你ab好"} <= set(texts)


# ---- llama.cpp itself ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="it compiles for minutes: benchmarks/gguf_parity.py")


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(llama_cpp, models, case, tmp_path):
    export_gguf(models(case), tmp_path / "model.gguf", dtype="f32")
    result = compare_models(models(case), tmp_path / "model.gguf", n_tokens=40, max_new_tokens=16)
    assert result["logits"] <= LOGITS_BOUND
    assert result["equal_tokens"] == 16


@pytest.mark.parametrize("name", ["ours, bpe", "ours, sentencepiece", "mistral", *LAYOUTS_TO_RUN])
def test_llama_cpp_gives_the_same_ids(llama_cpp, directories, name):
    result = compare_ids(directories[name], n_texts=1000)
    assert result["unexplained"] == []
    assert result["equal"] > 1000
