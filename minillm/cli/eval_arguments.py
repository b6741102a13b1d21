"""The arguments of what opens a trained model: ``eval_model.py`` and its relatives."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minillm.cli.command_line import require
from minillm.cli.model_arguments import ModelArguments
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import expand_paths


@dataclass(frozen=True, kw_only=True)
class OpenArguments(ModelArguments):
    """Which model to open, and how; see ``open_model``."""

    from_weight: str = ""
    """A stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub (default: the stage of
    --model_mode, of SAVE_DIR or else of the demo)."""
    lora_name: str = ""
    """Add this adapter: its name (SAVE_DIR/lora/<name>_<hidden_size>), a directory or a .pth; several with weights as
    cooking:0.7,medical:0.3."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one next to the weights, else SAVE_DIR/tokenizer)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    """Dtype of the weights; auto: the fastest the device computes well."""
    num_threads: int = 0
    """CPU threads of this process (0: torch's default)."""


@dataclass(frozen=True, kw_only=True)
class EvalArguments(OpenArguments):
    """Try and measure a trained model: chat, complete text, perplexity, exact match, preferences, reasoning."""

    model_mode: Literal[0, 1, 2, 3] = 1
    """0 pretrain (completes text), 1 full_sft, 2 rlhf, 3 reason (these chat)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Answer this text and end; may be given several times."""
    prompts: str = ""
    """Answer the prompts of this file: its lines, or its records without their last answer (.jsonl, .json, .csv, …; any
    record that training reads, and those that lack an answer)."""
    perplexity: str = ""
    """Measure the loss on this file of texts: nats per token and bits per byte, by kind."""
    task_file: str = ""
    """Measure exact match on this file of conversations whose last turn is the expected answer; in mode 3 with the
    thinking and without it, and how many answers have the form."""
    n_samples: int = 1
    """Mode 3 with --task_file: above 1, also this many sampled answers to each task: their majority, and pass@k."""
    pairs_file: str = ""
    """Measure how often the chosen reply of this file of preferences is more probable than the rejected one."""
    answer_pairs: bool = False
    """With --pairs_file: let the model answer freely (greedily) too, and count answers like the chosen one."""
    text_metrics: bool = False
    """With --task_file: also the loss of the expected answers, and BLEU and ROUGE of the model's own against them."""
    columns: str = ""
    """These files' names for our keys, ours=theirs: prompt=question,completion=answer."""
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
    thinking: Literal["dim", "hide", "plain"] = "dim"
    """Mode 3: show the thinking dimmed (at a terminal), not at all, or like the answer."""
    batch_size: int = 32
    """Prompts, tasks or text windows per forward pass."""
    max_seq_len: int = 0
    """Perplexity: window in tokens (0: 1,024, or the model's positions if fewer)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a file that is not there."""
        least = {"num_threads": 0, "max_new_tokens": 1, "history_turns": 0, "batch_size": 1, "max_seq_len": 0,
                 "n_samples": 1}  # fmt: skip
        for name, limit in least.items():
            value = getattr(self, name)
            require(value >= limit, f"--{name} {value}: must be at least {limit}")
        super().check()
        for name in ("prompts", "perplexity", "task_file", "pairs_file"):
            for path in expand_paths(getattr(self, name)):
                require(path.is_file(), f"--{name} {path}: no such file")
        parse_columns(self.columns)
        require(bool(self.task_file) or not self.text_metrics, "--text_metrics needs --task_file with expected answers")
        reasons = self.model_mode == 3
        require(not (reasons and self.text_metrics), "--text_metrics compares plain answers: leave it out in mode 3")
        require(reasons or self.thinking == "dim", f"--thinking {self.thinking}: only --model_mode 3 thinks; add it")
        require(self.model_mode != 0 or not self.pairs_file, "--pairs_file needs a chat model: --model_mode 1, 2 or 3")
        require(bool(self.pairs_file) or not self.answer_pairs, "--answer_pairs needs --pairs_file with preferences")
        flag, alone = f"--n_samples {self.n_samples}", self.n_samples == 1
        require(alone or (reasons and bool(self.task_file)), f"{flag}: needs --model_mode 3 and --task_file")
        require(alone or self.temperature > 0, f"{flag} at --temperature 0: all would be equal; raise it, say to 0.8")
        folder = os.path.dirname(os.path.abspath(self.output))
        writable = os.path.isdir(folder) and os.access(folder, os.W_OK) and not os.path.isdir(self.output)
        require(os.path.isdir(folder), f"--output {self.output}: there is no folder {folder}; make it first")
        message = f"--output {self.output}: cannot be written; name a file in a folder that you may write to"
        require(not self.output or writable, message)
