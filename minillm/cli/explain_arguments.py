"""The arguments of ``python -m minillm.explain``."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from minillm.cli.command_line import require
from minillm.cli.eval_arguments import OpenArguments


@dataclass(frozen=True, kw_only=True)
class ExplainArguments(OpenArguments):
    """Follow a text through a model to the next token."""

    text: Annotated[str, tyro.conf.Positional]
    """The text, or with --chat a question."""
    from_weight: str = "full_sft"
    """A stage name, a run's name, a model directory, a .pth file, or ORG/MODEL on a hub; without weights in SAVE_DIR
    the demo's."""
    chat: bool = False
    """Write the text as a question, with the model's chat template."""
    language: Literal["en", "zh"] = "en"
    """Of the explanation; the page has both."""
    output: str = ""
    """HTML file (default: SAVE_DIR/explain.html; none: no file)."""
    max_tokens: int = 64
    """Longest text; longer ones make the page large."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        super().check()
        require(bool(self.text), "the text is empty: give a text in quotes")
        require(self.max_tokens >= 1, f"--max_tokens {self.max_tokens}: must be at least 1")
