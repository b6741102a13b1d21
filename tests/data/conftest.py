import json

import pytest

from minillm.tokenizer import train_bpe

TEXT = "the little fox saw 12 apples and the old dog had 345 pears under a tree near the river"
WORDS = TEXT.split(" ")


def sentence(n: int, length: int) -> str:
    return " ".join(WORDS[(n * 7 + i * (n % 5 + 1)) % len(WORDS)] for i in range(length)) + ". 小明有苹果。"


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe((sentence(n, 20) for n in range(200)), vocab_size=320)


@pytest.fixture
def write(tmp_path):
    """write(name, records) → path of a JSON Lines file; strings among the records are written as they are."""

    def write(name, records):
        path = tmp_path / name
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts():
    """40 documents of 1 to 60 words."""
    return [sentence(n, 1 + n * 13 % 60) for n in range(40)]


@pytest.fixture
def talks():
    """30 conversations of 1 to 4 turns, some with a system turn."""
    out = []
    for n in range(30):
        messages = [{"role": "system", "content": "be brief"}] if n % 4 == 0 else []
        for turn in range(1 + n % 4):
            messages.append({"role": "user", "content": sentence(n + turn, 1 + (n * 5 + turn) % 12)})
            messages.append({"role": "assistant", "content": sentence(n * 3 + turn, 1 + (n * 3 + turn) % 9)})
        out.append(messages)
    return out
