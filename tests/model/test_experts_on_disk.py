"""Names and places of stored experts, against lists written out by hand."""

import pytest
import torch

from minillm.config.experts_on_disk import Piece, pieces_of, prediction_layer_names

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    "model_type, prefix, parts",
    [
        ("mixtral", "block_sparse_moe.experts.", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
        ("glm4_moe", "mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_one_by_one(tools, model_type, prefix, parts):
    """Expert e's gate is rows 0 to F of its slice, its up matrix rows F to 2F; nothing else, nothing twice."""
    config = tools.config(family=model_type, num_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)
    width, dim = config.moe_intermediate_size, config.hidden_size
    gate, up, down = parts
    stored = {
        f"{LAYER}{prefix}{e}.{part}.weight": torch.randn(*((dim, width) if part == down else (width, dim)))
        for e in range(2)
        for part in parts
    }

    def fill(name, *shape):
        whole = torch.full(shape, torch.nan)
        for piece in pieces_of(f"{LAYER}mlp.experts.{name}", config):
            assert whole[piece.index].isnan().all()  # not filled before
            whole[piece.index] = stored.pop(piece.name)
        return whole

    wanted = {key.removeprefix(LAYER + prefix): tensor for key, tensor in stored.items()}
    gate_up, downs = fill("gate_up_proj", 2, 2 * width, dim), fill("down_proj", 2, dim, width)
    assert not stored
    for e in range(2):
        assert torch.equal(gate_up[e, :width], wanted[f"{e}.{gate}.weight"])
        assert torch.equal(gate_up[e, width:], wanted[f"{e}.{up}.weight"])
        assert torch.equal(downs[e], wanted[f"{e}.{down}.weight"])


def test_what_is_no_expert_stays_as_it_is(tools, family):
    config = tools.config(family=family)
    for name in ("lm_head.weight", f"{LAYER}self_attn.q_proj.bias", f"{LAYER}input_layernorm.weight"):
        assert pieces_of(name, config) == [Piece(name)]
    for name in ("mlp.gate.weight", "mlp.shared_experts.down_proj.weight", "mlp.down_proj.weight"):
        renamed = name.replace("mlp", "block_sparse_moe") if family == "mixtral" else name
        assert pieces_of(LAYER + name, config) == [Piece(LAYER + renamed)]


def test_prediction_layers_are_those_behind_the_last_that_mix_in_an_embedding(tools):
    names = [f"model.layers.{i}.{rest}" for i in (1, 2, 20, 3) for rest in ("mlp.gate.weight", "self_attn.q_proj.bias")]
    config = tools.config(family="glm4_moe")  # 2 layers
    assert prediction_layer_names(names, config) == set()
    names += ["model.layers.2.eh_proj.weight", "model.layers.1.eh_proj.weight"]
    wanted = {name for name in names if name.startswith("model.layers.2.")}
    assert len(wanted) == 3
    assert prediction_layer_names(names, config) == wanted
    assert prediction_layer_names(names, tools.config(family="qwen3_moe")) == set()
