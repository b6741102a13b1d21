"""Without ``--data_path``: the file names in ``dataset/`` that each stage looks for."""

from pathlib import Path

from minillm.data.sources.paths import SUFFIXES

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
}  # by stage, in order of preference; dataset/README.md has the same table


def find_known_data(stage: str, *, directory: str | Path = "dataset") -> str | None:
    """Return the first file in ``directory`` with a known name for ``stage``, without held-out files; None if none."""
    for pattern in KNOWN_NAMES[stage]:
        for path in sorted(Path(directory).glob(pattern)):
            stem = path.name.partition(".")[0].lower()
            is_data = path.is_file() and path.name.endswith(SUFFIXES) and not path.name.endswith(".rejected.jsonl")
            if is_data and not any(word in stem for word in HELD_OUT):
                return str(path)
    return None
