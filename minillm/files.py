"""Files are written with the mode that the user's umask asks for."""

import os
from pathlib import Path

# Asked once, while the program has one thread: a umask can only be read by setting it.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def use_umask(path: Path) -> None:
    """Give ``path`` the mode of any new file. safetensors makes files that only their owner can read."""
    os.chmod(path, 0o666 & ~_UMASK)
