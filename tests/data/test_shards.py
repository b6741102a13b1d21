import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from minillm.data import ChatRows, DataFiles, PairRows, TextRows
from minillm.data.cache import tokenise
from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.errors import UserError
from minillm.tokenizer.chat import encode_chat


def shards_in(cache):
    """What lies in a cache besides the hashes of files, which are remembered once a file is ten seconds old."""
    return [path for path in cache.iterdir() if path.name != "file_hashes"]


def test_texts_are_stored_between_end_tokens(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t, "log_prob": -float(n)} for n, t in enumerate(texts)])
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    eos = tokenizer.eos_token_id
    for n, text in enumerate(texts):
        stored = shard.tokens[shard.offsets[n] : shard.offsets[n + 1]]
        assert stored.tolist() == [eos, *tokenizer.encode(text), eos]
        assert (shard.bytes[n], shard.lines[n], shard.log_prob[n]) == (len(text.encode()), n + 1, -n)
    assert shard.tokens.dtype == np.uint16
    assert shard.mask is None
    assert TokenStore([shard]).log_prob() == -sum(range(len(texts)))


def test_conversations_are_stored_with_their_mask(write, talks, tokenizer, tmp_path):
    (shard,) = tokenise_files(
        write("a.jsonl", [{"messages": t} for t in talks]), tokenizer, kind="chat", cache_dir=tmp_path
    )
    for n, talk in enumerate(talks):
        here = slice(shard.offsets[n], shard.offsets[n + 1])
        assert (shard.tokens[here].tolist(), shard.mask[here].tolist()) == encode_chat(tokenizer, talk)
    assert TokenStore([shard]).log_prob() is None


def test_chunks_change_nothing_and_are_bounded(write, texts, tokenizer, tmp_path, monkeypatch):
    path = write("a.jsonl", [{"text": t} for t in texts])
    (whole,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    sizes = []

    class Spy:
        vocab_size, document, document_hash = tokenizer.vocab_size, tokenizer.document, "spy"

        def encode_batch(self, batch):
            sizes.append(sum(map(len, batch)))
            return tokenizer.encode_batch(batch)

    monkeypatch.setattr(tokenise, "CHUNK_CHARS", 500)
    (pieces,) = tokenise_files(path, Spy(), kind="text", cache_dir=tmp_path / "c")
    assert len(sizes) > 5
    assert max(sizes) < 500 + max(map(len, texts))  # the last text of a chunk may reach over
    for name in ("tokens", "offsets", "lines", "bytes"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name))


def test_the_key_follows_content_tokenizer_and_kind(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts])
    cache = tmp_path / "c"
    (first,) = tokenise_files(path, tokenizer, kind="text", cache_dir=cache)
    stamp = os.stat(first.path / "meta.json").st_mtime_ns
    (again,) = tokenise_files(path, tokenizer, kind="text", cache_dir=cache)
    assert (again.path, os.stat(again.path / "meta.json").st_mtime_ns) == (first.path, stamp)
    moved = path.rename(path.with_name("b.jsonl"))
    assert tokenise_files(moved, tokenizer, kind="text", cache_dir=cache)[0].path == first.path
    moved.write_text(moved.read_text("utf-8") + '{"text": "more"}\n', encoding="utf-8")
    assert tokenise_files(moved, tokenizer, kind="text", cache_dir=cache)[0].path != first.path
    assert len(shards_in(cache)) == 2


def test_a_shard_whose_description_changed_is_made_anew(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": "fox"}, {"text": "dog"}])
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    meta, tokens = shard.path / "meta.json", shard.tokens.tolist()
    whole = meta.read_bytes()
    for damage in (b"[]", b"null", b'{"sizes": null}', whole.replace(b'"n_documents": 2', b'"n_documents": 3')):
        meta.write_bytes(damage)
        (again,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
        assert (again.n_documents, again.tokens.tolist()) == (2, tokens)
        assert meta.read_bytes() == whole


def test_large_vocabularies_take_four_bytes(write, tokenizer, tmp_path):
    class Large:
        vocab_size, document_hash = 70_000, "large"
        document = staticmethod(lambda ids: [69_999, *ids, 69_999])
        encode_batch = staticmethod(tokenizer.encode_batch)

    (shard,) = tokenise_files(write("a.jsonl", [{"text": "fox"}]), Large(), kind="text", cache_dir=tmp_path)
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens[0] == 69_999


def test_bad_records_and_wrong_kinds_are_set_aside(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": "fox"}, "{", {"messages": [{"role": "user", "content": "q"}]},
                             '{"text": "\\ud800"}', {"instruction": "q", "output": "a"}])  # fmt: skip
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    assert (shard.n_documents, shard.meta["n_rejected"]) == (1, 4)
    assert sorted(json.loads(line)["line"] for line in shard.rejected_lines()) == [2, 3, 4, 5]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: broken JSON"):  # strict looks at a finished cache, too
        tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c", strict=True)
    with pytest.raises(UserError, match=r"no usable record; the first, line 1: a text record, where chat"):
        tokenise_files(write("b.jsonl", [{"text": "fox"}]), tokenizer, kind="chat", cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob(".*"))  # no half-written leftovers


def test_columns_are_part_of_the_key_and_of_the_hash(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"q": "fox", "good": "the dog", "bad": "the tree"}])
    settings = {"max_seq_len": 50, "cache_dir": tmp_path / "c"}
    names = ["prompt=q,completion=good", "prompt=q,completion=bad", "completion=good,prompt=q"]
    rows = [ChatRows(DataFiles(path, columns=columns), tokenizer, **settings) for columns in names]
    answers = [row[0]["input_ids"].tolist() for row in rows]
    assert answers[0] == answers[2] != answers[1]
    assert rows[0].data_hash != rows[1].data_hash
    assert rows[0].store.shards[0].path == rows[2].store.shards[0].path != rows[1].store.shards[0].path
    pairs = write("b.jsonl", [{"q": "fox", "good": "the dog", "bad": "the tree"}])
    both = [
        PairRows(DataFiles(pairs, columns=f"prompt=q,chosen={one},rejected={other}"), tokenizer, **settings)
        for one, other in (("good", "bad"), ("bad", "good"))
    ]
    assert both[0].data_hash != both[1].data_hash
    texts = [TextRows(DataFiles(path, columns=f"text={name}"), tokenizer, **settings) for name in ("good", "bad")]
    assert texts[0].data_hash != texts[1].data_hash


def test_records_of_another_stage_say_whose_they_are(write, tokenizer, tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = {
        "text": {"text": "t"}, "chat": {"messages": talk}, "judged": {"messages": talk, "label": False},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    }  # fmt: skip
    for kind, record in records.items():
        wanted = "text" if kind == "chat" else "chat"
        stage = {"text": "pretrain", "chat": "sft", "judged": "dpo.py --loss_type kto", "preference": "dpo"}[kind]
        message = f"a {kind} record, where {wanted} records are expected: it is data for train_{stage}"
        with pytest.raises(UserError, match=message):
            tokenise_files(write("a.jsonl", [record]), tokenizer, kind=wanted, cache_dir=tmp_path / "c")


def test_errors(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": "fox"}])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set another --cache_dir"):
        tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "file" / "c")
    with pytest.raises(UserError, match="no such data file"):
        tokenise_files(f"{path},{tmp_path}/none.jsonl", tokenizer, kind="text", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="no data file given"):
        _ = DataFiles(" , ").files
    assert not (tmp_path / "c").exists()


def test_a_damaged_shard_is_made_anew(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": "the little fox"}])
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    before = shard.tokens.tolist()
    (shard.path / "tokens.bin").write_bytes(b"")
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    assert shard.tokens.tolist() == before


def test_a_killed_process_leaves_nothing_that_looks_finished(write, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    path = write("a.jsonl", [{"text": f"the fox {n}"} for n in range(50)])
    code = """
        import sys, time
        from minillm.data import ChatRows, PairRows, TextRows
        from minillm.data.cache import tokenise
        from minillm.tokenizer import load_tokenizer
        tokenise.CHUNK_CHARS = 100
        append = tokenise._ShardWriter.append
        def slow(*args):
            append(*args)
            print("one", flush=True)
            time.sleep(60)
        tokenise._ShardWriter.append = slow
        tokenise.tokenise_files(sys.argv[1], load_tokenizer(sys.argv[2]), kind="text", cache_dir=sys.argv[3])
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), path, tmp_path / "tok", tmp_path / "c"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = shards_in(tmp_path / "c")
    assert len(left) == 1
    assert left[0].name.endswith(".tmp")
    (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    assert shard.n_documents == 50
    assert [p.name for p in shards_in(tmp_path / "c")] == [shard.path.name]  # the orphan is gone as well


def test_several_shards_read_as_one(write, texts, tokenizer, tmp_path):
    one = write("one.jsonl", [{"text": t} for t in texts])
    parts = [write(f"{n}.jsonl", [{"text": t} for t in texts[n * 10 : n * 10 + 10]]) for n in range(4)]
    whole = TokenStore(tokenise_files(one, tokenizer, kind="text", cache_dir=tmp_path / "c"))
    split = TokenStore(tokenise_files(",".join(map(str, parts)), tokenizer, kind="text", cache_dir=tmp_path / "c"))
    assert np.array_equal(whole.offsets, split.offsets)
    index = np.random.default_rng(0).integers(0, whole.n_tokens, 500)
    assert np.array_equal(whole.gather("tokens", index), split.gather("tokens", index))
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(copy.gather("tokens", index), split.gather("tokens", index))
    assert len(pickle.dumps(split)) < 6000  # paths, not arrays


def test_speed_of_a_finished_cache(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts] * 50)
    tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    began = time.perf_counter()
    tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    assert time.perf_counter() - began < 0.5


def test_a_large_file_is_announced_where_no_bar_can_be_shown(write, texts, tokenizer, tmp_path, capsys, monkeypatch):
    path = write("a.jsonl", [{"text": text} for text in texts])
    size = path.stat().st_size
    monkeypatch.setattr(tokenise, "LARGE_FILE", size + 1)
    tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "small")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(tokenise, "LARGE_FILE", size)
    tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "large")
    assert capsys.readouterr() == (f"tokenising {path} ({size / 2**20:,.0f} MiB)\n", "")


def test_at_a_terminal_the_bar_of_a_large_file_counts_its_bytes(write, texts, tokenizer, tmp_path, capsys, monkeypatch):
    path = write("a.jsonl", ["{", *({"text": text} for text in texts)])
    bars, real = [], tokenise.progress

    def progress(**settings):
        bars.append(real(**settings, delay=0, mininterval=0))
        return bars[-1]

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr(tokenise, "progress", progress)
    monkeypatch.setattr(tokenise, "CHUNK_RECORDS", 7)
    monkeypatch.setattr(tokenise, "LARGE_FILE", 1)
    tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
    (bar,) = bars
    assert bar.n == bar.total == path.stat().st_size
    assert "tokenising a.jsonl:  20%" in capsys.readouterr().err  # at line 8 of 41: the first is bad
