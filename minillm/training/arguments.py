"""The arguments of every script, as frozen dataclasses; field docstrings are the help texts."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from minillm.training.command_line import require
from minillm.training.model_arguments import ModelArguments


@dataclass(frozen=True, kw_only=True)
class TrainArguments(ModelArguments):
    """What every training stage shares."""

    data_path: str
    """Training data: .jsonl, .jsonl.gz, .parquet or .txt; several files with commas."""
    valid_path: str = ""
    """Validation data; empty: no validation."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one of --from_weight, else SAVE_DIR/tokenizer)."""
    from_weight: str = ""
    """Start from these weights: a stage name, a model directory or a .pth file."""
    from_resume: bool = False
    """Go on from the newest intact checkpoint of this run's directory."""
    cache_dir: str = ""
    """Where tokenised data is kept (default: SAVE_DIR/.token_cache)."""
    strict: bool = False
    """Refuse data files that hold a bad line, instead of setting the line aside."""

    epochs: int = 1
    """Passes over the data."""
    max_steps: int = 0
    """Stop after this many optimizer updates (0: by epochs)."""
    batch_size: int = 8
    """Rows per micro-batch and rank."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer update and rank."""
    global_batch_size: int = 0
    """Rows per optimizer update over all ranks (0: batch_size x accumulation_steps x ranks)."""
    max_seq_len: int = 512
    """Row length T in tokens."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant", "polynomial", "exponential", "wsd"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = 0.02
    """Share of the steps that warm up linearly."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak (constant ignores it)."""
    decay_ratio: float = 0.2
    """wsd: share of the steps, at the end, that decay."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices only (not on norms and biases)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.95
    """AdamW's decay of the second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm (0: no clipping)."""
    router_aux_loss_coef: float = 1e-3
    """Experts: weight of the balance loss, per sparse block. With sigmoid scores the bias balances too, but only after
    thousands of steps, which small runs do not have (DeepSeek-V3 takes 1e-4)."""
    router_z_loss_coef: float = 1e-4
    """Experts: weight of the squared logsumexp of the router's logits, per sparse block; keeps them small."""
    router_bias_update_speed: float = 1e-3
    """Experts with sigmoid scores: step of the bias that makes overloaded experts less likely, per update."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Autocast dtype; weights stay float32. auto: bfloat16 where it is fast, float16 on older CUDA cards."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """torch.compile the model."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    num_workers: int = 0
    """Processes that prepare batches ahead (0: none)."""
    num_threads: int = 0
    """CPU threads of this process (0: torch's default)."""

    log_interval: int = 10
    """Steps between lines in metrics.jsonl."""
    eval_interval: int = 0
    """Steps between validations (0: only at the end)."""
    save_interval: int = 100
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Checkpoints kept."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights (checkpoints are always float32)."""
    use_wandb: bool = False
    """Log to Weights & Biases too (WANDB_MODE=offline works without a network)."""
    wandb_project: str = "minillm"
    """Project name at Weights & Biases."""
    seed: int = 42
    """Seed of the weights and of the order of the data."""
    dry_run: bool = False
    """Print the data report, the first batch with its targets coloured, and the cost; then end."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        at_least = {
            "epochs": 1, "max_steps": 0, "batch_size": 1, "accumulation_steps": 1, "global_batch_size": 0,
            "max_seq_len": 1, "warmup_ratio": 0, "min_lr_ratio": 0, "decay_ratio": 0, "weight_decay": 0,
            "grad_clip": 0, "num_workers": 0, "num_threads": 0, "log_interval": 1, "eval_interval": 0,
            "save_interval": 0, "keep_last": 1, "router_aux_loss_coef": 0, "router_z_loss_coef": 0,
            "router_bias_update_speed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name} {value}: must lie between 0 and 1")
        require(self.learning_rate > 0, f"--learning_rate {self.learning_rate}: must be positive")
        super().check()
        one_weight = self.has_experts and self.num_experts_per_tok == 1 and self.norm_topk_prob
        message = "the weight of a single expert, divided by itself, is always 1, and the router learns nothing"
        other = "choose at least 2, or add --norm_topk_prob 0 (with softmax scores --use_qk_norm too)"
        require(not one_weight, f"--num_experts_per_tok 1: {message}; {other}")
        require(bool(self.data_files), "--data_path names no file: give at least one")
        for path in self.data_files + self.valid_files:
            require(os.path.isfile(path), f"no such data file: {path}")

    @property
    def data_files(self) -> list[str]:
        """Return the files of ``--data_path``."""
        return [part.strip() for part in self.data_path.split(",") if part.strip()]

    @property
    def valid_files(self) -> list[str]:
        """Return the files of ``--valid_path``."""
        return [part.strip() for part in self.valid_path.split(",") if part.strip()]

    @property
    def token_cache(self) -> str:
        """Return the directory of tokenised data."""
        return self.cache_dir or os.path.join(self.save_dir, ".token_cache")


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainArguments):
    """Pretraining: next-token prediction on plain text."""

    packing: Literal["stream", "best_fit", "none"] = "stream"
    """stream: cut the text every max_seq_len; best_fit: whole documents per row; none: one document per row."""


@dataclass(frozen=True, kw_only=True)
class SFTArguments(TrainArguments):
    """Supervised fine-tuning on conversations; starts from the pretrained weights."""

    from_weight: str = "pretrain"
    learning_rate: float = 5e-5
    epochs: int = 2
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several conversations per row, which never see each other; none: one per row."""
    train_on: Literal["all", "last", "per_turn"] = "all"
    """Which assistant turns are targets: all, the last one, or each one in a row of its own."""


def as_dict(arguments) -> dict:
    """Return the arguments as a plain dictionary (for ``run.yaml`` and trackers)."""
    return dataclasses.asdict(arguments)


@dataclass(frozen=True, kw_only=True)
class DemoDataArguments:
    """The demo world: pretraining text with exact probabilities, and tasks; same flags, same bytes."""

    out_dir: str = "dataset/demo"
    """Folder for the files; made where it is missing."""
    seed: int = 42
    """Draws the world, the held-out items and every file."""
    n_pretrain: int = 190_000
    """Documents in pretrain_train.jsonl (about 15 tokens each at vocabulary 1,024)."""
    n_valid: int = 3_000
    """Documents in pretrain_valid.jsonl."""
    n_addition: int = 18_000
    """SFT conversations per task, as the next eight."""
    n_sorting: int = 9_000
    n_counting: int = 19_000
    n_translation: int = 3_000
    n_facts: int = 3_500
    n_multi_turn: int = 7_500
    n_style: int = 2_500
    n_writing: int = 7_000
    n_repeat: int = 5_000
    n_sft_valid: int = 1_000
    """Conversations in sft_valid.jsonl, all tasks in equal shares."""
    n_test: int = 150
    """Test conversations per task and group; small groups have fewer different ones."""
    n_reason: int = 20_000
    """Reasoning problems to train on."""
    n_reason_test: int = 200
    """Reasoning problems to test on."""

    def check(self) -> None:
        """Raise UserError for a size out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                not field.name.startswith("n_") or 1 <= value <= 10_000_000,
                f"--{field.name} {value}: must be 1 to 10,000,000",
            )


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ModelArguments):
    """Try and measure a trained model: chat, complete text, perplexity, exact match."""

    model_mode: Literal[0, 1, 2, 3] = 1
    """0 pretrain (completes text), 1 full_sft, 2 rlhf, 3 reason (these chat)."""
    from_weight: str = ""
    """A stage name, a model directory or a .pth file (default: the stage of --model_mode)."""
    lora_name: str = ""
    """Add this adapter: its name (SAVE_DIR/lora/<name>_<hidden_size>), a directory or a .pth; several with weights as
    cooking:0.7,medical:0.3."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one beside the weights, else SAVE_DIR/tokenizer)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    """Dtype of the weights; auto: the fastest the device computes well."""
    num_threads: int = 0
    """CPU threads of this process (0: torch's default)."""

    prompts: str = ""
    """Answer the prompts of this file: one per line, or .jsonl with prompt, text or conversations."""
    perplexity: str = ""
    """Measure the loss on this file of texts: nats per token and bits per byte, by kind."""
    task_file: str = ""
    """Measure exact match on this file of conversations whose last turn is the expected answer."""
    text_metrics: bool = False
    """With --task_file: also the loss of the expected answers, and BLEU and ROUGE of the model's own against them."""
    output: str = ""
    """Write all results to this JSON file too."""

    temperature: float = 0.85
    """Logits are divided by this; 0 is greedy."""
    top_p: float = 0.85
    """Sample from the most probable tokens that reach this probability together (1: all)."""
    top_k: int = 0
    """Sample from the k most probable tokens (0: all)."""
    min_p: float = 0.0
    """Leave out tokens with less than this share of the best token's probability (0: none)."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens already used less likely."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    seed: int = 42
    """Seed of the sampling."""
    history_turns: int = 3
    """Chat: earlier questions, with their answers, that the model still sees."""
    system: str = ""
    """Chat: a system message before the conversation."""
    batch_size: int = 32
    """Prompts, tasks or text windows per forward pass."""
    max_seq_len: int = 0
    """Perplexity: window in tokens (0: 1,024, or the model's positions if fewer)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a file that is not there."""
        least = {"num_threads": 0, "max_new_tokens": 1, "history_turns": 0, "batch_size": 1, "max_seq_len": 0}
        for name, limit in least.items():
            value = getattr(self, name)
            require(value >= limit, f"--{name} {value}: must be at least {limit}")
        super().check()
        for name in ("prompts", "perplexity", "task_file"):
            path = getattr(self, name)
            require(not path or os.path.isfile(path), f"--{name} {path}: no such file")
        require(bool(self.task_file) or not self.text_metrics, "--text_metrics needs --task_file with expected answers")
        folder = os.path.dirname(os.path.abspath(self.output))
        writable = os.path.isdir(folder) and os.access(folder, os.W_OK) and not os.path.isdir(self.output)
        message = f"--output {self.output}: cannot be written; name a file in a folder that you may write to"
        require(not self.output or writable, message)


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Training a tokenizer; it is saved in SAVE_DIR/tokenizer."""

    data_path: str
    """Text to learn from, of any schema: .jsonl, .jsonl.gz, .parquet or .txt; several files with commas."""
    valid_path: str = ""
    """Held-out text for bytes per token (default: every 20th record of the data, kept out of training)."""
    save_dir: str = "out"
    """Directory that holds the run directories; the tokenizer goes to SAVE_DIR/tokenizer."""
    vocab_size: int = 6400
    """Number of ids: 32 special tokens (11 below 512), 256 bytes, then merges."""
    tokenizer_type: Literal["bpe", "bpe_by_hand", "sentencepiece"] = "bpe"
    """bpe: merges of bytes; bpe_by_hand: the same file made by our own readable code, more slowly; sentencepiece:
    merges of characters, rare ones as bytes (pip install sentencepiece)."""
    max_token_length: int = 15
    """Longest token in bytes, 15 is five Chinese characters or a blank and 14 letters; sentencepiece: in characters
    (0: no limit)."""
    split_han: bool = False
    """Never merge neighbouring Chinese characters."""
    max_records: int = 0
    """Stop after this many records, taken from all files in turn (0: all)."""
    max_bytes: int = 300_000_000
    """Stop after this much text, taken from all files alike (0: all); memory grows with different words."""
    strict: bool = False
    """Refuse data files that hold a bad line, instead of setting the line aside."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a file that is not there."""
        for name in ("max_token_length", "max_records", "max_bytes"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must be at least 0")
        for flag, files in (("data_path", self.data_files), ("valid_path", self.valid_files)):
            for path in files:
                require(os.path.isfile(path), f"--{flag} {path}: no such file")
        require(bool(self.data_files), "--data_path names no file: give at least one")

    @property
    def data_files(self) -> list[str]:
        """Return the files of ``--data_path``."""
        return [part.strip() for part in self.data_path.split(",") if part.strip()]

    @property
    def valid_files(self) -> list[str]:
        """Return the files of ``--valid_path``."""
        return [part.strip() for part in self.valid_path.split(",") if part.strip()]
