"""The arguments of programs that open a trained model, such as ``eval_model.py``."""

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
    """The model to open, and how; see ``open_from_arguments``."""

    from_weight: str = ""
    """A stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub (default: the stage of
    --model_mode, in SAVE_DIR or else in the demo)."""
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
    """Dtype of the weights; auto: a 16-bit dtype if the device computes it fast, else float32."""
    num_threads: int = 0
    """CPU threads of this process (0: torch's default)."""


@dataclass(frozen=True, kw_only=True)
class EvalArguments(OpenArguments):
    """Try and measure a trained model: chat, complete text, perplexity, exact match, preferences, reasoning."""

    model_mode: Literal[0, 1, 2, 3] = 1
    """0 pretrain (completes text), 1 full_sft, 2 rlhf, 3 reason (1 to 3 chat)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Answer this text and stop; may be given several times."""
    prompts: str = ""
    """Answer the prompts of this file: its lines, or its records without their last answer (.jsonl, .json, .csv, …; any
    record for training, with or without an answer)."""
    perplexity: str = ""
    """Measure the loss on this file of texts: nats per token and bits per byte, by kind of text."""
    task_file: str = ""
    """Measure exact match on this file of conversations whose last turn is the expected answer; in mode 3 with and
    without thinking, and how many answers have the right form."""
    n_samples: int = 1
    """Mode 3 with --task_file: if above 1, also sample this many answers to each task: majority vote and pass@k."""
    pairs_file: str = ""
    """Measure how often the chosen reply of this file of preferences is more probable than the rejected one."""
    answer_pairs: bool = False
    """With --pairs_file: also let the model answer (greedily), and count answers equal to the chosen reply."""
    text_metrics: bool = False
    """With --task_file: also the loss of the expected answers, and BLEU and ROUGE of the model's answers."""
    suite: str = ""
    """Measure suites of questions: zh, en, all, or names with commas between them (ceval, cmmlu, mmlu, arc_easy, …)."""
    suite_dir: str = "dataset/eval"
    """Directory with the files of the suites: our .jsonl(.gz), or the original releases."""
    n_shot: int = 0
    """Suites: answered questions of the same subject before each question."""
    suite_limit: int = 0
    """Suites: measure only this many questions of each, evenly spaced (0: all)."""
    suite_random: bool = False
    """Suites: also measure an untrained model of the same configuration."""
    suite_resume: bool = False
    """Suites: keep those that --output has from an earlier call with the same model, files and settings."""
    columns: str = ""
    """The files' names for our keys, as ours=theirs: prompt=question,completion=answer."""
    output: str = ""
    """Also write all results to this JSON file; for suites also a table (.md) and a picture (.png) next to it."""

    temperature: float = 0.85
    """Divide the logits by this; 0 is greedy."""
    top_p: float = 0.85
    """Sample from the smallest set of most probable tokens with this total probability (1: all)."""
    top_k: int = 0
    """Sample from the k most probable tokens (0: all)."""
    min_p: float = 0.0
    """Exclude tokens with less than this share of the best token's probability (0: none)."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens that were already used less likely."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    seed: int = 42
    """Seed of the sampling."""
    history_turns: int = 3
    """Chat: number of earlier questions and answers that stay in the prompt."""
    system: str = ""
    """Chat: a system message before the conversation."""
    tools: str = ""
    """Chat: the functions of this Python file, which the model may call while it answers."""
    thinking: Literal["dim", "hide", "plain"] = "dim"
    """Mode 3: show the thinking dimmed (in a terminal), not at all, or like the answer."""
    batch_size: int = 32
    """Prompts, tasks or text windows per forward pass."""
    max_seq_len: int = 0
    """Perplexity: window in tokens (0: 1,024, or the model's positions if fewer)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or a missing file."""
        at_least = {"num_threads": 0, "max_new_tokens": 1, "history_turns": 0, "batch_size": 1, "max_seq_len": 0,
                    "n_samples": 1, "n_shot": 0, "suite_limit": 0}  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        super().check()
        for name in ("prompts", "perplexity", "task_file", "pairs_file"):
            for path in expand_paths(getattr(self, name)):
                require(path.is_file(), f"--{name} {path}: no such file")
        parse_columns(self.columns)
        require(bool(self.task_file) or not self.text_metrics, "--text_metrics needs --task_file with expected answers")
        thinks = self.model_mode == 3
        require(not (thinks and self.text_metrics), "--text_metrics compares plain answers: leave it out in mode 3")
        require(thinks or self.thinking == "dim", f"--thinking {self.thinking}: only --model_mode 3 thinks; add it")
        require(self.model_mode != 0 or not self.pairs_file, "--pairs_file needs a chat model: --model_mode 1, 2 or 3")
        require(bool(self.pairs_file) or not self.answer_pairs, "--answer_pairs needs --pairs_file with preferences")
        is_file = self.tools.endswith(".py") and os.path.isfile(self.tools)
        require(not self.tools or is_file, f"--tools {self.tools}: no such file; give a Python file with functions")
        require(self.model_mode != 0 or not self.tools, "--tools needs a chat model: --model_mode 1, 2 or 3")
        for name in ("n_shot", "suite_limit", "suite_random", "suite_resume"):
            require(bool(self.suite) or not getattr(self, name), f"--{name} needs --suite with suites to measure")
        require(bool(self.output) or not self.suite_resume, "--suite_resume needs --output with earlier results")
        is_json = not self.suite or not self.output.endswith((".md", ".png"))
        require(is_json, f"--output {self.output}: is for JSON, next to which suites write .md and .png; name a .json")
        require(not self.suite or os.path.isdir(self.suite_dir), f"--suite_dir {self.suite_dir}: no such directory")
        if self.n_samples > 1:
            flag = f"--n_samples {self.n_samples}"
            require(thinks and bool(self.task_file), f"{flag}: needs --model_mode 3 and --task_file")
            require(self.temperature > 0, f"{flag} at --temperature 0: all samples would be equal; use e.g. 0.8")
        output_dir = os.path.dirname(os.path.abspath(self.output))
        require(os.path.isdir(output_dir), f"--output {self.output}: there is no folder {output_dir}; make it first")
        is_writable = os.access(output_dir, os.W_OK) and not os.path.isdir(self.output)
        message = f"--output {self.output}: cannot be written; name a file in a folder with write permission"
        require(not self.output or is_writable, message)
