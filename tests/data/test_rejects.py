import json
from pathlib import Path

import pytest

from minillm.data.sources.rejects import check_rejected, count_reasons, publish_rejected, reject_line
from minillm.errors import UserError


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


def test_reasons_are_counted_by_their_kind_and_name_the_first_example():
    one = [reject_line(line, f"message {line} has the unknown role 'x'", "raw") for line in (3, 5, 8)]
    other = [reject_line(2, "text is empty"), reject_line(9, "message 4 has the unknown role 'y'")]
    assert count_reasons([(Path("a.jsonl"), other), (Path("b.jsonl"), one)]) == [
        {"count": 4, "reason": "message 4 has the unknown role 'y'", "first": "a.jsonl:9"},
        {"count": 1, "reason": "text is empty", "first": "a.jsonl:2"},
    ]


@pytest.mark.parametrize("n_records, n_rejected, ends", [(20, 0, False), (20, 2, False), (20, 3, True), (3, 1, True)])
def test_more_than_a_tenth_ends_the_run(n_records, n_rejected, ends):
    reasons = [{"count": n_rejected, "reason": "text is empty", "first": "a.jsonl:7"}]
    summary = {"records": n_records, "rejected": n_rejected, "reasons": reasons, "rejected_files": ["a.rejected.jsonl"]}
    check_rejected(summary, flag="--data_path", allow=True)
    if not ends:
        return check_rejected(summary, flag="--data_path", allow=False)
    with pytest.raises(UserError) as error:
        check_rejected(summary, flag="--data_path", allow=False)
    text = str(error.value)
    for words in ("--data_path", f"{n_rejected} of {n_records}", f"({n_rejected / n_records:.0%})", "text is empty",
                  "a.jsonl:7", "a.rejected.jsonl", "--allow_rejected"):  # fmt: skip
        assert words in text
