"""The arguments of each training program, in the order of a model's life; field docstrings are the help texts.

    train_tokenizer.py    TokenizerArguments
    train_pretrain.py     PretrainArguments
    train_sft.py          SFTArguments
    train_lora.py         LoRAArguments         an adapter (AdapterArguments); may replay old data (ReplayArguments)
    train_dpo.py          PreferenceArguments   may train an adapter
    train_distill.py      DistillArguments
    train_reason.py       ReasonArguments       may replay old data

All but the first share ``TrainArguments`` (``train_arguments.py``), which contains ``ModelArguments``, the shape of a
new model (``model_arguments.py``). ``eval_model.py`` takes ``EvalArguments`` (``eval_arguments.py``).
"""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from minillm.cli.command_line import require
from minillm.cli.train_arguments import TrainArguments
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError
from minillm.lora import LoRAConfig
from minillm.lora.more.init import RESIDUAL_INITS, Init
from minillm.losses.distill import DIVERGENCES
from minillm.losses.preference import LOSS_TYPES, NEEDS_REFERENCE, SMOOTHED
from minillm.precision import choose_dtype


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Training a tokenizer; it is saved in SAVE_DIR/tokenizer."""

    bare_stage = "tokenizer"
    data_path: str = ""
    """Text to learn from, of any schema: .jsonl, .json, .csv, .tsv, .parquet or .txt, also as .gz; several files
    separated by commas; also directories and patterns such as data/*.jsonl (default: the first known name in dataset/,
    else the demo data)."""
    valid_path: str = ""
    """Held-out text to measure bytes per token (default: every 20th record of the data, not used for training)."""
    columns: str = ""
    """The files' names for our keys, as ours=theirs: prompt=question,completion=answer."""
    save_dir: str = "out"
    """Directory that holds the run directories; the tokenizer goes to SAVE_DIR/tokenizer."""
    vocab_size: int = 6400
    """Number of ids: 32 special tokens (11 below 512), 256 bytes, then merges."""
    tokenizer_type: Literal["bpe", "bpe_by_hand", "sentencepiece"] = "bpe"
    """bpe: merges of bytes; bpe_by_hand: the same tokenizer, learned more slowly by our own readable code;
    sentencepiece: merges of characters, rare ones as bytes (pip install sentencepiece)."""
    max_token_length: int = 15
    """Longest token in bytes; 15 is five Chinese characters, or a space and 14 letters; sentencepiece: in characters
    (0: no limit)."""
    split_han: bool = False
    """Never merge neighbouring Chinese characters."""
    max_records: int = 0
    """Stop after this many records, one from each file in turn (0: all)."""
    max_bytes: int = 300_000_000
    """Stop after this much text, equally from all files (0: all); memory grows with the number of different words."""
    strict: bool = False
    """Stop at the first bad line of a data file, instead of skipping bad lines."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a missing file."""
        for name in ("max_token_length", "max_records", "max_bytes"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must be at least 0")
        for flag, files in (("data_path", self.data_files), ("valid_path", self.valid_files)):
            for path in files:
                require(os.path.isfile(path), f"--{flag} {path}: no such file")
        require(bool(self.data_files), "--data_path names no file: give at least one")
        parse_columns(self.columns)

    @property
    def data_files(self) -> list[str]:
        """The files of ``--data_path``."""
        return [str(file) for file in expand_paths(self.data_path)]

    @property
    def valid_files(self) -> list[str]:
        """The files of ``--valid_path``."""
        return [str(file) for file in expand_paths(self.valid_path)]


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainArguments):
    """Pretraining: next-token prediction on plain text."""

    bare_stage = "pretrain"
    has_answers = False

    packing: Literal["stream", "best_fit", "none"] = "stream"
    """stream: cut the text every max_seq_len; best_fit: whole documents per row; none: one document per row."""

    @property
    def row_settings(self) -> dict:
        """The settings of ``TextRows``; their packing does not depend on the seed."""
        return {name: value for name, value in super().row_settings.items() if name != "seed"}


@dataclass(frozen=True, kw_only=True)
class SFTArguments(TrainArguments):
    """Supervised fine-tuning on conversations; starts from the pretrained weights."""

    bare_stage = "sft"

    from_weight: str = "pretrain"
    learning_rate: float = 5e-5
    epochs: float = 2.0
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several conversations per row, which never attend to each other; none: one per row."""
    train_on: Literal["all", "last", "per_turn"] = "all"
    """Which assistant turns are targets: all, the last one, or each one in a separate copy of its conversation."""


@dataclass(frozen=True, kw_only=True)
class ReplayArguments(SFTArguments):
    """Fine-tuning with old conversations among the new ones; see ``minillm.data.ReplayRows``."""

    replay_path: str = ""
    """Old conversations that are mixed into the new ones, so that the model does not forget them."""
    replay_ratio: float = 0.25
    """Share of these rows in an epoch."""

    def check(self) -> None:
        """Raise ``UserError`` for a share out of range or a missing file."""
        super().check()
        require(0 < self.replay_ratio < 1, f"--replay_ratio {self.replay_ratio}: must lie between 0 and 1")
        for path in self.replay_files:
            require(os.path.isfile(path), f"--replay_path {path}: no such file")

    @property
    def replay_files(self) -> list[str]:
        """The files of ``--replay_path``."""
        return [str(file) for file in expand_paths(self.replay_path)]

    @property
    def replay_data(self) -> DataFiles:
        """The records of ``--replay_path``."""
        return DataFiles(self.replay_files, columns=self.columns)


@dataclass(frozen=True, kw_only=True)
class AdapterArguments(TrainArguments):
    """The settings of an adapter."""

    lora_name: str = ""
    """Train an adapter of this name instead of the model; it is saved in SAVE_DIR/lora/<lora_name>_<hidden_size>."""
    lora_rank: int = 8
    """Rank R: the width of the thin matrices A (R, in) and B (out, R)."""
    lora_alpha: float = 16.0
    """Scale of the adapter's output: alpha/R (with use_rslora alpha/sqrt(R))."""
    lora_dropout: float = 0.0
    """Probability that an input of A is set to zero in training."""
    target_modules: str = "all-linear"
    """Layers to adapt: all-linear, attention, mlp, experts, names separated by commas, or a regular expression."""
    lora_layers: str = ""
    """Numbers of the blocks to adapt, separated by commas (default: all)."""
    rank_pattern: str = ""
    """Other ranks for some layers: NAME=RANK, separated by commas, e.g. down_proj=16."""
    alpha_pattern: str = ""
    """Other alphas for some layers: NAME=ALPHA, separated by commas."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are also trained."""
    modules_to_save: str = ""
    """Layers that are trained and saved in full, separated by commas, e.g. embed_tokens,lm_head."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(R), so that large ranks learn as fast as small ones."""
    use_dora: bool = False
    """DoRA: also train the norm of each row of the weight."""
    lora_init: Literal[get_args(Init)] = "kaiming"
    """Initial values of A and B; pissa and olora take them from the weights."""
    lora_init_std: float = 0.0
    """With gaussian or orthogonal: standard deviation of A (0: 1/lora_rank, or 0.005)."""
    loraplus_ratio: float = 1.0
    """LoRA+: learning rate of B as a multiple of the learning rate of A (the paper uses 16)."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights; the adapter is always float32."""

    @cached_property
    def lora_config(self) -> LoRAConfig:
        """The adapter's settings; UserError for an invalid one."""
        layers = [part.strip() for part in self.lora_layers.split(",") if part.strip()]
        are_numbers = all(layer.isdecimal() for layer in layers)
        require(are_numbers, f"--lora_layers {self.lora_layers}: must be numbers of blocks with commas, e.g. 0,1,2")
        modules = tuple(part.strip() for part in self.modules_to_save.split(",") if part.strip())
        if self.add_tokens:  # the rows of new tokens must learn
            modules = tuple(dict.fromkeys([*modules, "embed_tokens", "lm_head"]))
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.target_modules,
            layers=tuple(map(int, layers)) or None,
            rank_pattern=_pattern("rank_pattern", self.rank_pattern, int),
            alpha_pattern=_pattern("alpha_pattern", self.alpha_pattern, float),
            bias=self.lora_bias,
            modules_to_save=modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init=self.lora_init,
            init_std=self.lora_init_std,
        )

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.from_weight), "--from_weight is empty: name the model to tune")
        message = f"--lora_name {self.lora_name!r}: must be a name without dots and slashes"
        require(not set(self.lora_name) & set("/\\."), message)
        require(self.loraplus_ratio > 0, f"--loraplus_ratio {self.loraplus_ratio}: must be positive")
        try:
            _ = self.lora_config
        except UserError as error:
            raise UserError(f"the adapter's settings: {error}") from None

    def choose_base_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that ``--base_dtype`` names, for a run that computes in ``dtype``.

        Raises:
            UserError: 16-bit frozen weights with fully trained layers, which are float32, but without autocast.
        """
        base_dtype = choose_dtype(self.base_dtype, device, flag="base_dtype")
        trains_whole_layers = self.lora_config.modules_to_save or self.lora_bias != "none"
        is_mixed = base_dtype != torch.float32 and dtype == torch.float32 and trains_whole_layers
        message = "fully trained layers are float32, so products need autocast to a 16-bit dtype: give --dtype auto"
        require(not is_mixed, f"--base_dtype {self.base_dtype} with --dtype {self.dtype}: {message}")
        return base_dtype


@dataclass(frozen=True, kw_only=True)
class LoRAArguments(AdapterArguments, ReplayArguments):
    """LoRA: train a few percent of new parameters; the model's own weights stay unchanged."""

    bare_stage = "lora"
    from_weight: str = "full_sft"
    """The model to adapt: a stage name, a model directory or a .pth file."""
    lora_name: str = "lora"
    """Name of the adapter; it is saved in SAVE_DIR/lora/<lora_name>_<hidden_size>."""
    monitor: bool = False
    """Record the adapter's gradients and updates, plot them and warn (monitor.jsonl, monitor.png)."""
    monitor_interval: int = 0
    """Steps between records (0: 5 with --monitor, else none). torchrun takes --monitor for its own flag: there give
    only this one."""
    balance_gradients: bool = False
    """Where one of A and B has a gradient more than ten times as long as the other's, enlarge the shorter one to half
    of the longer one, before clipping."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.lora_name), "--lora_name '': give the adapter a name")
        require(self.monitor_interval >= 0, f"--monitor_interval {self.monitor_interval}: must not be negative")


def _pattern(flag: str, text: str, kind: type) -> dict:
    """Return {name: number} for ``NAME=NUMBER,...``, the value of ``--<flag>``."""
    values = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = part.rpartition("=")
        try:
            values[name] = kind(value)
        except ValueError:
            name = ""
        require(bool(name), f"--{flag} {text}: must be NAME=NUMBER with commas, e.g. down_proj=16")
    return values


@dataclass(frozen=True, kw_only=True)
class PreferenceArguments(AdapterArguments):
    """Preference tuning: the model learns which of two replies people prefer."""

    bare_stage = "dpo"
    from_weight: str = "full_sft"
    """The model to tune, which is also the reference: a stage name, a model directory or a .pth file."""
    loss_type: Literal[(*LOSS_TYPES, "kto")] = "sigmoid"
    """sigmoid (DPO; with label_smoothing cDPO), robust, ipo, hinge, simpo and orpo (without a reference), kto (judged
    replies: prompt, completion, label; a pair counts as a good and a bad reply)."""
    beta: float = 0.1
    """Strength of the KL penalty: rewards are beta times log-ratios (simpo: 2.0 and more; orpo: weight of its odds
    ratio)."""
    label_smoothing: float = 0.0
    """sigmoid, robust, simpo: expected share of pairs with swapped labels, below 0.5."""
    gamma: float = 0.0
    """simpo: target margin between the rewards."""
    sft_weight: float = 0.0
    """Weight of the chosen replies' mean loss per token, which is added to the loss."""
    desirable_weight: float = 1.0
    """kto: weight of good replies."""
    undesirable_weight: float = 1.0
    """kto: weight of bad replies."""
    reference: Literal["auto", "copy", "adapter", "cached"] = "auto"
    """copy: a frozen copy of the model; adapter: the model with its adapter disabled; cached: log-probabilities that
    are computed before training and stored on disk; auto: adapter with --lora_name, else copy."""
    reference_cache: str = ""
    """With cached: the directory for them (default: SAVE_DIR/.reference_cache)."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several pairs per row, which never attend to each other; none: one per row, sorted by length."""
    max_seq_len: int = 512
    """Longest conversation in tokens, prompt with one reply; a row holds two of them, or more shorter ones."""
    learning_rate: float = 5e-6
    """Peak learning rate: far below that of fine-tuning, to keep old skills (ten times as much with an adapter)."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""

    @property
    def reference_kind(self) -> str | None:
        """How the reference is computed; None for a loss without a reference."""
        if self.loss_type not in NEEDS_REFERENCE:
            return None
        if self.reference != "auto":
            return self.reference
        return "adapter" if self.lora_name else "copy"

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or one that the loss does not use."""
        super().check()
        require(self.beta > 0, f"--beta {self.beta}: must be positive")
        require(0 <= self.label_smoothing < 0.5, f"--label_smoothing {self.label_smoothing}: must be 0 to below 0.5")
        smoothed = self.loss_type in SMOOTHED or not self.label_smoothing
        require(smoothed, f"--label_smoothing {self.label_smoothing}: goes with {', '.join(SMOOTHED)}")
        require(self.gamma >= 0, f"--gamma {self.gamma}: must not be negative")
        require(self.loss_type == "simpo" or not self.gamma, f"--gamma {self.gamma}: goes with --loss_type simpo")
        for name in ("sft_weight", "desirable_weight", "undesirable_weight"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        weighted = (self.desirable_weight, self.undesirable_weight) != (1, 1)
        require(self.loss_type == "kto" or not weighted, "--desirable_weight, --undesirable_weight: go with kto")
        require(self.loss_type != "kto" or not self.sft_weight, "--sft_weight: goes with pairs, not with kto")
        with_reference = ", ".join(sorted(NEEDS_REFERENCE))
        message = (
            f"--reference {self.reference}: --loss_type {self.loss_type} has none; those with one: {with_reference}"
        )
        require(self.reference == "auto" or self.loss_type in NEEDS_REFERENCE, message)
        require(self.reference != "adapter" or bool(self.lora_name), "--reference adapter: goes with --lora_name")
        # With B = 0 dropout changes nothing at first, but it changes an adapter that was taken from the weights.
        starts_at_reference = not (self.lora_name and self.lora_dropout and self.lora_init in RESIDUAL_INITS)
        require(
            starts_at_reference or self.loss_type not in NEEDS_REFERENCE,
            f"--lora_dropout {self.lora_dropout} with --lora_init {self.lora_init}: dropout would remove a part of the "
            "model's own weights, so it would not start at its reference; use --lora_dropout 0, or another --lora_init",
        )
        cached = self.reference == "cached" or not self.reference_cache
        require(cached, f"--reference_cache {self.reference_cache}: goes with --reference cached")


@dataclass(frozen=True, kw_only=True)
class DistillArguments(TrainArguments):
    """White-box distillation: a student learns a teacher's full distribution over the next token."""

    bare_stage = "distill"
    teacher: str
    """The teacher: a model directory, a stage name of SAVE_DIR with its width (full_sft_768), or a .pth file. Its size
    and experts may differ from the student's, but its tokenizer must be the same."""
    from_weight: str = ""
    """Initial weights of the student: a stage name, a model directory or a .pth file (default: random weights)."""
    alpha: float = 0.5
    """Weight of the cross-entropy with the data; the divergence from the teacher has weight 1 - alpha."""
    temperature: float = 1.0
    """Temperature of both distributions; the divergence is multiplied by its square."""
    divergence: Literal[DIVERGENCES] = "forward"
    """forward KL(teacher || student) covers everything that the teacher does, reverse concentrates on what it does
    most, symmetric is their mean, js is the Jensen-Shannon divergence."""
    top_k: int = 0
    """Compute the teacher's k best tokens of every position once and store them on disk, instead of running the teacher
    in every step (0: run the teacher)."""
    teacher_cache: str = ""
    """With top_k: the directory for them (default: SAVE_DIR/.teacher_cache)."""
    max_cache_gib: float = 20.0
    """With top_k: refuse a larger cache."""
    hidden_weight: float = 0.0
    """Weight of the distance between the student's last hidden states, after a learned projection, and the teacher's,
    both normalised to length 1 (0: none)."""
    on_policy: float = 0.0
    """Share of the steps that train on the student's own answers to the prompts, with the teacher's distribution as the
    target (GKD)."""
    max_new_tokens: int = 128
    """With on_policy: longest answer in tokens."""
    sampling_temperature: float = 1.0
    """With on_policy: temperature of the answers."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several texts or conversations per row, which never attend to each other; none: one per row."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a combination that is not possible."""
        super().check()
        for name, low, high in (("alpha", 0, 1), ("on_policy", 0, 1)):
            value = getattr(self, name)
            require(low <= value <= high, f"--{name} {value}: must lie between {low} and {high}")
        for name in ("temperature", "sampling_temperature", "max_cache_gib"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be positive")
        for name in ("top_k", "hidden_weight"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        require(self.max_new_tokens >= 1, f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        runs_teacher = not self.top_k
        message = f"--top_k {self.top_k} stores the teacher's answers on the data: --on_policy needs the teacher itself"
        require(runs_teacher or not self.on_policy, message)
        message = f"--top_k {self.top_k} stores no hidden states, which --hidden_weight needs"
        require(runs_teacher or not self.hidden_weight, message)
        message = f"--teacher_cache {self.teacher_cache}: goes with --top_k"
        require(not runs_teacher or not self.teacher_cache, message)


@dataclass(frozen=True, kw_only=True)
class ReasonArguments(ReplayArguments):
    """Reasoning distillation: a chat model learns from a larger model's written thoughts to think before it answers."""

    bare_stage = "reason"
    from_weight: str = "rlhf"
    """The model that learns to think: a stage name, a model directory or a .pth file."""
    tag_weight: float = 10.0
    """Weight of the targets <think> </think> <answer> </answer> in the loss; all others have weight 1."""

    learning_rate: float = 1e-5
    """Peak learning rate. A fifth of SFT's: the form is learned quickly, and the model should keep its knowledge."""
    epochs: float = 1.0
    """Passes over the data, also a part of one: 0.5."""
    max_seq_len: int = 1024
    """Row length T in tokens; thoughts are longer than answers."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.from_weight), "--from_weight is empty: name the model that learns to think")
        is_valid = 0 < self.tag_weight < math.inf
        require(is_valid, f"--tag_weight {self.tag_weight}: must be positive and finite; 1 weighs all targets equally")
