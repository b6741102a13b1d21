"""JSON files that contain their own hash, so that a damaged or edited file is noticed."""

import hashlib
import json
from pathlib import Path


def write_sealed(path: Path, content: dict) -> None:
    """Write ``content`` as JSON, with its hash under ``hash``."""
    path.write_text(json.dumps(content | {"hash": _hash(content)}, indent=1), encoding="utf-8")


def read_sealed(path: Path) -> dict:
    """Return what ``write_sealed`` wrote; OSError if the file is missing, ValueError if it was changed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("hash", None) != _hash(content):
        raise ValueError(f"{path} has changed since it was written")
    return content


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
