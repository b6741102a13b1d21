"""Property tests: the same examples on every run, unless MINILLM_FUZZ_EXAMPLES asks for more of them, drawn anew."""

import os

import pytest
from hypothesis import HealthCheck, settings

from minillm.tokenizer import train_bpe

settings.register_profile(
    "fuzz",
    deadline=None,  # a slow machine is no bug; what hangs meets the test's timeout
    derandomize="MINILLM_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)

SENTENCES = [
    "the little fox saw 12 apples and the old dog had 345 pears under a tree near the river",
    "小明有三个苹果，小红有12个梨。 user system assistant tool",
]


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe((SENTENCES[n % 2][n % 11 :] for n in range(100)), vocab_size=320)
