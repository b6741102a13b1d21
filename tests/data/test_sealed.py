"""What was written comes back; what has changed, by a digit or altogether, does not."""

import json

import pytest

from minillm.data.cache.sealed import read_sealed, write_sealed

CONTENT = {"lengths": [3, 1, 2], "dtype": "float32", "sizes": {"a.bin": 24, "b.bin": 0}, "name": "小明", "none": None}


@pytest.fixture
def path(tmp_path):
    write_sealed(tmp_path / "meta.json", CONTENT)
    return tmp_path / "meta.json"


def test_what_was_written_comes_back(path):
    assert read_sealed(path) == CONTENT
    shown = json.loads(path.read_bytes())  # others may read it as it is
    assert shown.pop("hash")
    assert shown == CONTENT
    path.write_text(json.dumps(json.loads(path.read_bytes())))  # the same values, laid out in another way
    assert read_sealed(path) == CONTENT


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"hash": null}', b'{"hash": "ab"}']
)
def test_other_things_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_sealed(path)


@pytest.mark.parametrize("old, new", [("24", "25"), ("float32", "float16"), ("sizes", "sizer"), ("null", "0")])
def test_a_changed_digit_is_seen(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"meta\.json has changed since it was written"):
        read_sealed(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "meta.json")
