"""The arguments of every script, as frozen dataclasses; field docstrings are the help texts."""

import os
from dataclasses import dataclass
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.scale_arguments import ScaleArguments
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.files import expand_paths
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainArguments(ScaleArguments):
    """What every training stage shares."""

    data_path: str = ""
    """Training data: .jsonl, .json, .csv, .tsv, .parquet or .txt, also as .gz; several files with commas; directories
    and patterns (data/*.jsonl) too (default: the first known name in dataset/, see dataset/README.md, else the demo
    world with its settings)."""
    valid_path: str = ""
    """Validation data; empty: no validation."""
    valid_ratio: float = 0.0
    """Without --valid_path: share of the training records to hold out for validation, such as 0.01. They are chosen by
    a hash of their content, so they are the same in every run and when the file grows."""
    columns: str = ""
    """The files' names for our keys, ours=theirs: prompt=question,completion=answer."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one of --from_weight, else SAVE_DIR/tokenizer)."""
    from_weight: str = ""
    """Start from these weights: a stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub."""
    cache_dir: str = ""
    """Where tokenised data is kept (default: SAVE_DIR/.token_cache)."""
    strict: bool = False
    """Refuse data files that hold a bad line, instead of setting the line aside."""
    allow_rejected: bool = False
    """Train even if more than a tenth of the records of a file were rejected."""

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
    compile: Literal["auto", "0", "1"] = "auto"
    """Compile the model's blocks for training, a minute or two at the start. auto: on CUDA, where it can."""
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
            "router_aux_loss_coef": 0, "router_z_loss_coef": 0, "router_bias_update_speed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name} {value}: must lie between 0 and 1")
        is_directory = not os.path.exists(self.save_dir) or os.path.isdir(self.save_dir)
        require(is_directory, f"--save_dir {self.save_dir}: is a file; name a directory")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: must be at least 0 and below 2^63")
        require(self.learning_rate > 0, f"--learning_rate {self.learning_rate}: must be positive")
        super().check()
        one_weight = self.has_experts and self.num_experts_per_tok == 1 and self.norm_topk_prob is not False
        message = "the weight of a single expert, divided by itself, is always 1, and the router learns nothing"
        other = "choose at least 2, or add --norm_topk_prob 0"
        other += " (with softmax scores --use_qk_norm or --n_shared_experts 1 too)"
        require(not one_weight, f"--num_experts_per_tok 1: {message}; {other}")
        require(bool(self.data_files), "--data_path names no file: give at least one")
        require(0 <= self.valid_ratio < 1, f"--valid_ratio {self.valid_ratio}: must be at least 0 and below 1")
        one_source = not (self.valid_ratio and self.valid_path)
        require(one_source, f"--valid_ratio {self.valid_ratio} and --valid_path {self.valid_path}: choose one of them")
        for path in self.data_files + self.valid_files:
            require(os.path.isfile(path), f"no such data file: {path}")
        parse_columns(self.columns)

    def rows_per_step(self, world_size: int) -> int:
        """Return the rows of one update over all ranks.

        Raises:
            UserError: ``--global_batch_size`` is not a multiple of what one micro-batch of all ranks takes.
        """
        per_micro_step = self.batch_size * world_size
        n_rows = per_micro_step * self.accumulation_steps
        if not self.global_batch_size:
            return n_rows
        if self.accumulation_steps > 1 and self.global_batch_size != n_rows:
            raise UserError(
                f"--accumulation_steps {self.accumulation_steps} x --batch_size {self.batch_size} x {world_size} ranks "
                f"= {n_rows} rows, but --global_batch_size is {self.global_batch_size}: leave one of them out"
            )
        if self.global_batch_size % per_micro_step:
            raise UserError(
                f"--global_batch_size {self.global_batch_size} is not a multiple of batch_size x ranks = "
                f"{self.batch_size} x {world_size}; choose one that is, or another --batch_size"
            )
        return self.global_batch_size

    @property
    def data_files(self) -> list[str]:
        """Return the files of ``--data_path``."""
        return [str(file) for file in expand_paths(self.data_path)]

    @property
    def valid_files(self) -> list[str]:
        """Return the files of ``--valid_path``."""
        return [str(file) for file in expand_paths(self.valid_path)]

    @property
    def row_settings(self) -> dict:
        """Return the settings of rows (``TextRows``, ``ChatRows``, ...) as keyword arguments."""
        names = ("max_seq_len", "packing", "train_on", "seed", "strict")
        known = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return known | {"cache_dir": self.token_cache}

    @property
    def train_data(self) -> DataFiles:
        """Return the records to train on: those of ``--data_path``, without what ``--valid_ratio`` holds out."""
        return DataFiles(self.data_files, self.valid_ratio, "train", self.columns)

    @property
    def valid_data(self) -> DataFiles | None:
        """Return the records to validate with: of ``--valid_path``, or held out; None without validation."""
        if self.valid_ratio:
            return DataFiles(self.data_files, self.valid_ratio, "valid", self.columns)
        return DataFiles(self.valid_files, columns=self.columns) if self.valid_files else None

    @property
    def token_cache(self) -> str:
        """Return the directory of tokenised data."""
        return self.cache_dir or os.path.join(self.save_dir, ".token_cache")


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainArguments):
    """Pretraining: next-token prediction on plain text."""

    bare_stage = "pretrain"

    packing: Literal["stream", "best_fit", "none"] = "stream"
    """stream: cut the text every max_seq_len; best_fit: whole documents per row; none: one document per row."""

    @property
    def row_settings(self) -> dict:
        """Return the settings of ``TextRows``, which are packed in the same order whatever the seed."""
        return {name: value for name, value in super().row_settings.items() if name != "seed"}


@dataclass(frozen=True, kw_only=True)
class SFTArguments(TrainArguments):
    """Supervised fine-tuning on conversations; starts from the pretrained weights."""

    bare_stage = "sft"

    from_weight: str = "pretrain"
    learning_rate: float = 5e-5
    epochs: int = 2
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several conversations per row, which never see each other; none: one per row."""
    train_on: Literal["all", "last", "per_turn"] = "all"
    """Which assistant turns are targets: all, the last one, or each one in a row of its own."""


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Training a tokenizer; it is saved in SAVE_DIR/tokenizer."""

    bare_stage = "tokenizer"
    data_path: str = ""
    """Text to learn from, of any schema: .jsonl, .json, .csv, .tsv, .parquet or .txt, also as .gz; several files with
    commas; directories and patterns (data/*.jsonl) too (default: the first known name in dataset/, else the demo
    world)."""
    valid_path: str = ""
    """Held-out text for bytes per token (default: every 20th record of the data, kept out of training)."""
    columns: str = ""
    """The files' names for our keys, ours=theirs: prompt=question,completion=answer."""
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
        parse_columns(self.columns)

    @property
    def data_files(self) -> list[str]:
        """Return the files of ``--data_path``."""
        return [str(file) for file in expand_paths(self.data_path)]

    @property
    def valid_files(self) -> list[str]:
        """Return the files of ``--valid_path``."""
        return [str(file) for file in expand_paths(self.valid_path)]
