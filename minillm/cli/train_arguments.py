"""The arguments that every training stage shares; field docstrings are the help texts."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.model_arguments import ModelArguments
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError
from minillm.tokenizer import token_names

TRACKERS = ("wandb", "swanlab", "tensorboard", "trackio")  # see minillm.reports.trackers
RESERVED_NAMES = ("lora", "tokenizer", "checkpoints", "best", "demo")  # directories of SAVE_DIR and of a run
MAX_NAME_BYTES = 200
ANSWER_METRICS = ("exact", "f1", "bleu", "rouge_l")  # of the model's own answers


@dataclass(frozen=True, kw_only=True)
class ScaleArguments(ModelArguments):
    """How a run is spread over devices, and how it is saved and resumed."""

    parallel: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: the whole model on every rank; fsdp: parameters, gradients and optimizer sharded (FSDP2); deepspeed:
    ZeRO."""
    deepspeed_config: str = "configs/deepspeed/zero2.json"
    """DeepSpeed's settings; the flags replace every "auto" in it."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the other ranks before it ends with an error."""

    run_name: str = ""
    """Name of the run directory under SAVE_DIR (default: <stage>_<hidden_size>)."""
    overwrite: bool = False
    """Start over in a directory that already holds a run; the old run is moved to a folder earlier-1 inside it."""
    from_resume: bool = False
    """Resume from the newest intact checkpoint of this run's directory."""
    auto_resume: bool = False
    """Resume if there is a checkpoint, else start: for jobs that a scheduler restarts. Restarts by torchrun itself
    resume without this flag."""
    extend: bool = False
    """Make a resumed run longer than first planned (more --epochs or --max_steps). Only the schedules constant and wsd
    allow it, wsd only before its decay begins."""
    save_interval: int = 0
    """Steps between checkpoints, in addition to --save_minutes (0: not by steps). The end of a run is always saved."""
    save_minutes: float = 10.0
    """Minutes between checkpoints (0: not by time)."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    async_save: bool = True
    """Continue training while a checkpoint is written, from a copy in the main rank's memory (12 bytes per
    parameter)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        for name, least in {"save_interval": 0, "save_minutes": 0, "keep_last": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        is_plain = self.run_name not in (".", "..") and not set(self.run_name) & set('/\\:*?"<>|')
        is_plain = is_plain and self.run_name.isprintable() and len(self.run_name.encode()) <= MAX_NAME_BYTES
        message = f'must be a plain name of at most {MAX_NAME_BYTES} bytes, without / \\ : * ? " < > |'
        require(is_plain or not self.run_name, f"--run_name {self.run_name[:300]!r}: {message}")
        is_free = self.run_name not in RESERVED_NAMES and not self.run_name.startswith(".")
        require(is_free, f"--run_name {self.run_name}: this directory has another purpose; choose another name")
        resumes = self.from_resume or self.auto_resume
        require(resumes or not self.extend, "--extend makes a resumed run longer: it needs --from_resume")
        require(not (self.overwrite and self.from_resume), "--overwrite starts over, --from_resume resumes: choose one")
        require(self.timeout_minutes > 0, f"--timeout_minutes {self.timeout_minutes}: must be more than 0")
        super().check()


@dataclass(frozen=True, kw_only=True)
class TrainArguments(ScaleArguments):
    """The arguments that every training stage shares."""

    has_answers = True  # whether the data are conversations, whose answers can be compared

    data_path: str = ""
    """Training data: .jsonl, .json, .csv, .tsv, .parquet or .txt, also as .gz; several files separated by commas; also
    directories and patterns such as data/*.jsonl (default: the first known name in dataset/, see dataset/README.md,
    else the demo data with its settings)."""
    valid_path: str = ""
    """Validation data; empty: no validation."""
    valid_ratio: float = 0.0
    """Without --valid_path: share of the training records to hold out for validation, such as 0.01. A hash of their
    content chooses them, so they are the same in every run and when the file grows."""
    columns: str = ""
    """The files' names for our keys, as ours=theirs: prompt=question,completion=answer."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one of --from_weight, else SAVE_DIR/tokenizer)."""
    add_tokens: str = ""
    """Tokens that the tokenizer lacks, separated by commas, e.g. '<|im_start|>,<|im_end|>'. Embedding and output layer
    get a row for each, the mean of the others; an adapter then trains both layers whole."""
    chat_template: str = ""
    """Chat template to train with: chatml, or a jinja file (default: the tokenizer's; chatml if it has none and gets
    ChatML's tokens)."""
    from_weight: str = ""
    """Start from these weights: a stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub."""
    cache_dir: str = ""
    """Directory for tokenised data (default: SAVE_DIR/.token_cache)."""
    strict: bool = False
    """Stop at the first bad line of a data file, instead of skipping bad lines."""
    allow_rejected: bool = False
    """Train even if more than a tenth of the records of a file were rejected."""

    epochs: float = 1.0
    """Passes over the data, also a part of one: 0.5."""
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
    warmup_steps: int = 0
    """Number of the steps that warm up linearly (0: by --warmup_ratio)."""
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
    """Experts: weight of the balance loss, per sparse block. With sigmoid scores the bias also balances, but only after
    thousands of steps, more than small runs have (DeepSeek-V3 uses 1e-4)."""
    router_z_loss_coef: float = 1e-4
    """Experts: weight of the squared logsumexp of the router's logits, per sparse block; it keeps them small."""
    router_bias_update_speed: float = 1e-3
    """Experts with sigmoid scores: step of the bias that makes overloaded experts less likely, per update."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Autocast dtype; weights stay float32. auto: bfloat16 where it is fast, float16 on older CUDA cards."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: Literal["auto", "0", "1"] = "auto"
    """Compile the model's blocks for training, a minute or two at the start. auto: on CUDA, if it is possible."""
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
    eval_epochs: float = 0.0
    """Passes over the data between validations, in place of --eval_interval: 1 is once per epoch."""
    eval_batch_size: int = 0
    """Rows per micro-batch of a validation, and answers per batch (0: batch_size); validation needs less memory."""
    eval_metric: str = "loss"
    """What each validation measures, with commas. The first one decides which weights are kept in best/ and when
    --patience ends the run. loss; accuracy (of the next token; of pairs in preference tuning); of the model's own
    answers to held-out conversations: exact, f1, bleu, rouge_l; suite:NAME (a benchmark in --suite_dir)."""
    patience: int = 0
    """End the run after this many validations in a row without a better value of the first metric (0: never)."""
    eval_samples: int = 100
    """Held-out conversations that the model answers in each validation for exact, f1, bleu and rouge_l, the first ones;
    also the questions of a suite (0: all)."""
    eval_max_new_tokens: int = 0
    """Longest of these answers in tokens (0: twice as long as the longest expected one)."""
    sample_prompts: str = ""
    """Questions that the model answers in each validation, kept in samples.jsonl: a file of records, or of one question
    per line (default: the first four of the validation data; none: no questions)."""
    suite_dir: str = ""
    """Directory with the data of suite:NAME."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights (checkpoints are always float32)."""
    tracker: str = ""
    """Log to these programs too: wandb, swanlab, tensorboard, trackio, or several separated by commas. These need no
    network: tensorboard, trackio, wandb with WANDB_MODE=offline, swanlab with SWANLAB_MODE=offline."""
    project: str = "minillm"
    """Project name at the trackers."""
    use_wandb: bool = False
    """The same as --tracker wandb."""
    wandb_project: str = ""
    """The same as --project."""
    seed: int = 42
    """Seed of the weights and of the order of the data."""
    dry_run: bool = False
    """Print the data report, the first batch with coloured targets, and the expected cost; then stop."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        at_least = {
            "max_steps": 0, "batch_size": 1, "accumulation_steps": 1, "global_batch_size": 0,
            "max_seq_len": 1, "warmup_ratio": 0, "warmup_steps": 0, "min_lr_ratio": 0, "decay_ratio": 0,
            "weight_decay": 0, "grad_clip": 0, "num_workers": 0, "num_threads": 0, "log_interval": 1,
            "eval_interval": 0, "eval_epochs": 0, "eval_batch_size": 0, "patience": 0, "eval_samples": 0,
            "eval_max_new_tokens": 0,
            "router_aux_loss_coef": 0, "router_z_loss_coef": 0, "router_bias_update_speed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name} {value}: must lie between 0 and 1")
        require(0 < self.epochs < math.inf, f"--epochs {self.epochs:g}: must be positive, e.g. 0.5 or 2")
        is_directory = not os.path.exists(self.save_dir) or os.path.isdir(self.save_dir)
        require(is_directory, f"--save_dir {self.save_dir}: is a file; name a directory")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: must be at least 0 and below 2^63")
        require(self.learning_rate > 0, f"--learning_rate {self.learning_rate}: must be positive")
        super().check()
        weight_is_always_1 = self.has_experts and self.num_experts_per_tok == 1 and self.norm_topk_prob is not False
        require(
            not weight_is_always_1,
            "--num_experts_per_tok 1: the normalised weight of a single expert is always 1, so the router learns "
            "nothing; choose at least 2, or add --norm_topk_prob 0 (with softmax scores also --use_qk_norm or "
            "--n_shared_experts 1)",
        )
        require(bool(self.data_files), "--data_path names no file: give at least one")
        require(0 <= self.valid_ratio < 1, f"--valid_ratio {self.valid_ratio}: must be at least 0 and below 1")
        has_both = self.valid_ratio and self.valid_path
        message = f"--valid_ratio {self.valid_ratio} and --valid_path {self.valid_path}: choose one of them"
        require(not has_both, message)
        for path in self.data_files + self.valid_files:
            require(os.path.isfile(path), f"no such data file: {path}")
        parse_columns(self.columns)
        unknown = [name for name in self.trackers if name not in TRACKERS]
        message = f"--tracker {self.tracker}: {', '.join(unknown)} is not one of {', '.join(TRACKERS)}"
        require(not unknown, message)
        token_names(self.add_tokens)
        self._check_metrics()

    def _check_metrics(self) -> None:
        """Raise ``UserError`` for metrics that do not exist, or that this stage or this run cannot measure."""
        flag, names = f"--eval_metric {self.eval_metric}", self.metric_names
        require(bool(names), "--eval_metric is empty: name a metric, such as loss")
        known = ("loss", "accuracy", *ANSWER_METRICS)
        for name in names:
            is_suite = name.startswith("suite:") and len(name) > len("suite:")
            message = f"{flag}: there is no metric {name}; choose from {', '.join(known)}, suite:NAME"
            require(is_suite or name in known, message)
            message = (
                f"{flag}: {name} is of answers, and this stage learns from texts; it has loss, accuracy, suite:NAME"
            )
            require(self.has_answers or name not in ANSWER_METRICS, message)
        has_suite = any(name.startswith("suite:") for name in names)
        require(has_suite or not self.suite_dir, f"--suite_dir {self.suite_dir}: goes with --eval_metric suite:NAME")
        message = f"{flag}: name the directory of its data, such as --suite_dir dataset/eval"
        require(not has_suite or bool(self.suite_dir), message)
        is_directory = not self.suite_dir or os.path.isdir(self.suite_dir)
        require(is_directory, f"--suite_dir {self.suite_dir}: no such directory")
        message = f"--eval_interval {self.eval_interval} and --eval_epochs {self.eval_epochs:g}: choose one of them"
        require(not (self.eval_interval and self.eval_epochs), message)
        if self.sample_prompts not in ("", "none"):
            for path in expand_paths(self.sample_prompts):
                require(os.path.isfile(path), f"--sample_prompts {path}: no such file; none: no questions")
        asked = [flag] * (names != ("loss",)) + [f"--patience {self.patience}"] * bool(self.patience)
        asked += [f"--sample_prompts {self.sample_prompts}"] * (self.sample_prompts not in ("", "none"))
        validates = bool(self.valid_path or self.valid_ratio)
        message = f"{', '.join(asked)}: needs validation data; give --valid_path, or --valid_ratio 0.01"
        require(validates or not asked, message)
        message = (
            f"--patience {self.patience}: counts validations, and there is only one, at the end; give --eval_interval"
        )
        require(not self.patience or bool(self.eval_interval or self.eval_epochs), message)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of ``--eval_metric``; the first is the criterion."""
        return tuple(dict.fromkeys(name.strip() for name in self.eval_metric.split(",") if name.strip()))

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """Those of ``metric_names`` that need the model's own answers."""
        return tuple(name for name in self.metric_names if name in ANSWER_METRICS)

    def rows_per_step(self, world_size: int) -> int:
        """Return the rows of one update over all ranks.

        Raises:
            UserError: ``--global_batch_size`` is not a multiple of the rows of one micro-batch of all ranks.
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
    def trackers(self) -> list[str]:
        """The names in ``--tracker``, each once, and wandb with ``--use_wandb``."""
        names = [name.strip() for name in self.tracker.split(",") if name.strip()]
        return list(dict.fromkeys(names + ["wandb"] * self.use_wandb))

    @property
    def project_name(self) -> str:
        """The project at the trackers."""
        return self.wandb_project or self.project

    @property
    def data_files(self) -> list[str]:
        """The files of ``--data_path``."""
        return [str(file) for file in expand_paths(self.data_path)]

    @property
    def valid_files(self) -> list[str]:
        """The files of ``--valid_path``."""
        return [str(file) for file in expand_paths(self.valid_path)]

    @property
    def row_settings(self) -> dict:
        """The settings of rows (``TextRows``, ``ChatRows``, ...) as keyword arguments."""
        names = ("max_seq_len", "packing", "train_on", "seed", "strict")
        settings = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return settings | {"cache_dir": self.token_cache}

    @property
    def train_data(self) -> DataFiles:
        """The records to train on: those of ``--data_path``, without those that ``--valid_ratio`` holds out."""
        return DataFiles(self.data_files, self.valid_ratio, "train", self.columns)

    @property
    def valid_data(self) -> DataFiles | None:
        """The records to validate with: those of ``--valid_path``, or the held-out ones; None without validation."""
        if self.valid_ratio:
            return DataFiles(self.data_files, self.valid_ratio, "valid", self.columns)
        return DataFiles(self.valid_files, columns=self.columns) if self.valid_files else None

    @property
    def token_cache(self) -> str:
        """The directory of tokenised data."""
        return self.cache_dir or os.path.join(self.save_dir, ".token_cache")
