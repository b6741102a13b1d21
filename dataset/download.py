"""Download suites of questions and training sets, with plain HTTP: ``python dataset/download.py ceval cmmlu``

    python dataset/download.py --list                              # what there is, and where it goes
    python dataset/download.py zh --source hf-mirror               # C-Eval, CMMLU, CMath; also en, all
    python dataset/download.py sft_t2t_mini --source modelscope
    python dataset/download.py ORG/DATASET:train.jsonl             # any file of a data set on a hub

An interrupted download is resumed by the same command. A file appears under its name only when it is complete. Where
the publisher's SHA-256 is not known here, that of the first download is recorded in ``download.lock.json`` and checked
from then on. Read the licence of a data set before you use it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE.parent),) if p not in sys.path]

import tyro  # noqa: E402

from minillm.cli.command_line import parse, require, script  # noqa: E402
from minillm.errors import UserError  # noqa: E402
from minillm.files import replace_text, sha256  # noqa: E402

HUBS = {"huggingface": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com"}
MODELSCOPE = "https://www.modelscope.cn"
LOCK = "download.lock.json"
BLOCK = 1 << 20  # bytes read at a time
MAX_WAIT = 30  # seconds between two attempts, at most


@dataclass(frozen=True, kw_only=True)
class DownloadArguments:
    """Download suites of questions and training sets."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of --list, zh, en, all (suites), or ORG/DATASET:FILE."""
    list: bool = False
    """Print what can be downloaded, and end."""
    source: Literal["huggingface", "hf-mirror", "modelscope"] = "huggingface"
    """Where data sets on a hub come from."""
    endpoint: str = ""
    """Another address of a hub, such as that of a mirror."""
    output: str = "dataset"
    """Directory for the files; suites go to eval/ in it."""
    retries: int = 5
    """Attempts after the first one, if the connection fails."""
    timeout: float = 30.0
    """Seconds without an answer after which an attempt has failed."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        require(bool(self.names) or self.list, "give names of what to download; --list prints them")
        require(self.retries >= 0, f"--retries {self.retries}: must be at least 0")
        require(self.timeout > 0, f"--timeout {self.timeout}: must be above 0")
        pattern = r"https?://\S+"
        require(not self.endpoint or bool(re.fullmatch(pattern, self.endpoint)), f"--endpoint {self.endpoint}: no URL")


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to download: on a hub (``repo`` and ``path``) or at a fixed address (``url``)."""

    target: str
    """Path below the output directory."""
    url: str = ""
    repo: str = ""
    path: str = ""
    modelscope: str = ""
    """The same data set on ModelScope; empty: not there."""
    sha256: str = ""
    """Of the publisher's file, where known."""
    unpack: str = ""
    """Directory below the output directory into which an archive is unpacked."""

    def address(self, source: str, endpoint: str = "") -> str:
        """Return the URL of the file.

        Raises:
            UserError: it is not on this hub.
        """
        if self.url:
            return self.url
        if source != "modelscope":
            return f"{(endpoint or HUBS[source]).rstrip('/')}/datasets/{self.repo}/resolve/main/{self.path}"
        if not self.modelscope:
            raise UserError(f"{self.target}: not known on ModelScope; use --source hf-mirror or --source huggingface")
        return f"{(endpoint or MODELSCOPE).rstrip('/')}/datasets/{self.modelscope}/resolve/master/{self.path}"


def _minimind(name: str) -> list[File]:
    hubs = {"repo": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
    return [File(target=f"{name}.jsonl", path=f"{name}.jsonl", **hubs)]


GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
AI2 = "https://s3-us-west-2.amazonaws.com/ai2-website/data"
MOSAIC = "https://storage.googleapis.com/ai2-mosaic/public"
ARC = File(target="eval/ARC-V1-Feb2018.zip", url=f"{AI2}/ARC-V1-Feb2018.zip", unpack="eval/arc")
SUITES_ZH = {
    "ceval": [
        File(target="eval/ceval-exam.zip", repo="ceval/ceval-exam", path="ceval-exam.zip", unpack="eval/ceval"),
    ],
    "cmmlu": [
        File(
            target="eval/cmmlu_v1_0_1.zip",
            repo="haonan-li/cmmlu",
            path="cmmlu_v1_0_1.zip",
            modelscope="modelscope/cmmlu",
            unpack="eval/cmmlu",
        ),
    ],
    "cmath": [
        File(target=f"eval/cmath/{name}.jsonl", repo="weitianwen/cmath", path=f"{name}.jsonl")
        for name in ("cmath_dev", "cmath_test")
    ],
}
SUITES_EN = {
    "mmlu": [File(target="eval/mmlu.tar", repo="cais/mmlu", path="data.tar", unpack="eval/mmlu")],
    "arc_easy": [ARC],
    "arc_challenge": [ARC],
    "openbookqa": [
        File(target="eval/openbookqa.zip", url=f"{AI2}/OpenBookQA-V1-Sep2018.zip", unpack="eval/openbookqa"),
    ],
    "piqa": [
        File(target="eval/piqa.zip", url=f"{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip", unpack="eval/piqa"),
    ],
    "winogrande": [
        File(target="eval/winogrande.zip", url=f"{MOSAIC}/winogrande/winogrande_1.1.zip", unpack="eval/winogrande"),
    ],
    "hellaswag": [
        File(target=f"eval/hellaswag/{name}.jsonl", url=f"{HELLASWAG}/{name}.jsonl")
        for name in ("hellaswag_val", "hellaswag_train")
    ],
    "gsm8k": [
        File(
            target="eval/gsm8k/test.jsonl",
            url=f"{GSM8K}/test.jsonl",
            sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
        File(
            target="eval/gsm8k/train.jsonl",
            url=f"{GSM8K}/train.jsonl",
            sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
    ],
}
TRAINING = {name: _minimind(name) for name in ("pretrain_t2t_mini", "sft_t2t_mini", "dpo", "lora_medical")}
FILES: dict[str, list[File]] = {**SUITES_ZH, **SUITES_EN, **TRAINING}
GROUPS = {"zh": list(SUITES_ZH), "en": list(SUITES_EN), "all": [*SUITES_ZH, *SUITES_EN]}


def choose_files(names: tuple[str, ...]) -> list[File]:
    """Return the files of the names, each once.

    Raises:
        UserError: an unknown name.
    """
    files: dict[str, File] = {}
    for name in names:
        if match := re.fullmatch(r"([\w.-]+/[\w.-]+):([\w./-]+)", name):
            path = PurePosixPath(match[2])
            require(".." not in path.parts and not path.is_absolute(), f"{name}: the file must lie in the data set")
            chosen = [File(target=path.name, repo=match[1], path=match[2], modelscope=match[1])]
        else:
            known = [one for one in GROUPS.get(name, [name]) if one in FILES]
            if not known:
                choices = ", ".join([*GROUPS, *FILES])
                raise UserError(f"nothing is called {name!r}: {choices}, or ORG/DATASET:FILE of a hub")
            chosen = [file for one in known for file in FILES[one]]
        files |= {file.target: file for file in chosen}
    return list(files.values())


class Lock:
    """The file that remembers the SHA-256 and size of each first download."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            _ = [entry["sha256"] for entry in self.entries.values()]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: damaged; remove it to record the checksums anew") from None

    def check(self, target: str, path: Path, *, published: str = "") -> None:
        """Compare the content of ``path`` with what is known of ``target``; record it if nothing is.

        Raises:
            UserError: it differs.
        """
        digest, entry = sha256(path), self.entries.get(target)
        expected = published or (entry or {}).get("sha256", digest)
        if digest != expected:
            who = "the publisher's" if published else f"that of the first download, in {self.path}"
            fix = "" if published else f"; if a new release is meant, remove the entry {target} there"
            raise UserError(
                f"{target}: SHA-256 {digest} is not {expected} ({who}): the file is damaged or has changed. "
                f"Remove it and download it again{fix}"
            )
        if entry is None:
            self.entries[target] = {"sha256": digest, "size": path.stat().st_size}
            replace_text(self.path, json.dumps(dict(sorted(self.entries.items())), indent=2) + "\n")


def download(file: File, *, output: Path, url: str, lock: Lock, retries: int, timeout: float, wait=time.sleep) -> str:
    """Make sure that a file is there, complete and unchanged, and its archive unpacked; return what was done.

    Raises:
        UserError: no connection, no such file on the server, another checksum, no space.
    """
    target = output / file.target
    was_there = target.is_file()
    if not was_there:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        _fetch(url, part, retries=retries, timeout=timeout, wait=wait)
        try:
            lock.check(file.target, part, published=file.sha256)
        except UserError:
            part.unlink()  # the rest of a damaged file would be damaged too
            raise
        _validator(part).unlink(missing_ok=True)
        part.replace(target)
    else:
        lock.check(file.target, target, published=file.sha256)
    if file.unpack and not (output / file.unpack).is_dir():
        unpack(target, output / file.unpack)
        return f"unpacked into {output / file.unpack}"
    return "already there" if was_there else f"{target.stat().st_size:,} bytes"


def _fetch(url: str, part: Path, *, retries: int, timeout: float, wait) -> None:
    """Load ``url`` into ``part``, continuing what is there, in several attempts."""
    for attempt in range(retries + 1):
        try:
            if _continue(url, part, timeout=timeout):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code not in (408, 425, 429) and error.code < 500:
                raise UserError(
                    f"{url}: the server answers {error.code} {error.reason}: the file was moved or needs a login. Get "
                    "it with a browser, or try another --source"
                ) from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", "") or error or type(error).__name__)
        except OSError as error:
            raise UserError(f"{part}: cannot be written ({error.strerror or error})") from None
        if attempt < retries:
            wait(min(MAX_WAIT, 2**attempt))
    n_bytes = f", {part.stat().st_size:,} bytes are kept" if part.is_file() else ""
    raise UserError(
        f"{url}: no success after {retries + 1} attempts ({reason}){n_bytes}. Check the network, repeat the command "
        f"(it resumes); or try --source hf-mirror or modelscope; or copy the file to {part.with_suffix('')} by hand"
    )


def _continue(url: str, part: Path, *, timeout: float) -> bool:
    """Load what is missing of ``part`` in one attempt; return whether it is complete."""
    n_there = part.stat().st_size if part.is_file() else 0
    validator = _validator(part)
    headers = {"User-Agent": "minillm", "Accept-Encoding": "identity"}
    if n_there:
        headers["Range"] = f"bytes={n_there}-"
        if validator.is_file():  # if the file has changed meanwhile, the server sends all of it
            headers["If-Range"] = validator.read_text(encoding="utf-8")
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not n_there:
            raise
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == n_there:
            return True
        part.unlink()  # longer than the file of the server: start over
        return False
    with response:
        sent = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        resumes = response.status == 206 and sent is not None and int(sent[1]) == n_there
        if response.status == 206 and not resumes:
            part.unlink()
            return False
        length = response.headers.get("Content-Length")
        total = int(sent[2]) if resumes else None if length is None else int(length)
        _check_space(part.parent, (total or 0) - (n_there if resumes else 0))
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if tag and not tag.startswith("W/"):
            validator.write_text(tag, encoding="utf-8")
        else:
            validator.unlink(missing_ok=True)
        with part.open("ab" if resumes else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    return total is None or part.stat().st_size == total


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .zip or .tar into a new directory, which appears when it is complete.

    Raises:
        UserError: the archive is damaged, or a file of it would lie elsewhere.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                names = [name for name in opened.namelist() if not name.startswith("__MACOSX/")]
                for name in names:
                    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                        raise UserError(f"{archive}: its file {name} would lie outside of {target}; do not use it")
                opened.extractall(temporary, members=names)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(temporary, filter="data")
        os.chmod(temporary, 0o755)
        temporary.replace(target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and download it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _validator(part: Path) -> Path:
    """Return the file with the server's mark of the version of which ``part`` is a part."""
    return part.with_name(f"{part.name}.version")


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(f"{folder}: {n_bytes:,} bytes are missing and {free:,} are free; use another --output")


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(DownloadArguments, argv)
    output = Path(args.output)
    if args.list:
        for name, files in FILES.items():
            print(f"{name:<18} {', '.join(str(output / (file.unpack or file.target)) for file in files)}")
        return
    files = choose_files(args.names)
    addresses = [file.address(args.source, args.endpoint) for file in files]  # reports what is not on this hub
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = Lock(output / LOCK)
        for file, url in zip(files, addresses, strict=True):
            print(f"{output / file.target} from {url}", flush=True)
            outcome = download(file, output=output, url=url, lock=lock, retries=args.retries, timeout=args.timeout)
            print(f"  {outcome}")
    except OSError as error:  # of the disk: those of the network have become UserErrors
        raise UserError(f"--output {output}: {error.strerror or error}; choose another directory") from None


if __name__ == "__main__":
    main()
