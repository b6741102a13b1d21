"""Model directories as transformers writes them, small and random, each with a tokenizer of a foreign layout.

from tests.foreign.models import make_model
directory = make_model("qwen3", "qwen3", tmp_path / "base", seed=0, dtype=torch.float16)
"""

from pathlib import Path

import torch

from tests.foreign.layouts import LAYOUTS, make_tokenizer

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, **EXPERTS},
    "qwen3_moe": {"head_dim": 16, "num_experts": 5, **EXPERTS},
    "glm4_moe": {
        "head_dim": 16, "n_routed_experts": 4, "use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1,
        **EXPERTS,
    },
}  # fmt: skip


def make_model(
    family: str,
    layout: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    generation: dict | None = None,
    **config,
) -> Path:
    """Write a random model of a family with a tokenizer of a layout; return the directory.

    The same arguments give the same bytes; another ``seed`` gives other weights under an equal tokenizer file.

    Args:
        dtype: of the weights on disk.
        template: another chat template than the layout's.
        generation: entries of generation_config.json.
        config: entries of config.json that replace the usual small ones.
    """
    import transformers

    make_tokenizer(layout, directory, template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    sizes = {
        "vocab_size": len(tokenizer) + 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    settings = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(settings, experts_implementation="eager").to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # biases and norms are constants at first
    if generation is not None:
        model.generation_config = transformers.GenerationConfig(**generation)
    model.save_pretrained(directory)
    assert LAYOUTS[layout].eos == tokenizer.eos_token
    return directory
