"""The flags of stages that mix in what the model knew before."""

import os
from dataclasses import dataclass

from minillm.cli.arguments import SFTArguments
from minillm.cli.command_line import require
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.split import DataFiles


@dataclass(frozen=True, kw_only=True)
class ReplayArguments(SFTArguments):
    """Fine-tuning with old conversations among the new ones; see ``minillm.data.ReplayRows``."""

    replay_path: str = ""
    """Conversations of what the model knew before, mixed in so that it is not forgotten."""
    replay_ratio: float = 0.25
    """Share of their rows in an epoch."""

    def check(self) -> None:
        """Raise ``UserError`` for a share out of range or a file that is not there."""
        super().check()
        require(0 < self.replay_ratio < 1, f"--replay_ratio {self.replay_ratio}: must lie between 0 and 1")
        for path in self.replay_files:
            require(os.path.isfile(path), f"--replay_path {path}: no such file")

    @property
    def replay_files(self) -> list[str]:
        """Return the files of ``--replay_path``."""
        return [str(file) for file in expand_paths(self.replay_path)]

    @property
    def replay_data(self) -> DataFiles:
        """Return the records of ``--replay_path``."""
        return DataFiles(self.replay_files, columns=self.columns)
