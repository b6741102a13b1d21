import csv
import gzip
import io
import json
import tracemalloc

import pytest

from minillm.data.records import read_records
from minillm.data.sources import raw_records
from minillm.data.sources.encodings import guess_encoding
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.raw_records import check_file, read_lines, read_raw
from minillm.errors import UserError

TEXTS = ["狐狸在河边。", 'a "quoted", cell', "two\nlines", "[1, 2]", "end"]


def texts_of(path) -> list[str]:
    return [record.text for record in read_records(path, strict=True)]


def as_csv(rows: list[list[str]], **how) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **how).writerows(rows)
    return file.getvalue()


FORMS = {
    ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=2, ensure_ascii=False),
    ".lines.json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    ".objects.json": "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS),
    ".csv": as_csv([["id", "text"]] + [[str(n), text] for n, text in enumerate(TEXTS)]),
    ".tsv": as_csv([["id", "text"]] + [[str(n), text] for n, text in enumerate(TEXTS)], delimiter="\t"),
}


@pytest.mark.parametrize("end", FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("crlf", [False, True])
def test_every_kind_of_file_says_the_same(tmp_path, end, packed, mark, crlf):
    content = FORMS[end] if "csv" in end or "tsv" in end or not crlf else FORMS[end].replace("\n", "\r\n")
    content = mark + content.encode()
    path = tmp_path / f"a{end}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert texts_of(path) == TEXTS


def test_numbers_are_lines_or_places(tmp_path):
    (tmp_path / "a.csv").write_text(FORMS[".csv"], newline="")
    assert [record.line for record in read_records(tmp_path / "a.csv")] == [2, 3, 4, 6, 7]  # one text has two lines
    (tmp_path / "a.json").write_text(FORMS[".json"])
    assert [record.line for record in read_records(tmp_path / "a.json")] == [1, 2, 3, 4, 5]


def test_bad_records_of_every_kind_are_set_aside(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"text": ""}, 5, {"text": "y", "other": null}]')
    assert [record.line for record in read_records(tmp_path / "a.json")] == [1, 4]
    (tmp_path / "a.csv").write_text("text,n\nx,1\n,2\ny,3,4\nz,5\n")
    assert [record.text for record in read_records(tmp_path / "a.csv")] == ["x", "z"]
    for name, expected in (("a.json", [2, 3]), ("a.csv", [3, 4])):
        aside = [json.loads(line) for line in (tmp_path / f"{name}.rejected.jsonl").read_text().splitlines()]
        assert [entry["line"] for entry in aside] == expected
        assert all(entry["raw"] for entry in aside)
    assert "3 cells, not 2" in aside[1]["reason"]


def test_one_object_is_a_record(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "x"}')
    assert texts_of(tmp_path / "a.json") == ["x"]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="is empty"):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "x"}, {"text": "y"}', r"line 1: broken JSON in or after record 2 \(it is cut off\)"),
        ('[{"text": "x"},\n {"text": "y}]', "line 2: broken JSON in or after record 2"),
        ('[{"text": "x"}\n {"text": "y"}]', r"line 2: broken JSON in or after record 1 \(a comma or \]"),
        ('[{"text": "x"}] {"text": "y"}', "nothing may follow the end of the array"),
        ('{"text": "x"', "record 1"),
        ('[{"text": ' + "9" * 5000 + "}]", "record 1"),
        ("[" * 100_000, "record 1"),
    ],
)
def test_a_broken_array_is_refused_where_it_breaks(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        list(read_raw(tmp_path / "a.json"))
    assert "\n" not in str(refused.value)
    assert ".jsonl" in str(refused.value)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_an_array_reads_the_same_in_chunks_of_any_size(tmp_path, monkeypatch, size):
    values = [{"text": 'a\\"b狐\u2028'}, 12, -0.5e3, True, None, "[{", [], {}, [[{"a": [1]}]], 1234567]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=19), encoding="utf-8")  # blanks longer than a chunk
    monkeypatch.setattr(raw_records, "JSON_CHUNK", size)
    assert [value for _, _, value in read_raw(tmp_path / "a.json")] == values


def test_an_array_of_ten_megabytes_is_read_in_little_memory(tmp_path):
    path, n = tmp_path / "a.json", 2_000
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": f"{n} " + "fox " * 1280}) for n in range(n)) + "]")
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_raw(path)) == n
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_broken_array_is_not_read_to_its_end(tmp_path):
    rest = json.dumps([{"text": "fox " * 100}] * 5000)[1:]
    (tmp_path / "a.json").write_text('[{"text": "x" "y"},' + rest)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="record 1"):
            list(read_raw(tmp_path / "a.json"))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,text\nx,y\n", "two columns are named 'text'"),
        ("a.csv", "text;n\nx;1\n", "separate cells by commas"),
        ("a.csv", 'text\n"never closed\nx\n', "broken table"),
        ("a.tsv", 'text\tn\n"x"y\t1\n', "line 2: broken table"),
        ("a.jsonl", '[{"text": "x"}]\n', "name a file that is one JSON array .json"),
        ("a.jsonl", '[\n{"text": "x"},\n', "name a file that is one JSON array .json"),
        ("a.json", '{"data": [{"text": "x"}]}', "data is a list"),
    ],
)
def test_other_layouts_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / name, strict=True))


# ---- encodings ---------------------------------------------------------------------------------------------------

CHINESE = "第一段:你好,世界。\n\n第二段:狐狸在河边喝水。\n" * 20


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named_at_once(tmp_path, suffix, encoding):
    content = {".jsonl": '{"text": "你好 1"}\n' * 20, ".json": '[{"text": "你好"}]', ".csv": "text\n你好\n"}
    path = tmp_path / f"a{suffix}"
    data = content.get(suffix, CHINESE).encode(encoding)
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    name = encoding.upper()[:6]
    with pytest.raises(UserError, match=rf"a{suffix} is {name}.* text, and UTF-8 is expected: .*iconv -f {name}"):
        read_records(path)


@pytest.mark.parametrize("encoding, name", [("gbk", "GB18030"), ("gb18030", "GB18030"), ("latin-1", "ISO-8859-1")])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json"])
def test_other_encodings_are_refused_with_a_guess(tmp_path, encoding, name, suffix):
    text = "text\nplain\n" + ("déjà vu, à côté\n" if encoding == "latin-1" else CHINESE.replace("\n\n", "\n"))
    if suffix == ".json":
        text = json.dumps([{"text": text}], ensure_ascii=False, indent=1)
    path = tmp_path / f"a b{suffix}"
    path.write_bytes(text.encode(encoding))
    advice = rf"iconv -f {name} -t UTF-8 '.*prepare --encoding {name} "
    with pytest.raises(UserError, match=rf"line \d+: not UTF-8 text: .* looks like {name}.*{advice}"):
        list(read_records(path))
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_a_bad_byte_of_one_line_costs_that_line(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in ("你好吗", "狐狸", "河边")]
    lines[1] = lines[1].replace("狸".encode(), b"\xe7\x8b")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert [record.line for record in read_records(path)] == [1, 3]
    reason = json.loads((tmp_path / "a.jsonl.rejected.jsonl").read_text())["reason"]
    assert reason.startswith("not UTF-8 text: byte 0xe7 at position 14")
    path.write_bytes('{"text": "你好,世界"}\n{"text": "plain"}\n'.encode("gbk"))
    assert texts_of_good(path) == ["plain"]
    assert "GB18030" in json.loads((tmp_path / "a.jsonl.rejected.jsonl").read_text())["reason"]


def test_lines_appended_in_another_encoding_cost_those_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "plain"}\n' * 400 + '{"text": "你好"}\n'.encode("utf-16-le"))
    assert texts_of_good(path) == ["plain"] * 400
    aside = [json.loads(line) for line in (tmp_path / "a.jsonl.rejected.jsonl").read_text().splitlines()]
    assert aside[0]["line"] == 401


def texts_of_good(path) -> list[str]:
    return [record.text for record in read_records(path)]


def test_guesses():
    assert guess_encoding("你好,世界".encode("gbk")) == "GB18030"
    assert guess_encoding("naïve café, vérité".encode("latin-1")) == "ISO-8859-1"
    assert guess_encoding("你好,世界".encode() + b"\xff" + "狐狸".encode()) is None


def test_zero_characters_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\x00\n" + "word " * 1000)
    with pytest.raises(UserError, match=r"a\.txt, line 3: a NUL character"):
        list(read_records(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "fine"}\n')
    assert texts_of_good(tmp_path / "a.jsonl") == ["fine"]
    turns = [{"role": "user", "content": "q\x00"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match="a NUL character"):
        list(read_records(tmp_path / "b.jsonl"))


def test_a_character_cut_at_the_end_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("狐狸".encode()[:-1])
    with pytest.raises(UserError, match="line 1: not UTF-8 text: the file ends within a character"):
        list(read_records(tmp_path / "a.txt"))


def test_lines_of_a_prompt_file(tmp_path):
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \r\nthree")
    assert list(read_lines(tmp_path / "q.txt")) == [(1, "one"), (3, " two "), (4, "three")]


# ---- which files -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    names = ["b.jsonl", "a.json", "c, d.jsonl", "e[1].txt", ".hidden.jsonl", "b.jsonl.rejected.jsonl", "notes.md"]
    for name in [*names, "dataset_info.json", "deep/f.parquet", "deep/g.csv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path, expected",
    [
        ("b.jsonl", ["b.jsonl"]),
        ("b.jsonl, a.json,", ["b.jsonl", "a.json"]),
        (".", ["a.json", "b.jsonl", "c, d.jsonl", "e[1].txt"]),
        ("deep,a.json", ["deep/f.parquet", "deep/g.csv", "a.json"]),
        ("*.json*", ["a.json", "b.jsonl", "c, d.jsonl"]),
        ("**/*.csv", ["deep/g.csv"]),
        ("c, d.jsonl", ["c, d.jsonl"]),  # a name that exists is meant, comma or not
        ("b.jsonl,c, d.jsonl,a.json", ["b.jsonl", "c, d.jsonl", "a.json"]),
        ("e[1].txt", ["e[1].txt"]),
        (["b.jsonl", "c, d.jsonl"], ["b.jsonl", "c, d.jsonl"]),
        ("missing.jsonl,b.jsonl", ["missing.jsonl", "b.jsonl"]),
        (" , ", []),
        ("", []),
    ],
)
def test_paths_are_files_folders_and_patterns(folder, path, expected):
    assert [str(file) for file in expand_paths(path)] == expected
    assert [str(file) for file in expand_paths(expand_paths(path))] == expected


def test_a_whole_name_comes_before_its_parts(folder):
    (folder / "b.jsonl,a.json").write_text("x")
    assert [str(file) for file in expand_paths("b.jsonl,a.json")] == ["b.jsonl,a.json"]


def test_paths_that_name_nothing(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        expand_paths("empty")
    with pytest.raises(UserError, match=r"\*\.parquet matches no data file"):
        expand_paths("*.parquet")
    with pytest.raises(UserError, match="unknown kind of file"):
        check_file("notes.md")
    with pytest.raises(UserError, match="no such data file"):
        read_records("missing.jsonl")


def test_a_folder_is_read_as_one_data_set(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "3"}\n{\n')
    (tmp_path / "a.csv").write_text("text\n1\n2\n")
    for _ in range(2):  # the second time with a file of bad lines beside them
        assert [record.text for record in read_records(tmp_path)] == ["1", "2", "3"]
    assert (tmp_path / "b.jsonl.rejected.jsonl").exists()


def test_a_packed_file_without_its_ending_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl is a gzip file: give it a name that ends in \.gz"):
        list(read_records(path))
