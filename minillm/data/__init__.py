"""From data files to batches: records, tokenised shards, packed rows, the batches of each step."""

from minillm.data.batches import StepBatches, collate
from minillm.data.chat import ChatRows
from minillm.data.pairs import JudgedRows, PairRows
from minillm.data.reason_rows import ReasonRows
from minillm.data.records import read_prompts, read_records
from minillm.data.replay import ReplayRows
from minillm.data.schema import Prompt, Record
from minillm.data.sources.split import DataFiles
from minillm.data.text import TextRows

__all__ = [
    "ChatRows", "DataFiles", "JudgedRows", "PairRows", "Prompt", "ReasonRows", "Record", "ReplayRows", "StepBatches",
    "TextRows", "collate", "read_prompts", "read_records",
]  # fmt: skip
