"""Downloads from a server on this machine that breaks off, forgets, changes and refuses."""

import hashlib
import io
import json
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

import download
from download import File, Lock

from minillm.errors import UserError
from minillm.evaluation.suites import SUITES
from minillm.evaluation.suites.table import read_suite
from tests.evaluation.suite_files import EXPECTED, make_originals

CONTENT = bytes(range(256)) * 9000  # more than two blocks


class Server:
    """Serves ``files`` by path; how it misbehaves is in the attributes."""

    def __init__(self):
        self.files = {"/data.bin": CONTENT}
        self.break_after: list[int] = []  # bytes of an answer after which the connection ends, one per answer
        self.statuses: list[int] = []  # answers instead of the file, one per request
        self.ranges = True
        self.tag = '"1"'
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler):
        self.requests.append((handler.path, handler.headers.get("Range")))
        if self.statuses:
            return handler.send_error(self.statuses.pop(0))
        content = self.files.get(handler.path)
        if content is None:
            return handler.send_error(404)
        start = 0
        wanted = handler.headers.get("Range")
        if wanted and self.ranges and handler.headers.get("If-Range") in (None, self.tag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("ETag", self.tag)
        handler.end_headers()
        end = start + self.break_after.pop(0) if self.break_after else len(content)
        handler.wfile.write(content[start:end])
        return None


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


WAITS: list[float] = []


def get(server, folder, *, retries=3, path="/data.bin", **more):
    file = File(target="eval/data.bin", url=server.url + path, **more)
    WAITS.clear()
    settings = {"output": folder, "url": file.url, "lock": Lock(folder / "lock.json")}
    return download.download(file, **settings, retries=retries, timeout=5, wait=WAITS.append)


def names(folder):
    return sorted(path.name for path in (folder / "eval").iterdir())


def test_a_whole_file_and_its_checksum(server, tmp_path):
    assert get(server, tmp_path) == "2,304,000 bytes"
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT
    lock = json.loads((tmp_path / "lock.json").read_text())
    assert lock == {"eval/data.bin": {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}}
    assert names(tmp_path) == ["data.bin"]
    assert get(server, tmp_path) == "already there"
    assert len(server.requests) == 1


def test_an_interrupted_transfer_is_resumed(server, tmp_path):
    server.break_after = [1_000_000, 500_000]
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert WAITS == [1, 2]
    assert names(tmp_path) == ["data.bin"]


def test_the_next_call_resumes(server, tmp_path):
    server.break_after = [700_000]
    with pytest.raises(UserError) as error:
        get(server, tmp_path, retries=0)
    for word in ("1 attempts", "ended early", "700,000 bytes are kept", "repeat the command", str(tmp_path)):
        assert word in str(error.value)
    assert not (tmp_path / "eval/data.bin").exists()
    get(server, tmp_path, retries=0)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=700000-"


def test_a_server_without_ranges_sends_all(server, tmp_path):
    server.break_after, server.ranges = [700_000], False
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT


def test_a_file_that_changed_in_between_is_loaded_whole(server, tmp_path):
    server.break_after = [700_000]
    with pytest.raises(UserError):
        get(server, tmp_path, retries=0)
    server.files["/data.bin"], server.tag = CONTENT[::-1], '"2"'
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT[::-1]


def test_a_part_that_is_complete_or_too_long(server, tmp_path):
    (tmp_path / "eval").mkdir()
    part = tmp_path / "eval/data.bin.part"
    part.write_bytes(CONTENT)
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT
    (tmp_path / "eval/data.bin").unlink()
    part.write_bytes(CONTENT + b"more")
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT


def test_errors_of_the_server(server, tmp_path):
    server.statuses = [503, 429, 500]
    get(server, tmp_path)
    assert (tmp_path / "eval/data.bin").read_bytes() == CONTENT
    (tmp_path / "eval/data.bin").unlink()
    server.requests.clear()
    for path, status, word in (("/none.bin", [], "404"), ("/data.bin", [403], "403")):
        server.statuses = status
        with pytest.raises(UserError, match=word) as error:
            get(server, tmp_path, path=path)
        assert "--source" in str(error.value)
    assert len(server.requests) == 2  # not repeated
    server.statuses = [500] * 9
    with pytest.raises(UserError, match="500"):
        get(server, tmp_path)
    assert WAITS == [1, 2, 4]


def test_checksums(server, tmp_path):
    with pytest.raises(UserError, match="publisher") as error:
        get(server, tmp_path, sha256="0" * 64)
    assert hashlib.sha256(CONTENT).hexdigest() in str(error.value)
    assert names(tmp_path) in ([], ["data.bin.part.version"])  # nothing that looks like the file
    get(server, tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / "eval/data.bin").unlink()
    server.files["/data.bin"] = CONTENT[::-1]
    with pytest.raises(UserError, match="first download"):
        get(server, tmp_path)
    assert not (tmp_path / "eval/data.bin").exists()
    (tmp_path / "eval/data.bin").write_bytes(b"edited")
    with pytest.raises(UserError, match="damaged or has changed"):
        get(server, tmp_path)
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(UserError, match=r"lock.json: damaged"):
        get(server, tmp_path)


def test_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    argv = ["gsm8k", "ORG/DATA:x.jsonl", "--output", str(tmp_path), "--retries", "1", "--timeout", "2"]
    monkeypatch.setattr(download, "FILES", {"gsm8k": [File(target="a", url="http://127.0.0.1:9/a")]})
    with pytest.raises(SystemExit) as end:
        download.main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    for word in ("127.0.0.1:9", "2 attempts", "--source hf-mirror", "by hand", "repeat the command"):
        assert word in err


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in names.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def test_archives(server, tmp_path):
    server.files["/data.bin"] = zipped({"dev/a.csv": "1", "__MACOSX/dev/._a.csv": "2"})
    assert "unpacked" in get(server, tmp_path, unpack="eval/suite")
    assert [path.name for path in (tmp_path / "eval/suite").rglob("*.csv")] == ["a.csv"]
    assert names(tmp_path) == ["data.bin", "suite"]
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("data/test/x.csv")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    other = tmp_path / "tar"
    server.files["/data.bin"] = tar.getvalue()
    get(server, other, unpack="eval/mmlu")
    assert (other / "eval/mmlu/data/test/x.csv").read_text() == "abc"
    for content, word in ((zipped({"../out.txt": "x"}), "outside"), (b"not an archive", "unpacked")):
        folder = tmp_path / f"bad_{word}"
        server.files["/data.bin"] = content
        with pytest.raises(UserError, match=word):
            get(server, folder, unpack="eval/suite")
        assert not (folder / "out.txt").exists()
        assert names(folder) == ["data.bin"]


def test_names_and_addresses(tmp_path, capsys):
    assert {file.target for file in download.choose_files(("zh",))} >= {"eval/ceval-exam.zip", "eval/cmmlu_v1_0_1.zip"}
    assert len(download.choose_files(("arc_easy", "arc_challenge"))) == 1
    (cmmlu,) = download.FILES["cmmlu"]
    assert cmmlu.address("huggingface") == (
        "https://huggingface.co/datasets/haonan-li/cmmlu/resolve/main/cmmlu_v1_0_1.zip"
    )
    assert cmmlu.address("hf-mirror").startswith("https://hf-mirror.com/datasets/haonan-li/")
    assert cmmlu.address("modelscope") == (
        "https://www.modelscope.cn/datasets/modelscope/cmmlu/resolve/master/cmmlu_v1_0_1.zip"
    )
    (any_file,) = download.choose_files(("me/data:sub/train.jsonl",))
    assert (any_file.target, any_file.address("huggingface", "http://here/")) == (
        "train.jsonl",
        "http://here/datasets/me/data/resolve/main/sub/train.jsonl",
    )
    with pytest.raises(UserError, match="not known on ModelScope"):
        download.FILES["ceval"][0].address("modelscope")
    for argv, word in ((["nothing"], "nothing is called 'nothing'"), ([], "--list"), (["a/b:../c"], "must lie"),
                       (["zh", "--retries", "-1"], "--retries -1"), (["zh", "--endpoint", "x"], "no URL")):  # fmt: skip
        with pytest.raises(SystemExit):
            download.main([*argv, "--output", str(tmp_path)])
        assert word in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        download.main(["gsm8k", "--output", str(tmp_path / "file")])
    assert "file: File exists; choose another directory" in capsys.readouterr().err
    download.main(["--list"])
    assert "dataset/eval/ceval" in capsys.readouterr().out.replace("\\", "/")
    assert set(download.GROUPS["all"]) == set(SUITES) - {"gaokao_mcq", "tal_math_zh"}


# What the releases' archives hold: files below a folder of ``make_originals``.
ARCHIVES = {
    "ceval": ("ceval-exam", "*/*.csv"),
    "cmmlu": ("cmmlu", "*/*.csv"),
    "mmlu": ("mmlu", "data/*/*.csv"),
    "arc_easy": ("", "ARC-*/*/*.jsonl"),
    "arc_challenge": ("", "ARC-*/*/*.jsonl"),
    "openbookqa": ("", "OpenBookQA-*/Data/Main/*.jsonl"),
    "piqa": ("", "physicaliqa-train-dev/*"),
    "winogrande": ("", "winogrande_1.1/*.jsonl"),
}


@pytest.mark.parametrize("name", download.GROUPS["all"])
def test_what_is_downloaded_is_found_by_the_suite(server, tmp_path, monkeypatch, name):
    """Through the command line, from archives laid out as the releases are."""
    originals = tmp_path / "originals"
    make_originals(originals)
    (originals / "physicaliqa-train-dev").mkdir()
    for old, new in (("valid.jsonl", "dev.jsonl"), ("valid-labels.lst", "dev-labels.lst")):
        (originals / "physicaliqa-train-dev" / new).write_bytes((originals / "piqa" / old).read_bytes())
    local = []
    for number, file in enumerate(download.FILES[name]):
        if file.unpack:
            base, pattern = ARCHIVES[name]
            paths = [path for path in (originals / base).glob(pattern) if path.is_file()]
            content = zipped({str(path.relative_to(originals / base)): path.read_bytes() for path in paths})
        else:  # some releases have one more file than the originals here
            path = originals / Path(file.target).relative_to("eval")
            content = path.read_bytes() if path.is_file() else b""
        server.files[f"/{number}"] = content
        local.append(File(target=file.target, url=f"{server.url}/{number}", unpack=file.unpack))
    monkeypatch.setattr(download, "FILES", {name: local})
    download.main([name, "--output", str(tmp_path / "dataset")])
    if name == "cmath":
        (tmp_path / "dataset/eval/cmath/cmath_test.jsonl").unlink()
    questions, _, _ = read_suite(SUITES[name], tmp_path / "dataset/eval")
    found = [(q.question, q.choices, q.answer if q.choices else q.final, q.subject) for q in questions]
    assert found == EXPECTED[name]
