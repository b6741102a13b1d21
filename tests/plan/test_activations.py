"""The activations: what the formulas say against what autograd's hooks count."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.kernels.block_attention import plan_blocks
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import RouterStats, Transformer
from minillm.plan.activations import Step, block_activations, kept_activations, uses_blocks, visible_pairs
from minillm.plan.parameters import count_parameters
from minillm.precision import autocast

SMALL = {
    "vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 320,
}  # fmt: skip
GLM = SMALL | {
    "num_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "scoring_func": "sigmoid",
    "moe_intermediate_size": 128, "first_k_dense_replace": 1,
}  # fmt: skip
SHARED = SMALL | {"num_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 128,
                  "shared_expert_intermediate_size": 224}  # fmt: skip
CASES = {
    "dense": (SMALL, {}),
    "bfloat16": (SMALL, {"dtype": "bfloat16"}),
    "odd_length": (SMALL, {"seq_len": 150, "batch_size": 3}),
    "wide_heads_qk_norm": (SMALL | {"use_qk_norm": True, "head_dim": 32}, {"dtype": "bfloat16"}),
    "untied_one_group": (SMALL | {"tie_word_embeddings": False, "num_key_value_heads": 1}, {}),
    "glm": (GLM, {}),
    "glm_bfloat16": (GLM, {"dtype": "bfloat16"}),
    "mixtral": (SMALL | {"num_experts": 4}, {"dtype": "bfloat16"}),
    "qwen_top_k_as_it_is": (SMALL | {"num_experts": 4, "use_qk_norm": True, "norm_topk_prob": False}, {}),
    "qwen2_moe": (SHARED | {"shared_expert_gate": True, "attention_bias": True}, {"dtype": "bfloat16"}),
    "qwen2_moe_float32": (SHARED | {"shared_expert_gate": True}, {}),
    "qwen2_moe_lora": (SHARED | {"shared_expert_gate": True}, {"lora_rank": 4}),
    "qwen2_moe_without_gate": (SHARED | {"norm_topk_prob": False}, {}),
    "short_weights": (GLM, {"dtype": "bfloat16", "short_weights": True}),
    "lora": (SMALL, {"lora_rank": 4}),
    "lora_bfloat16": (SMALL, {"lora_rank": 4, "dtype": "bfloat16"}),
    "lora_short_base": (SMALL, {"lora_rank": 8, "dtype": "bfloat16", "base_dtype": "bfloat16"}),
    "lora_glm": (GLM, {"lora_rank": 4, "dtype": "bfloat16"}),
    "checkpointing": (SMALL, {"gradient_checkpointing": True}),
    "checkpointing_glm_bfloat16": (GLM, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
    "long_rows": (SMALL | {"num_hidden_layers": 1}, {"seq_len": 1056, "batch_size": 1}),
    "long_rows_bfloat16": (SMALL | {"num_hidden_layers": 2}, {"seq_len": 1056, "batch_size": 1, "dtype": "bfloat16"}),
}


def saved_bytes(step: Step) -> tuple[int, int]:
    """Return (bytes of the storages that autograd keeps, weights left out; numbers that autocast copies)."""
    config = step.config
    torch.manual_seed(0)
    model = Transformer(config).to(getattr(torch, step.dtype if step.short_weights else step.base_dtype)).train()
    model.gradient_checkpointing = step.gradient_checkpointing
    if step.lora_rank:
        apply_lora(model, rank=step.lora_rank)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shape = (step.batch_size, step.seq_len)
    batch = {name: torch.randint(config.vocab_size, shape) for name in ("input_ids", "targets")}
    batch["document_ids"] = torch.zeros(shape, dtype=torch.long)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    stats = None
    if config.num_experts and not step.lora_rank:
        stats = RouterStats(config, aux_loss_coef=1e-3, z_loss_coef=1e-4)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(torch.device("cpu"), getattr(torch, step.dtype)),
    ):
        loss, _ = causal_lm_loss(model, batch, stats)
    assert loss.requires_grad
    numbers = count_parameters(model)
    casts = sum(numbers.cast_blocks) if step.is_mixed and not step.gradient_checkpointing else 0
    return sum(storage.nbytes() for storage in storages.values()), casts


@pytest.mark.parametrize("name", CASES)
def test_formulas_say_what_autograd_keeps(name):
    if name.startswith("long_rows") and torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8 keeps less of masked attention over long rows than the planner says")
    shape, changes = CASES[name]
    step = Step(config=ModelConfig(**shape), **({"batch_size": 2, "seq_len": 128} | changes))
    counted, n_cast = saved_bytes(step)
    # The loss keeps the gradients that it has made: of the hidden states, and of the output weight if it is trained.
    dim = step.config.hidden_size
    loss = step.n_positions * dim * step.product_bytes
    loss += 0 if step.lora_rank else step.weight_bytes * step.config.vocab_size * dim
    predicted = sum(kept_activations(step).values()) + loss + 2 * n_cast
    if step.gradient_checkpointing:  # the angles are arguments of its blocks, which hooks do not see
        predicted -= 4 * step.n_positions * step.config.rotary_dim
    # What is left out: scalars, a few numbers per row of the balance loss.
    assert predicted == pytest.approx(counted, rel=2e-3)
    assert sum(kept_activations(step).values()) > 2 * loss / 3  # and is not hidden by what is known


def test_visible_pairs_are_those_of_the_plan():
    for seq_len in (2, 64, 65, 150, 512):
        plan = plan_blocks(None, (2, seq_len), dtype=torch.float32, device=torch.device("cpu"))
        assert visible_pairs(seq_len) == sum((t.end - t.start) * (t.end - t.first) for t in plan.tiles)


def test_blocks_end_where_the_model_leaves_them():
    assert uses_blocks(1024, on_gpu=False)
    assert not uses_blocks(1025, on_gpu=False)
    assert not uses_blocks(512, on_gpu=True)


def test_by_hand():
    """One block of D 8, H = G 1, F 16, over one row of 4 in float32: numbers counted on paper."""
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=16,
    )  # fmt: skip
    step = Step(config=config, batch_size=1, seq_len=4)
    assert block_activations(step, 0) == {
        "stream": 4 * (2 * 4 * 8 + 2 * 4),
        "attention": 4 * (4 * 8 + 4 * 4 * 8 + 4 * 4),  # the norm's result; q, k, v and mixed; 4 x 4 probabilities
        "feed-forward": 4 * (4 * 8 + 3 * 4 * 16),
    }


def test_checkpointing_keeps_the_inputs_alone():
    step = Step(config=ModelConfig(**SMALL), batch_size=2, seq_len=128, gradient_checkpointing=True)
    kept = kept_activations(step)
    assert kept["attention"] == kept["feed-forward"] == 0
    assert kept["stream"] == 4 * step.stream + 4 * 256  # three inputs, that of the last norm, its scales


def test_on_a_gpu_with_a_mask_keys_are_repeated_and_the_mask_is_shared():
    cpu, gpu = (Step(config=ModelConfig(**SMALL), batch_size=2, seq_len=2048, on_gpu=where) for where in (False, True))
    more = block_activations(gpu, 0)["attention"] - block_activations(cpu, 0)["attention"]
    assert more == 2 * 2 * 2048 * 96 // 2 * 4 - 4 * 2 * 2048**2  # keys and values of 4 heads instead of 2 groups


def test_on_a_gpu_short_products_need_no_mask_and_no_repeated_keys():
    config, n = ModelConfig(**SMALL), 2 * 2048
    step = Step(config=config, batch_size=2, seq_len=2048, on_gpu=True, dtype="bfloat16")
    q, kv = (n * heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    wanted = 2 * (n * config.hidden_size + 2 * q + 2 * kv) + 4 * n * config.num_attention_heads
    assert block_activations(step, 0)["attention"] == wanted
