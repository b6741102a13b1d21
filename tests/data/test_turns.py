"""Where the answers are, against a loop over the conversations."""

import pytest

from minillm.data import turns
from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.tokenizer import encode_chat


@pytest.mark.parametrize("scan", [3, 50, 1 << 24])
def test_turns_are_the_stretches_of_the_mask(tokenizer, write, talks, tmp_path, monkeypatch, scan):
    """Over two files, whatever part of the mask is looked at together."""
    monkeypatch.setattr(turns, "CHUNK", scan)
    files = [write("a.jsonl", [{"messages": m} for m in talks[:17]]), write("b.jsonl", [{"messages": talks[17]}])]
    store = TokenStore(tokenise_files(files, tokenizer, kind="chat", cache_dir=tmp_path / "cache"))
    expected = []
    for number, messages in enumerate(talks[:18]):
        _, mask = encode_chat(tokenizer, messages)
        starts = [t for t in range(len(mask)) if mask[t] and not mask[t - 1]]
        ends = [t + 1 for t in range(len(mask)) if mask[t] and (t + 1 == len(mask) or not mask[t + 1])]
        expected += [(number, first, end) for first, end in zip(starts, ends, strict=True)]
    found = list(zip(*(column.tolist() for column in turns.answer_turns(store)), strict=True))
    assert found == expected
