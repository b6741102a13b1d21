"""The arguments of ``serve_api.py``."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minillm.cli.command_line import require

KEY_VARIABLE = "MINILLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Serve a model with OpenAI's API, for many clients at once."""

    model: str = "full_sft"
    """The model: a stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub."""
    model_name: str = ""
    """Its name for clients (default: the name of its directory)."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Serve an adapter too, as NAME=ADAPTER: clients ask for it by NAME, and ADAPTER is its name in SAVE_DIR/lora, its
    directory or its .pth; may be given several times."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    tokenizer_path: str = ""
    """Tokenizer directory (default: the one next to the weights, else SAVE_DIR/tokenizer)."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 is this machine alone, 0.0.0.0 all networks: then use --api_key."""
    port: int = 8000
    """Port to listen on (0: any free one)."""
    api_key: str = ""
    """Clients must send this key (default: the variable MINILLM_API_KEY, which other users of the machine cannot see;
    none: anybody may ask)."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may ask from a browser: https://chat.example.com, or * for all (default: none)."""
    max_body_mb: float = 4.0
    """Refuse larger requests (MiB)."""
    grace_s: float = 30.0
    """After a signal, let answers finish for so long (seconds); then they end with what they have."""
    log_content: bool = False
    """Also log what was asked and answered."""

    max_batch: int = 64
    """Most requests that are answered at once; further ones wait."""
    max_batch_tokens: int = 512
    """Most tokens of one forward pass; longer prompts are read in several."""
    max_queue: int = 256
    """Most requests that wait; further ones are refused with 429."""
    n_pages: int = 0
    """Pages for keys and values (0: enough for --max_batch requests of the model's length, at most 65,536 tokens)."""
    page_len: int = 16
    """Tokens per page; prompts share whole pages."""

    draft: str = ""
    """Guess tokens and check several at once, with the same answers: lookup guesses what the text repeats; a model
    (named as --model) guesses with a smaller one of the same tokenizer."""
    compile: Literal["auto", "0", "1"] = "auto"
    """Faster steps, but not for adapters and with --draft: a CUDA device records them, a CPU compiles them, a minute
    when the first requests come. auto: on CUDA."""

    quantization: Literal["none", "int8"] = "none"
    """int8: weights in eight bits, for a CPU that answers one request at a time (then --compile is on): fewer bytes to
    read per token. Answers may differ from those of the full weights."""

    temperature: float = 1.0
    """For requests without a temperature; 0 is greedy."""
    top_p: float = 1.0
    """For requests without top_p."""
    max_new_tokens: int = 0
    """Longest answer of a chat that gives no limit (0: as long as the model can)."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the weights; auto: a 16-bit dtype if the device computes it fast, else float32."""
    num_threads: int = 0
    """CPU threads of the model (0: torch's default)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        at_least = {"max_batch": 1, "max_batch_tokens": 1, "max_queue": 1, "n_pages": 0, "page_len": 1,
                    "max_new_tokens": 0, "num_threads": 0, "grace_s": 0}  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        require(0 <= self.port <= 65535, f"--port {self.port}: must lie between 0 and 65535")
        require(self.max_body_mb > 0, f"--max_body_mb {self.max_body_mb}: must be positive")
        if self.quantization == "int8":
            require(not self.lora, "--quantization int8: has no adapters; merge the adapter, or serve the full weights")
            require(self.compile != "0", "--quantization int8: is slow without the compiler; leave out --compile 0")
        for entry in self.lora:
            name, equals, path = entry.partition("=")
            require(bool(name and equals and path), f"--lora {entry}: write NAME=ADAPTER")
        names = [name for name, _ in self.adapters]
        require(len(set(names)) == len(names), f"--lora: the name {max(names, key=names.count, default='')} is twice")

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """The adapters, each as its name for clients and what it is."""
        return [(entry.partition("=")[0], entry.partition("=")[2]) for entry in self.lora]

    @property
    def key(self) -> str:
        """The API key; "" if there is none."""
        return self.api_key or os.environ.get(KEY_VARIABLE, "")
