"""Bare state dicts: MiniMind's layouts answer as its definition says, and their shapes tell the configuration."""

import collections
import dataclasses
import json
import math
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.pth import infer_config

VOCAB, WIDTH, LAYERS, HEADS = 91, 48, 3, 8
HEAD_DIM = WIDTH // HEADS
KV_HEADS = {"v1": 4, "v2": 2, "v3": 4, "old": 2}  # old: as version 2 began, with the names of version 1
THETA = {"v1": 1e4, "v2": 1e6, "v3": 1e6, "old": 1e6}
FEED_FORWARD = {"v1": 128, "v2": 128, "v3": 64 * math.ceil(WIDTH * math.pi / 64), "old": 128}
EPS = {"v1": 1e-5, "v2": 1e-5, "v3": 1e-6, "old": 1e-5}
OLD = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "self_attn": "attention",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp": "feed_forward",
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2", "model.layers": "layers",
}  # fmt: skip


def minimind(layout, *, experts=0, shared=0, seed=0):
    """Random weights under the new names, as MiniMind's trainers save them: float16, the tied matrix twice."""
    generator = torch.Generator().manual_seed(seed)
    feed_forward, kv_dim = FEED_FORWARD[layout], KV_HEADS[layout] * HEAD_DIM

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) * 0.15).half()

    def norm(size):
        return (1 + 0.3 * torch.randn(size, generator=generator)).half()

    def ffn(prefix):
        return {
            prefix + "gate_proj.weight": matrix(feed_forward, WIDTH),
            prefix + "down_proj.weight": matrix(WIDTH, feed_forward),
            prefix + "up_proj.weight": matrix(feed_forward, WIDTH),
        }

    weights = {"model.embed_tokens.weight": matrix(VOCAB, WIDTH) * 0.02}  # so small that eps matters
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", WIDTH), ("k", kv_dim), ("v", kv_dim), ("o", WIDTH)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, WIDTH)
        if layout == "v3":
            weights |= {f"{prefix}self_attn.{name}_norm.weight": norm(HEAD_DIM) for name in "qk"}
        weights |= {f"{prefix}{name}_layernorm.weight": norm(WIDTH) for name in ("input", "post_attention")}
        if experts:
            weights[prefix + "mlp.gate.weight"] = matrix(experts, WIDTH) * 8
            for expert in range(experts):
                weights |= ffn(f"{prefix}mlp.experts.{expert}.")
            for expert in range(shared):
                weights |= ffn(f"{prefix}mlp.shared_experts.{expert}.")
        else:
            weights |= ffn(prefix + "mlp.")
    weights["model.norm.weight"] = norm(WIDTH)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def old_names(weights):
    renamed = {}
    for name, tensor in weights.items():
        for new, old in OLD.items():
            name = name.replace(new + ".", old + ".")
        renamed[name] = tensor
    return renamed


def slow_minimind(weights, layout, ids, *, top_k=1, normalise=True):
    """MiniMind's definition for one sequence: logits (T, V), in float64, one head and one position at a time."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    n_tokens = len(ids)

    def rms(x, name):
        return x / (x.square().mean() + EPS[layout]).sqrt() * weights[name]

    def turned(head, position):
        result = head.clone()
        for pair in range(HEAD_DIM // 2):
            # Version 2 began with neighbouring pairs (complex numbers); later releases pair the two halves.
            first, second = (2 * pair, 2 * pair + 1) if layout in ("v1", "old") else (pair, pair + HEAD_DIM // 2)
            angle = position * THETA[layout] ** (-2 * pair / HEAD_DIM)
            x, y = head[first], head[second]
            result[first] = x * math.cos(angle) - y * math.sin(angle)
            result[second] = x * math.sin(angle) + y * math.cos(angle)
        return result

    def swiglu(x, prefix):
        gate = weights[prefix + "gate_proj.weight"] @ x
        return weights[prefix + "down_proj.weight"] @ (gate * gate.sigmoid() * (weights[prefix + "up_proj.weight"] @ x))

    def feed_forward(x, prefix):
        if prefix + "gate.weight" not in weights:
            return swiglu(x, prefix)
        scores = (weights[prefix + "gate.weight"] @ x).softmax(0)
        chosen = scores.topk(top_k)
        shares = chosen.values / chosen.values.sum() if normalise else chosen.values
        pairs = zip(shares, chosen.indices.tolist(), strict=True)
        out = sum(weight * swiglu(x, f"{prefix}experts.{expert}.") for weight, expert in pairs)
        shared = (f"{prefix}shared_experts.{number}." for number in range(9))
        return out + sum(swiglu(x, one) for one in shared if f"{one}gate_proj.weight" in weights)

    stream = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        queries, keys, values = [], [], []
        for position, x in enumerate(stream):
            x = rms(x, prefix + "input_layernorm.weight")
            rows = {name: (weights[f"{prefix}self_attn.{name}_proj.weight"] @ x).view(-1, HEAD_DIM) for name in "qkv"}
            for name in "qk" if layout == "v3" else "":
                rows[name] = torch.stack([rms(head, f"{prefix}self_attn.{name}_norm.weight") for head in rows[name]])
            queries.append([turned(head, position) for head in rows["q"]])
            keys.append([turned(head, position) for head in rows["k"]])
            values.append(rows["v"])
        for position in range(n_tokens):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS[layout])
                seen = range(position + 1)
                products = [queries[position][head] @ keys[s][group] / math.sqrt(HEAD_DIM) for s in seen]
                shares = torch.stack(products).softmax(0)
                heads.append(sum(shares[s] * values[s][group] for s in seen))
            stream[position] = stream[position] + weights[f"{prefix}self_attn.o_proj.weight"] @ torch.cat(heads)
        stream = [x + feed_forward(rms(x, prefix + "post_attention_layernorm.weight"), prefix + "mlp.") for x in stream]
    return torch.stack([weights["lm_head.weight"] @ rms(x, "model.norm.weight") for x in stream])


def save(weights, path, **more):
    torch.save(weights | more, path)
    return path


IDS = [5, 88, 0, 17, 17, 42, 3, 90, 61]


@pytest.mark.parametrize("layout", ["v1", "v2", "v3", "old"])
@torch.no_grad()
def test_logits_are_minimind_s(tools, layout, tmp_path):
    weights = minimind(layout)
    path = save(old_names(weights) if layout in ("v1", "old") else weights, tmp_path / "full_sft_48.pth")
    given = {"num_attention_heads": HEADS} if layout != "v3" else {}
    given |= {"rope_theta": THETA[layout]} if layout in ("v1", "old") else {}
    config = infer_config(path, given=given)
    model = load_model(path, config=config).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = slow_minimind(weights, layout, IDS)
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), wanted) <= 1e-5


@pytest.mark.parametrize(
    "layout, top_k, file",
    [
        ("v2", 0, "pytorch_model.bin"), ("v3", 0, "model.safetensors"), ("v3", 1, "model.safetensors"),
        ("v3", 2, "pytorch_model.bin"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_minimind_s_export_is_read_as_a_directory(tools, layout, top_k, file, tmp_path):
    """With the class of its own that transformers writes it in: the file says all, so nothing else must."""
    weights = minimind(layout, experts=4 if top_k else 0)
    config = {"model_type": "minimind", "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    if layout == "v2":
        config |= {"n_routed_experts": 4, "n_shared_experts": 1, "use_moe": False, "intermediate_size": None}
    else:
        config |= {"use_moe": bool(top_k), "num_experts": 4, "num_experts_per_tok": top_k or 1, "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(weights, tmp_path / file)
    else:
        save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, tmp_path / file)
    model = load_model(tmp_path).eval()
    wanted = slow_minimind(weights, layout, IDS, top_k=top_k)
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), wanted) <= 1e-5


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_the_experts_of_version_3_are_qwen3_moe(tools, top_k, normalise, tmp_path):
    """With one expert per token its releases before September 2026 normalise, later ones do not."""
    path = save(weights := minimind("v3", experts=4), tmp_path / "full_sft_48_moe.pth")
    config = infer_config(path, given={"num_experts_per_tok": top_k, "norm_topk_prob": normalise})
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 4, top_k)
    assert (config.norm_topk_prob, config.moe_intermediate_size, config.first_k_dense_replace) == (normalise, 192, 0)
    model = load_model(path, config=config).eval()
    wanted = slow_minimind(weights, "v3", IDS, top_k=top_k, normalise=normalise)
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), wanted) <= 1e-5


@pytest.mark.parametrize(
    "shared, file", [(1, "x.pth"), (2, "old.pth"), (1, "pytorch_model.bin"), (2, "model.safetensors")]
)
@torch.no_grad()
def test_the_experts_of_version_2_are_an_ungated_qwen2_moe(tools, shared, file, tmp_path):
    layout = "old" if file == "old.pth" else "v2"
    weights, given = minimind(layout, experts=4, shared=shared), {"num_experts_per_tok": 2, "norm_topk_prob": True}
    if file.endswith(".pth"):
        path = save(old_names(weights) if layout == "old" else weights, tmp_path / file)
        given |= {"num_attention_heads": HEADS, "rope_theta": THETA[layout]}
        config = infer_config(path, given=given)
    else:
        path, config = tmp_path, None
        values = {"model_type": "minimind", "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
        values |= {"n_routed_experts": 4, "n_shared_experts": shared, "use_moe": True, "intermediate_size": None}
        (tmp_path / "config.json").write_text(json.dumps(values))
        tensors = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
        torch.save(weights, tmp_path / file) if file.endswith(".bin") else save_file(tensors, tmp_path / file)
    model = load_model(path, config=config).eval()
    config = model.config
    assert (config.model_type, config.n_shared_experts, config.shared_expert_gate) == ("qwen2_moe", shared, False)
    assert (config.shared_expert_intermediate_size, config.attention_bias) == (shared * 128, False)
    wanted = slow_minimind(weights, layout, IDS, top_k=2)
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), wanted) <= 1e-5
    save_model(model, tmp_path / "ours")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    assert type(reference).__name__ == "Qwen2MoeForCausalLM"
    assert tools.difference(reference.eval()(torch.tensor([IDS])).logits[0].double(), wanted) <= 1e-5
    again = load_model(tmp_path / "ours")
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    bare = save(model.state_dict(), tmp_path / "bare.pth")  # as in memory: no gate, and nothing doubled
    given |= {"num_attention_heads": HEADS}
    assert infer_config(bare, given=given).shared_expert_intermediate_size == shared * 128
    again = load_model(bare, config=config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_a_state_dict_of_transformers_qwen2_moe(tools, tmp_path):
    config = tools.config(family="qwen2_moe", decoder_sparse_step=1, norm_topk_prob=False, eos_token_id=2)
    model = tools.model(config).eval()
    path = save(tools.reference(model).state_dict(), tmp_path / "theirs.pth")
    given = {"num_attention_heads": 6, "num_experts_per_tok": 2, "norm_topk_prob": False, "rope_theta": 1e4}
    found = infer_config(path, given=given | {"max_position_embeddings": 64, "eos_token_id": 2})
    # The width of a dense layer, of which there is none, and whether 26 is one expert or several, is not there.
    assert dataclasses.replace(found, intermediate_size=100) == config
    tokens = tools.tokens(2, 9)
    assert torch.equal(load_model(path, config=found).eval()(tokens), model(tokens))


LLAMA2_C = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": 4, "vocab_size": VOCAB, "multiple_of": 32,
            "max_seq_len": 77, "dropout": 0.0}  # fmt: skip


@torch.no_grad()
def test_llama2_c_s_checkpoint_says_its_heads_itself(tools, tmp_path):
    weights = minimind("v1")  # its names, its angles, and as often twice as many heads as key heads
    content = {f"_orig_mod.{name}": tensor for name, tensor in old_names(weights).items()}
    torch.save({"model": content, "model_args": LLAMA2_C, "iter_num": 5, "config": {}}, tmp_path / "ckpt.pth")
    config = infer_config(tmp_path / "ckpt.pth", fallback={"hidden_size": WIDTH, "num_attention_heads": 6})
    assert (config.num_attention_heads, config.rope_theta, config.max_position_embeddings) == (HEADS, 1e4, 77)
    model = load_model(tmp_path / "ckpt.pth", config=config).eval()
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), slow_minimind(weights, "v1", IDS)) <= 1e-5
    with pytest.raises(UserError, match="says itself that num_attention_heads is 8, but 4 was given"):
        infer_config(tmp_path / "ckpt.pth", given={"num_attention_heads": 4})


def test_nothing_is_guessed_from_llama_s_names(tmp_path):
    path = save(old_names(minimind("v1")), tmp_path / "w.pth")
    for fallback in ({}, {"hidden_size": WIDTH, "num_attention_heads": HEADS}):
        with pytest.raises(UserError, match="does not tell how many heads its 48 query rows are"):
            infer_config(path, fallback=fallback)
        with pytest.raises(UserError, match=r"does not tell the angles.*--rope_theta 10000"):
            infer_config(path, given={"num_attention_heads": HEADS}, fallback=fallback | {"rope_theta": 1e6})
    assert infer_config(path, given={"num_attention_heads": HEADS, "rope_theta": 5e5}).rope_theta == 5e5


def test_the_shapes_tell_the_configuration(tmp_path):
    sizes = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    }  # fmt: skip
    v2 = infer_config(save(minimind("v2"), tmp_path / "2.pth"), fallback={"num_attention_heads": HEADS})
    assert v2 == ModelConfig(**sizes, num_key_value_heads=2, intermediate_size=128)
    v3 = infer_config(save(minimind("v3"), tmp_path / "3.pth"))
    assert v3 == ModelConfig(**sizes, num_key_value_heads=4, intermediate_size=192, use_qk_norm=True, rms_norm_eps=1e-6)
    assert (v2.rope_theta, v2.rms_norm_eps) == (1e6, 1e-5)


def test_more_layers_than_nine_and_what_was_said_besides(tmp_path):
    weights = minimind("v3")
    for layer in range(3, 11):
        weights |= {
            name.replace("layers.2.", f"layers.{layer}."): t for name, t in weights.items() if "layers.2." in name
        }
    path = save(weights, tmp_path / "deep.pth")
    said = {"rope_theta": 1e4, "max_position_embeddings": 512, "num_hidden_layers": None, "eos_token_id": 2}
    config = infer_config(
        path, given={"num_hidden_layers": 11}, fallback=said | {"n_shared_experts": 1, "vocab_size": 7}
    )
    assert (config.num_hidden_layers, config.vocab_size, config.n_shared_experts) == (11, VOCAB, 0)
    assert (config.rope_theta, config.max_position_embeddings, config.eos_token_id) == (1e4, 512, 2)


def test_our_own_models_of_every_family(tools, tmp_path):
    """torch.save of a model's state dict, whatever the family: the shapes tell all but the sizes not in them."""
    common = {
        "vocab_size": 83,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "intermediate_size": 20,
    }
    for name, changes in {
        "llama": {"num_key_value_heads": 3},
        "untied": {"tie_word_embeddings": False},
        "wide heads": {"use_qk_norm": True, "head_dim": 10},
    }.items():
        config = ModelConfig(**common | changes)
        path = save(tools.model(config).state_dict(), tmp_path / f"{name}.pth")
        assert infer_config(path, given={"num_attention_heads": 6}) == config, name
        loaded = load_model(path, config=infer_config(path, fallback={"head_dim": config.head_dim}))
        assert loaded.config == config


def test_tables_and_wrappers_are_no_weights(tools, tmp_path):
    """A table of older releases tells the width of a head besides."""
    weights = minimind("v2")
    plain = load_model(
        save(weights, tmp_path / "a.pth"), config=infer_config(tmp_path / "a.pth", given={"head_dim": HEAD_DIM})
    )
    tables = {"model.freqs_cos": torch.zeros(64, HEAD_DIM), "model.freqs_sin": torch.zeros(64, HEAD_DIM)}
    tables["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(HEAD_DIM // 2)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in (weights | tables).items()}
    for content in (
        weights | tables,
        collections.OrderedDict(wrapped),
        {"model": wrapped, "optimizer": {"state": {}}, "step": 3},
    ):
        torch.save(content, tmp_path / "b.pth")
        config = infer_config(tmp_path / "b.pth")
        assert config == plain.config
        loaded = load_model(tmp_path / "b.pth", config=config, dtype=torch.bfloat16)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    old = old_names(weights) | {"pos_cis": torch.zeros(64, HEAD_DIM // 2, dtype=torch.complex64)}
    save(old, tmp_path / "old.pth", **{"layers.0.attention.mask": torch.zeros(1, 1, 9, 9)})
    assert infer_config(tmp_path / "old.pth", given={"rope_theta": 1e6}) == plain.config
    assert load_model(tmp_path / "old.pth", config=plain.config).config == plain.config


def test_files_of_old_torch_are_read(tmp_path):
    torch.save(minimind("v3"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    config = infer_config(tmp_path / "old.pth")
    assert load_model(tmp_path / "old.pth", config=config).config.use_qk_norm


def test_heads_must_be_said_where_nothing_tells_them(tmp_path):
    path = save(minimind("v2"), tmp_path / "w.pth")
    for fallback in (None, {"hidden_size": 512, "num_attention_heads": 8}):  # the heads of another width tell nothing
        said = rf"^{re.escape(str(path))} does not tell how many heads its 48 query rows are.*--num_attention_heads 8"
        with pytest.raises(UserError, match=said):
            infer_config(path, fallback=fallback)
    assert infer_config(path, fallback={"hidden_size": 48, "num_attention_heads": 4}).num_attention_heads == 4
    for heads in (5, 16, 49):  # 16: three numbers each, which make no pairs
        with pytest.raises(UserError, match=r"heads|head_dim"):
            infer_config(path, given={"num_attention_heads": heads})


@pytest.mark.parametrize(
    "given",
    [
        {"num_hidden_layers": 2},
        {"hidden_size": 64},
        {"use_qk_norm": False},
        {"num_attention_heads": 4},
        {"head_dim": 8},
    ],
)
def test_what_was_said_and_is_not_so(tmp_path, given):
    name, value = next(iter(given.items()))
    with pytest.raises(UserError, match=rf"w\.pth contradict .*: {name} is \w+ in the file, but {value} was given"):
        infer_config(save(minimind("v3"), tmp_path / "w.pth"), given=given)


def test_an_output_of_its_own_is_not_lost(tmp_path):
    weights = minimind("v3")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    path = save(weights, tmp_path / "w.pth")
    config = infer_config(path)
    assert not config.tie_word_embeddings
    assert torch.equal(load_model(path, config=config).lm_head.weight, weights["lm_head.weight"].float())
    tied = ModelConfig(
        **{name: getattr(config, name) for name in config.__dataclass_fields__} | {"tie_word_embeddings": True}
    )
    with pytest.raises(UserError, match=r"separate output matrix.*set tie_word_embeddings to False"):
        load_model(path, config=tied)


@pytest.mark.parametrize("layout, shared", [("v2", 0), ("v2", 1), ("v3", 0)])
def test_what_experts_need_must_be_said(tmp_path, layout, shared):
    """Whatever a preset says: it is another model's."""
    path = save(minimind(layout, experts=4, shared=shared), tmp_path / "w.pth")
    given, preset = {"num_attention_heads": HEADS}, {"num_experts_per_tok": 2, "norm_topk_prob": True}
    with pytest.raises(UserError, match="the number of experts per token: give num_experts_per_tok"):
        infer_config(path, given=given, fallback=preset)
    given["num_experts_per_tok"] = 2
    with pytest.raises(UserError, match="divided by their sum: give norm_topk_prob"):
        infer_config(path, given=given, fallback=preset)
    config = infer_config(path, given=given | {"norm_topk_prob": True})
    assert config.model_type == ("qwen3_moe" if layout == "v3" else "qwen2_moe" if shared else "mixtral")


@torch.no_grad()
def test_the_experts_of_version_2_without_shared_ones_are_mixtral(tools, tmp_path):
    path = save(weights := minimind("v2", experts=4), tmp_path / "w.pth")
    config = infer_config(path, given={"num_attention_heads": HEADS, "num_experts_per_tok": 2, "norm_topk_prob": True})
    model = load_model(path, config=config).eval()
    wanted = slow_minimind(weights, "v2", IDS, top_k=2)
    assert tools.difference(model(torch.tensor([IDS]))[0].double(), wanted) <= 1e-5
    again = load_model(save(model.state_dict(), tmp_path / "ours.pth"), config=config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_is_no_model(tmp_path):
    adapter = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(8, WIDTH)}
    broken = minimind("v3")
    del broken["model.layers.0.mlp.gate_proj.weight"]
    for name, content, wanted in (
        ("lora", adapter, "is an adapter, not a model.*give --from_weight its model"),
        ("empty", {}, "no complete model"),
        ("step", {"step": 3}, "not a plain state dict"),
        ("code", print, "not a plain state dict"),
        ("broken", broken, "not the state dict of a supported model"),
        ("gate", minimind("v3") | {"x.mlp.gate.weight": torch.zeros(2)}, "not the state dict of a supported model"),
        ("numbers", {5: torch.zeros(2)}, "not a plain state dict"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=wanted):
            infer_config(tmp_path / f"{name}.pth")
    for content in (b"no weights", b"", b"\x80\x02."):  # at the last one torch's own reader ends in an IndexError
        (tmp_path / "text.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"text\.pth is not a plain state dict"):
            infer_config(tmp_path / "text.pth")
