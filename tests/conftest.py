"""Tests run on two cores side by side: one thread per process keeps them from fighting."""

import os
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def appears():
    """Return whether words get into a file within 30 s: another process (wandb's) writes it, a moment behind."""

    def wait(words: bytes, path, *, within_s: float = 30) -> bool:
        end = time.monotonic() + within_s
        while words not in path.read_bytes() and time.monotonic() < end:
            time.sleep(0.1)
        return words in path.read_bytes()

    return wait
