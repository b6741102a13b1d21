"""The arguments of ``make_demo.py``: the sizes of the demo world's files."""

import dataclasses
from dataclasses import dataclass

from minillm.cli.command_line import require


@dataclass(frozen=True, kw_only=True)
class DemoDataArguments:
    """Write the demo world: pretraining text with exact probabilities, and tasks; equal flags give equal bytes."""

    out_dir: str = "dataset/demo"
    """Folder for the files; created if it is missing."""
    seed: int = 42
    """Seed of the world, of the held-out items and of every file."""
    n_pretrain: int = 190_000
    """Documents in pretrain_train.jsonl (about 15 tokens each at vocabulary 1,024)."""
    n_valid: int = 3_000
    """Documents in pretrain_valid.jsonl."""
    n_addition: int = 18_000
    """SFT conversations of this task; the next eight flags are those of the other tasks."""
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
    """Test conversations per task and group; a small group may have fewer."""
    n_reason: int = 14_000
    """Reasoning problems for training."""
    n_reason_test: int = 200
    """Reasoning problems for testing."""
    n_tools: int = 2_600
    """Conversations with tools for training."""
    n_tools_replay: int = 5_200
    """Conversations of sft_train.jsonl among them, so that the model does not forget its tasks."""
    n_tools_test: int = 100
    """Test questions with tools per group."""

    def check(self) -> None:
        """Raise UserError for a size out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                not field.name.startswith("n_") or 1 <= value <= 10_000_000,
                f"--{field.name} {value}: must be 1 to 10,000,000",
            )
