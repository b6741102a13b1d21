"""The arguments of ``python -m minillm.export``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.model_arguments import ModelArguments

DTYPES = {"gguf": ("f32", "f16", "bf16", "q8_0"), "onnx": ("f32",), "pth": ("f32", "f16", "bf16"),
          "hf": ("f32", "f16", "bf16")}  # fmt: skip
DEFAULT_DTYPES = {"gguf": "f16", "onnx": "f32", "pth": "f16", "hf": "f32"}
SUFFIXES = {"gguf": ".gguf", "onnx": ".onnx", "pth": ".pth"}


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ModelArguments):
    """Write a trained model for other programs; flags of the shape are for a .pth without a config.json."""

    from_weight: str = "full_sft"
    """A stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub."""
    lora_name: str = ""
    """Merge this adapter first: its name, a directory or a .pth; several with weights as cooking:0.7,medical:0.3."""
    format: Literal["gguf", "onnx", "pth", "hf"] = "gguf"
    """gguf: llama.cpp and Ollama; onnx: onnxruntime; pth: one state dict; hf: a Hugging Face directory."""
    dtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """Of the matrices; auto: f16 for gguf and pth, f32 for onnx (which has no other) and hf. q8_0: gguf only."""
    output: str = ""
    """File to write, or directory for hf (default: SAVE_DIR/export/<name>, with .gguf, .onnx or .pth)."""
    overwrite: bool = False
    """Replace an existing file."""
    allow_token_differences: bool = False
    """gguf: write the file even if llama.cpp gives other ids to some texts than this tokenizer."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one next to the weights, else SAVE_DIR/tokenizer)."""

    @property
    def chosen_dtype(self) -> str:
        """The dtype, with ``auto`` resolved."""
        return DEFAULT_DTYPES[self.format] if self.dtype == "auto" else self.dtype

    def check(self) -> None:
        """Raise ``UserError`` for a combination that does not exist."""
        super().check()
        require(bool(self.from_weight), "--from_weight '': name the model to export")
        allowed = DTYPES[self.format]
        message = f"--dtype {self.dtype}: --format {self.format} has {', '.join(allowed)}"
        require(self.dtype == "auto" or self.dtype in allowed, message)
        suffix = SUFFIXES.get(self.format, "")
        message = f"--output {self.output}: a file of --format {self.format} ends in {suffix}"
        require(not self.output or not suffix or Path(self.output).suffix == suffix, message)
