"""The names under which training data is looked for in ``dataset/`` when no ``--data_path`` is given."""

from pathlib import Path

from minillm.data.sources.files import SUFFIXES

DEMO_DATA = "dataset/demo"  # where dataset/make_demo.py writes
HELD_OUT = ("valid", "test", "eval")  # a file whose name has one of these is not training data
KNOWN_NAMES = {
    "pretrain": ("pretrain*",),
    "sft": ("sft*",),
    "lora": ("lora_*",),
    "dpo": ("dpo*",),
    "reason": ("r1_mix*",),
    "distill": ("sft*", "pretrain*"),
    "tokenizer": ("pretrain*", "sft*"),
}  # by stage, the first one first; dataset/README.md has this table too


def find_known_data(stage: str, *, directory: str | Path = "dataset") -> str | None:
    """Return the first file in ``directory`` with a known name for ``stage``, or None; held-out files do not count."""
    for pattern in KNOWN_NAMES[stage]:
        for path in sorted(Path(directory).glob(pattern)):
            stem = path.name.partition(".")[0].lower()
            usable = path.is_file() and path.name.endswith(SUFFIXES) and not path.name.endswith(".rejected.jsonl")
            if usable and not any(word in stem for word in HELD_OUT):
                return str(path)
    return None
