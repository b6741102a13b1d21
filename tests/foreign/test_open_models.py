"""Open models from end to end, each a small random one with the files of its release: configuration, weights, tokens.

A release is fine-tuned until it gives one answer, which must end by the model's own end token; an adapter and a policy
are trained for some steps. transformers (and peft) open each result with equal logits.
"""

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eval_model
import train_dpo
import train_lora
import train_sft
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub import load_model
from minillm.model import Transformer
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat, load_tokenizer
from tests.foreign.layouts import LAYOUTS, LLAMA2_CHAT, make_tokenizer, sample_texts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# The keys of each release's config.json; sizes are small, and vocab_size and ids follow the tokenizer.
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
OLDER = {"attention_dropout": 0.0, "transformers_version": "4.51.0", "torch_dtype": "bfloat16"}
QWEN = {"use_sliding_window": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


@dataclass(frozen=True, kw_only=True)
class Release:
    """The files of a published model."""

    layout: str
    """Of the tokenizer, see layouts.py."""
    config: dict
    ends: tuple[str, ...]
    """Tokens in eos_token_id of generation_config.json."""
    weights: str
    """safetensors, or bin; "sharded" before it: several files with an index."""
    sampling: dict = field(default_factory=lambda: SAMPLING)
    bos: str | None = None
    end: str
    """The token that ends an answer."""


RELEASES = {
    "Qwen3-0.6B": Release(
        layout="qwen3", weights="safetensors", end="<|im_end|>", ends=("<|im_end|>", "<|endoftext|>"),
        config={
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 16,
            "max_position_embeddings": 40960, "max_window_layers": 28, "rope_scaling": None, "sliding_window": None,
            **QWEN,
        },
        sampling=SAMPLING | {"top_k": 20},
    ),
    "Qwen2.5-0.5B-Instruct": Release(
        layout="qwen2", weights="safetensors", end="<|im_end|>", ends=("<|im_end|>", "<|endoftext|>"),
        config={
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
            "max_window_layers": 21, "sliding_window": 32768, **QWEN,
        },
        sampling=SAMPLING | {"repetition_penalty": 1.1},
    ),
    "Llama-3.2-1B-Instruct": Release(
        layout="llama3", weights="safetensors", bos="<|begin_of_text|>", end="<|eot_id|>",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        config={
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 16,
            "max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
    ),
    "DeepSeek-LLM-7B-chat": Release(
        layout="deepseek", weights="sharded bin", bos="<｜begin▁of▁sentence｜>", end="<｜end▁of▁sentence｜>",
        ends=("<｜end▁of▁sentence｜>",),
        config={
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096,
            "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
            "num_key_value_heads": 4, "tie_word_embeddings": False,
        },
    ),
    "Mistral-7B-Instruct-v0.3": Release(
        layout="mistral_chat", weights="sharded safetensors", bos="<s>", end="</s>", ends=("</s>",),
        config={
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
        },
        sampling={},
    ),
    "GLM-4.5": Release(
        layout="glm4", weights="sharded safetensors", end="<|user|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
        config={
            "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "head_dim": 16,
            "max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
            "rope_scaling": None, "rope_theta": 1e6, "tie_word_embeddings": False, "use_qk_norm": False,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0,
        },
    ),
    "MiniMind2": Release(
        layout="minimind2", weights="bin", bos="<|im_start|>", end="<|im_end|>", ends=("<|im_end|>",),
        config={
            "architectures": ["MiniMindForCausalLM"], "model_type": "minimind", "dropout": 0.0, "flash_attn": True,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "use_moe": False,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "aux_loss_alpha": 0.1,
            "norm_topk_prob": True, "scoring_func": "softmax", "seq_aux": True,
        },
        sampling={},
    ),
    "MiniMind3": Release(
        layout="minimind3", weights="safetensors", bos="<|im_start|>", end="<|im_end|>", ends=("<|im_end|>",),
        config={
            "architectures": ["MiniMindForCausalLM"], "model_type": "minimind", "dropout": 0.0, "flash_attn": True,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_moe": False,
            "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48, "norm_topk_prob": True,
            "router_aux_loss_coef": 5e-4, "tie_word_embeddings": True,
        },
        sampling={},
    ),
    # The oldest layout: tokenizer.model without a tokenizer.json, one pickled file
    "Llama-2-7b-chat": Release(
        layout="tokenizer.model", weights="bin", bos="<s>", end="</s>", ends=("</s>",),
        config={
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096,
            "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
ANSWER = "Hello 你好!"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max_seq_len", "96", "--log_interval", "1", "--packing", "none"]


def make_release(name: str, directory: Path) -> Path:
    """Write the files of a release; return the directory."""
    release = RELEASES[name]
    if release.layout == "tokenizer.model":
        write_tokenizer_model(directory)
    else:
        layout = LAYOUTS[release.layout]
        if name.startswith(("Qwen", "Llama", "GLM")):
            layout = replace(layout, cut="split")
        make_tokenizer(layout, directory)
    tokenizer = load_tokenizer(directory)
    ids = {"bos_token_id": None if release.bos is None else tokenizer.token_id(release.bos)}
    ends = [tokenizer.token_id(token) for token in release.ends]
    ids["eos_token_id"] = ends if len(ends) > 1 and release.config["model_type"] != "qwen2" else ends[0]
    config = SMALL | OLDER | release.config | ids | {"vocab_size": tokenizer.vocab_size + 7}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generation = {key: value for key, value in ids.items() if value is not None} | release.sampling
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # biases and norms are constants at first
    write_weights(model, directory, release.weights)
    return directory


def write_weights(model: Transformer, directory: Path, form: str) -> None:
    from minillm.hub import save_model

    save_model(model, directory / "weights")
    from safetensors.torch import load_file

    weights = load_file(directory / "weights" / "model.safetensors")
    for file in (directory / "weights").iterdir():
        file.unlink()
    (directory / "weights").rmdir()
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    is_bin, names = form.endswith("bin"), sorted(weights)
    stem, suffix = ("pytorch_model", ".bin") if is_bin else ("model", ".safetensors")
    parts = [names[::2], names[1::2]] if form.startswith("sharded") else [names]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}" if len(parts) > 1 else stem + suffix
        tensors = {key: weights[key] for key in part}
        weight_map |= dict.fromkeys(part, file)
        if is_bin:
            torch.save(tensors, directory / file)
        else:
            save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write_tokenizer_model(directory: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in sample_texts() for line in text.splitlines() if line.strip()),
        model_writer=file, vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        hard_vocab_limit=False,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(file.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2_CHAT,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Call it with a name of ``RELEASES``: its directory."""
    made = {}

    def base(name):
        if name not in made:
            made[name] = make_release(name, tmp_path_factory.mktemp("base") / name)
        return made[name]

    return base


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def run_stage(main, base: Path, out: Path, data: Path, *more) -> Path:
    """Run a stage on a release; return the directory of its run."""
    flags = ["--from_weight", base, "--save_dir", out, "--data_path", data, *FLAGS, *more]
    main([str(flag) for flag in flags])
    (run,) = [path.parent for path in out.rglob("run.yaml")]
    return run


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]


@torch.no_grad()
def difference(ours: torch.nn.Module, theirs: torch.nn.Module, vocab_size: int) -> float:
    """Return the largest difference of their logits, relative to the largest logit."""
    ids = torch.randint(vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    one, two = ours(ids), theirs(ids).logits
    return ((one - two).abs().max() / two.abs().max()).item()


def their_model(directory: Path, **options):
    options = {"dtype": torch.float32, "experts_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize("name", RELEASES)
def test_fine_tuned_until_it_ends_its_answer(base, tmp_path, capsys, name):
    directory, release = base(name), RELEASES[name]
    before = load_tokenizer(directory)
    if not name.startswith("MiniMind"):  # transformers has no class for these
        assert difference(load_model(directory).eval(), their_model(directory), before.vocab_size) <= 1e-5
    data = write(tmp_path / "sft.jsonl", [{"messages": TALK}] * 2)
    more = ["--batch_size", 2, "--max_steps", 90, "--learning_rate", 1e-2, "--warmup_ratio", 0, "--weight_decay", 0]
    run = run_stage(train_sft.main, directory, tmp_path / "out", data, *more)
    assert losses(run)[-1] < 0.05 < losses(run)[0]

    # The result opens in transformers, with the same template, ids and settings of its answers.
    ours, theirs = load_model(run).eval(), their_model(run)
    assert difference(ours, theirs, before.vocab_size) <= 1e-5
    after, their_tokenizer = load_tokenizer(run), transformers.AutoTokenizer.from_pretrained(run)
    assert after.encoding_hash == before.encoding_hash
    prompt = encode_chat(after, TALK[:1], add_generation_prompt=True)[0]
    template = {"return_dict": True, "add_generation_prompt": True}
    their_prompt = their_tokenizer.apply_chat_template(TALK[:1], **template)["input_ids"]
    assert their_tokenizer.decode(prompt) == their_tokenizer.decode(their_prompt)
    if name != "MiniMind3":  # its prompt ends in line breaks, which are cut as in training, where text follows them
        assert prompt == their_prompt
    settings = json.loads((run / "generation_config.json").read_text())
    assert release.sampling.items() <= settings.items()
    assert after.token_id(release.end) in settings["eos_token_id"]

    # The answer ends by itself: in eval_model.py, and in transformers with the settings of the directory.
    capsys.readouterr()
    answers = tmp_path / "answers.json"
    flags = ["--from_weight", run, "--prompt", "Hi", "--temperature", 0, "--max_new_tokens", 40, "--output", answers]
    eval_model.main([str(flag) for flag in [*flags, "--device", "cpu", "--save_dir", tmp_path / "out"]])
    (said,) = json.loads(answers.read_text(encoding="utf-8"))["prompts"]
    made = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
    assert made[0, -1].item() == after.token_id(release.end)
    assert said["answer"].strip() == their_tokenizer.decode(made[0, len(prompt) : -1]).strip()
    if name != "MiniMind3":  # GPT-2's expression cuts the newlines before an answer, and not those at a prompt's end
        assert said["answer"].replace("<think>\n\n</think>", "").strip() == ANSWER


@pytest.mark.parametrize("name", RELEASES)
def test_an_adapter_opens_in_peft(base, tmp_path, name):
    directory = base(name)
    data = write(tmp_path / "sft.jsonl", [{"messages": TALK}] * 2)
    more = ["--batch_size", 2, "--max_steps", 4, "--learning_rate", 1e-2, "--warmup_ratio", 0, "--lora_name", "a"]
    if name == "GLM-4.5":  # peft 0.21 takes every layer called gate_proj in such a model for a fused expert
        more += ["--target_modules", "q_proj,k_proj,v_proj,o_proj"]
    run = run_stage(train_lora.main, directory, tmp_path / "out", data, *more)
    assert losses(run)[-1] < losses(run)[0]
    from minillm.hub import open_model

    ours, tokenizer = open_model(directory, device="cpu", lora_name=str(run), save_dir=str(tmp_path / "out"))
    if not name.startswith("MiniMind"):
        theirs = peft.PeftModel.from_pretrained(their_model(directory), run).eval()
        assert difference(ours, theirs, tokenizer.vocab_size) <= 1e-5
    assert difference(load_model(directory).eval(), _Logits(ours), tokenizer.vocab_size) > 1e-3


class _Logits(torch.nn.Module):
    """Our model with the interface of theirs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.model(ids))


@pytest.mark.parametrize("name", RELEASES)
def test_a_policy_begins_at_its_reference(base, tmp_path, name):
    pairs = [{"prompt": "Hi", "chosen": ANSWER, "rejected": f"   No {n}"} for n in range(2)]
    data = write(tmp_path / "dpo.jsonl", pairs)
    more = ["--batch_size", 2, "--max_steps", 3, "--learning_rate", 1e-2, "--warmup_ratio", 0]
    run = run_stage(train_dpo.main, base(name), tmp_path / "out", data, *more)
    assert losses(run)[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses(run)[-1] < 0.6
    assert difference(load_model(run).eval(), their_model(run), load_tokenizer(run).vocab_size) <= 1e-5


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type, architecture", [("glm", "GlmForCausalLM"), ("glm4", "Glm4ForCausalLM")])
def test_dense_glm_is_refused_with_its_reason(tmp_path, model_type, architecture):
    config = SMALL | {"architectures": [architecture], "model_type": model_type, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{model_type}.*glm4_moe"):
        load_model(tmp_path)


def test_an_index_of_pickled_shards_is_checked(base, tmp_path):
    for file in base("DeepSeek-LLM-7B-chat").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"index.json names pytorch_model-00002-of-00002.bin, which is missing"):
        load_model(tmp_path)
    shard.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002.bin is not a plain state dict of tensors"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"pytorch_model.bin.index.json is damaged"):
        load_model(tmp_path)
