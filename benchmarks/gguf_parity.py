"""Runs exported GGUF files in llama.cpp: are logits, greedy tokens and token ids those of minillm?

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36    # compiles llama.cpp, takes minutes
    python benchmarks/gguf_parity.py

Small random models of every family and every kind of RoPE scaling are exported and read by llama.cpp, with float32 keys
and values. Those with rows of whole blocks of 32 are also exported as q8_0. It prints the largest difference of the
logits, relative to the largest logit, and how many greedy tokens are equal. Then it compares the ids of hard texts for
each kind of tokenizer. The exit code is 1 if a bound is broken.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.errors import missing_package
from minillm.hub import export_gguf, load_model, save_model
from minillm.hub.gguf_tokenizer import KNOWN_DIFFERENCES, NO_FIRST_BLANK
from minillm.hub.hard_texts import hard_texts
from minillm.inference import generate
from minillm.model import Transformer
from minillm.tokenizer import load_tokenizer, train_bpe, train_sentencepiece
from minillm.tokenizer.base import TAG_TOKENS
from tests.foreign.layouts import LAYOUTS, make_tokenizer, sample_texts

LOGITS_BOUND = 2e-4  # relative to the largest logit, f32
SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 100, "max_position_embeddings": 256, "rope_theta": 1e4,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "llama": {},
    "llama, untied, no groups": {"num_key_value_heads": 6, "tie_word_embeddings": False},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama, yarn": {"rope_scaling": YARN},
    "llama, yarn, own factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama, llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 110},
    "mixtral": {"num_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True, "head_dim": 10, "num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen3, yarn": {"use_qk_norm": True, "rope_scaling": YARN},
    "qwen2_moe": MOE | {
        "attention_bias": True, "n_shared_experts": 1, "shared_expert_intermediate_size": 44,
        "shared_expert_gate": True, "norm_topk_prob": False,
    },
    "qwen2_moe, untied": MOE | {
        "attention_bias": True, "n_shared_experts": 1, "shared_expert_intermediate_size": 44,
        "shared_expert_gate": True, "norm_topk_prob": False, "tie_word_embeddings": False,
    },
    "qwen3_moe": MOE | {"use_qk_norm": True, "head_dim": 10},
    "glm4_moe": MOE | {
        "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.75, "scoring_func": "sigmoid",
        "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_group": 3, "topk_group": 2,
    },
    "glm4_moe, one group": MOE | {"scoring_func": "sigmoid", "n_shared_experts": 1, "norm_topk_prob": False},
}  # fmt: skip
# Rows of q8_0 are blocks of 32 numbers, so these widths are multiples of 32; the sizes of a head need not be.
BLOCKS = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "intermediate_size": 160}
CASES_OF_BLOCKS = {
    "llama, blocks of 32": BLOCKS,
    "qwen2, blocks of 32": BLOCKS | {"attention_bias": True},
    "qwen3, blocks of 32": BLOCKS | {"use_qk_norm": True},
    "qwen3_moe, blocks of 32": BLOCKS | MOE | {"use_qk_norm": True, "moe_intermediate_size": 64},
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is compared."""

    model_path: str = ""
    """A Hugging Face directory to compare as well, such as out/demo/full_sft_128."""
    n_tokens: int = 60
    """Tokens of the prompt."""
    max_new_tokens: int = 40
    """Greedy tokens after it."""
    n_texts: int = 1500
    """Random hard texts per tokenizer."""
    output: str = "out/benchmarks/gguf_parity.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("n_tokens", "max_new_tokens", "n_texts"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")


def make_model(case: str, directory: Path, *, layout: str = "llama3", seed: int = 0, **changes) -> Path:
    """Write a random model in which every part matters, with a tokenizer of a layout; return the directory."""
    tokenizer = load_tokenizer(make_tokenizer(layout, directory))
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size + 7} | (CASES | CASES_OF_BLOCKS)[case]
    config = ModelConfig(**(shape | changes))
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * 0.15 if tensor.ndim > 1 or name.endswith("bias") else 1 + 0.3 * noise)
    save_model(model, directory, tokenizer=tokenizer)
    return directory


def open_in_llama_cpp(path: Path, *, vocab_only: bool = False):
    """Return llama.cpp's model of a GGUF file, with float32 keys and values.

    Raises:
        UserError: llama-cpp-python is not installed.
    """
    try:
        import llama_cpp
    except ImportError:
        raise missing_package("llama-cpp-python", purpose="running a GGUF file") from None
    if vocab_only:
        return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False
    )


@torch.no_grad()
def compare_models(model_dir: Path, gguf: Path, *, n_tokens: int, max_new_tokens: int) -> dict:
    """Return the largest relative difference of the logits, and the greedy tokens that are equal."""
    model = load_model(model_dir).eval()
    n_tokens = min(n_tokens, model.config.max_position_embeddings - max_new_tokens)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size - 7, (1, n_tokens), generator=generator)
    theirs = open_in_llama_cpp(gguf)
    theirs.eval(ids[0].tolist())
    logits, expected = torch.tensor(theirs.scores[:n_tokens]), model(ids)[0]  # (T, V)
    answer = generate(model, ids.tolist(), max_new_tokens=max_new_tokens, temperature=0, eos_token_id=None)[0]
    greedy = []
    for _ in range(max_new_tokens):
        greedy.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        theirs.eval(greedy[-1:])
    theirs.close()
    n_equal = next((n for n, (a, b) in enumerate(zip(greedy, answer, strict=True)) if a != b), max_new_tokens)
    return {"logits": float((logits - expected).abs().max() / expected.abs().max()), "equal_tokens": n_equal}


def compare_ids(directory: Path, *, n_texts: int) -> dict:
    """Export a model around a tokenizer; return how many hard texts have the same ids in llama.cpp.

    llama.cpp reads control tokens in a text (``special``), as transformers does, or not, as our ``encode``. Tags such
    as <think> it always reads.
    """
    import transformers

    tokenizer = load_tokenizer(directory)
    model = Transformer(ModelConfig(**(SHAPE | {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1})))
    save_model(model, directory, tokenizer=tokenizer)
    notes = export_gguf(directory, directory / "model.gguf", dtype="f16", overwrite=True)
    theirs = open_in_llama_cpp(directory / "model.gguf", vocab_only=True)
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    hub = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [text for text in hard_texts(tokens, n_random=n_texts, n_tokens=300) if text]
    tags = [name for name in LAYOUTS["qwen3"].tags + TAG_TOKENS if tokenizer.has_token(name)]
    known = [difference for difference in KNOWN_DIFFERENCES if any(difference.description in note for note in notes)]
    # Where texts alone are known to differ, texts behind a control token are compared.
    before = ""
    if NO_FIRST_BLANK in known:
        before = next(name for name in ("<|im_start|>", "[INST]") if tokenizer.has_token(name))
    result: dict = {"texts": len(texts), "equal": 0, "equal_with_controls": 0, "notes": notes, "unexplained": []}
    for text in texts:
        parsed = theirs.tokenize((before + text).encode("utf-8"), add_bos=False, special=True)
        plain, expected = parsed, hub.encode(before + text, add_special_tokens=False)
        result["equal_with_controls"] += parsed == expected
        if not before and not any(tag in text for tag in tags):
            plain, expected = (
                theirs.tokenize(text.encode("utf-8"), add_bos=False, special=False),
                tokenizer.encode(text),
            )
        result["equal"] += plain == expected
        if plain != expected and not any(difference.applies(text) for difference in known):
            result["unexplained"].append(text)
    theirs.close()
    return result


def tokenizer_directories(folder: Path) -> dict[str, Path]:
    """Write a tokenizer of each kind, ours and those of the foreign layouts; return their directories."""
    directories = {name: make_tokenizer(name, folder / name) for name in LAYOUTS}
    for name, train, size in (("ours, bpe", train_bpe, 700), ("ours, sentencepiece", train_sentencepiece, 700)):
        directories[name] = folder / name.replace(", ", "_")
        train(our_texts(), vocab_size=size).save(directories[name])
    return directories


def our_texts():
    """Yield texts with contractions and indented lines, so that a vocabulary has tokens for them."""
    yield from sample_texts()
    for n in range(200):
        yield f"It's {n}, isn't it? We'll see what they've done; I'm sure.\n    if x:\n        return 'small'\n"
        yield f"It’s {n}. Don’t. \u3000\u3000第{n}章\n\u3000\u3000小明说。  你好\n"


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    models, ids, is_good = {}, {}, True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"n_tokens": args.n_tokens, "max_new_tokens": args.max_new_tokens}
        rows = [["model", "dtype", "largest difference", "equal greedy tokens"]]
        directories = {case: make_model(case, folder / str(n)) for n, case in enumerate(CASES | CASES_OF_BLOCKS)}
        if args.model_path:
            directories[args.model_path] = Path(args.model_path)
        for case, directory in directories.items():
            for dtype in ("f32", "f16", "bf16") if case in CASES else ("f32", "f16", "bf16", "q8_0"):
                export_gguf(directory, folder / "model.gguf", dtype=dtype, overwrite=True)
                result = models[f"{case} {dtype}"] = compare_models(directory, folder / "model.gguf", **sizes)
                rows.append([case, dtype, f"{result['logits']:.1e}", f"{result['equal_tokens']}/{args.max_new_tokens}"])
                if dtype == "f32":
                    is_good &= result["logits"] <= LOGITS_BOUND and result["equal_tokens"] == args.max_new_tokens
        print(format_table(rows))
        rows = [["tokenizer", "texts", "equal ids", "equal, control tokens read", "unexplained", "known differences"]]
        for name, directory in tokenizer_directories(folder).items():
            result = ids[name] = compare_ids(directory, n_texts=args.n_texts)
            cells = [result[key] for key in ("texts", "equal", "equal_with_controls")]
            rows.append([name, *map(str, [*cells, len(result["unexplained"])]), str(len(result["notes"]))])
            is_good &= not result["unexplained"]
        print(format_table(rows))
    write_json(args.output, {"arguments": vars(args), "models": models, "ids": ids})
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
