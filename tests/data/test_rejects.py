import json

from minillm.data.rejects import publish_rejected, reject_line


def test_lines_survive_any_text():
    for raw in ('{"a": "狐"}', "\ud800", "a\u2028b\nc"):
        line = reject_line(4, "why", raw)
        assert line.count("\n") == 1
        assert json.loads(line.encode("utf-8")) == {"line": 4, "reason": "why", "raw": raw}


def test_written_whole_beside_the_file_and_removed_when_stale(tmp_path):
    source = tmp_path / "a.jsonl"
    place = publish_rejected(source, ["1\n", "2\n"], fallback_dir=None)
    assert place == tmp_path / "a.jsonl.rejected.jsonl"
    assert place.read_text() == "1\n2\n"
    assert publish_rejected(source, [], fallback_dir=None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_directory_sends_them_to_the_cache(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    cache.mkdir()
    data.chmod(0o555)
    try:
        place = publish_rejected(data / "a.jsonl", ["1\n"], fallback_dir=cache)
        assert place == cache / "a.jsonl.rejected.jsonl"
        assert list(data.iterdir()) == []
        assert publish_rejected(data / "a.jsonl", ["1\n"], fallback_dir=None) is None
    finally:
        data.chmod(0o755)


def test_an_unwritable_place_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.jsonl.rejected.jsonl").mkdir()  # cannot be replaced by a file
    cache = tmp_path / "cache"
    cache.mkdir()
    assert publish_rejected(tmp_path / "a.jsonl", ["1\n"], fallback_dir=cache).parent == cache
    assert not list(tmp_path.glob(".*"))
