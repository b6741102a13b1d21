"""From files to batches: records, tokenised shards, packed rows, steps."""

from minillm.data.batches import StepBatches, collate
from minillm.data.chat import ChatRows
from minillm.data.replay import ReplayRows
from minillm.data.schema import Record, read_records
from minillm.data.text import TextRows

__all__ = ["ChatRows", "Record", "ReplayRows", "StepBatches", "TextRows", "collate", "read_records"]
