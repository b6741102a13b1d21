"""The settings of a preparation: one flag each, with its limit. A rule whose flag is not given is off."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from minillm.data.sources.columns import parse_columns
from minillm.errors import UserError

NOT_IN_REPORT = ("num_workers", "overwrite", "work_dir")  # they do not change the result
OUTPUT_SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Clean, deduplicate, decontaminate, mix and split data files. Writes OUTPUT (.jsonl), and next to it
    OUTPUT.report.json, OUTPUT.dropped.jsonl.gz with the reason of each dropped record, and, with --valid_ratio, the
    held-out records as *_valid.jsonl."""

    data_path: str
    """Data files, separated by commas; also directories and patterns such as raw/*.jsonl. A number after a colon is the
    share of the output: zh.jsonl:0.7,en.jsonl:0.3."""
    output: str
    """The training file to write, ending in .jsonl."""
    kind: Literal["auto", "text", "chat", "preference", "judged"] = "auto"
    """Kind of the records; others are dropped (auto: that of the first record)."""
    columns: str = ""
    """The files' names for our keys: prompt=question,completion=answer."""
    encoding: str = "utf-8"
    """Encoding of the text files, such as gb18030 (also reads GBK and GB2312) or utf-16."""
    overwrite: bool = False
    """Replace an existing output."""
    num_workers: int = 0
    """Processes that clean and compare texts (0: this one alone). The output does not depend on it."""
    work_dir: str = ""
    """Directory for temporary files, about as large as the output (default: next to the output)."""

    keep_control_characters: bool = False
    """Keep control characters and Windows line ends."""
    strip_html: bool = False
    """Remove HTML tags and decode entities."""
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode form of the texts. nfkc also turns full-width letters and punctuation into ASCII."""

    min_characters: int = 0
    """Drop records with fewer characters, of all turns together."""
    max_characters: int = 0
    """Drop records with more characters (0: no limit)."""
    min_tokens: int = 0
    """Drop records with fewer tokens; needs --tokenizer_path."""
    max_tokens: int = 0
    """Drop records with more tokens (0: no limit); needs --tokenizer_path."""
    tokenizer_path: str = ""
    """Directory with tokenizer.json, to count tokens."""
    language: Literal["", "zh", "latin"] = ""
    """Drop records that are mostly in another script: zh counts Chinese characters, latin Latin letters."""
    language_share: float = 0.5
    """Share of the letters that must be of --language."""
    max_duplicate_lines: float = 1.0
    """Drop records in which a larger share of the lines repeats an earlier one (Gopher: 0.3; 1: no limit)."""
    max_duplicate_ngrams: float = 1.0
    """Drop records in which a larger share of the text repeats earlier runs of 10 words or Chinese characters
    (Gopher: 0.1; 1: no limit)."""

    exact_duplicates: Literal["drop", "keep"] = "drop"
    """Drop records whose text equals that of an earlier record, apart from upper case and white space."""
    near_duplicates: Literal["drop", "keep"] = "keep"
    """Drop records that resemble an earlier record; needs pip install rensa."""
    near_threshold: float = 0.8
    """Least similarity (Jaccard index of runs of 5 words or Chinese characters) of a near duplicate."""
    against: str = ""
    """Files whose records must not be in the output, such as a validation file: duplicates of them are dropped."""
    eval_files: str = ""
    """Evaluation files: records that contain one of their questions are dropped."""
    eval_ngram: int = 13
    """Words or Chinese characters in a row that a record must share with a question, or a held-out record with
    another."""

    weight_unit: Literal["characters", "bytes", "tokens", "records"] = "characters"
    """What the shares of --data_path are counted in."""
    mix_size: str = "smallest"
    """Size of a mixture: smallest (no record is repeated), largest (every record is used, small files are repeated), or
    a number of --weight_unit."""
    max_records: int = 0
    """Keep a random sample of so many records (0: all)."""
    valid_ratio: float = 0.0
    """Share of the records to hold out as *_valid.jsonl, chosen by a hash of their content."""
    valid_overlap: Literal["report", "drop", "move", "ignore"] = "report"
    """Held-out records that share a passage (--eval_ngram) with a training record: count them, drop them, or move them
    to the training file; ignore does not look for them."""
    shuffle: bool = False
    """Shuffle the output. A mixture is always shuffled."""
    seed: int = 42
    """Seed of samples and of the shuffled order."""
    keep_dropped: bool = True
    """Write the dropped records to OUTPUT.dropped.jsonl.gz."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        if not self.output.endswith(OUTPUT_SUFFIX):
            raise UserError(f"--output {self.output}: must end in {OUTPUT_SUFFIX}, e.g. data/pretrain.jsonl")
        for name in ("min_characters", "max_characters", "min_tokens", "max_tokens", "max_records", "num_workers"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        for unit in ("characters", "tokens"):
            longest = getattr(self, f"max_{unit}")
            shortest = getattr(self, f"min_{unit}")
            self._require(f"min_{unit}", not longest or shortest <= longest, f"is above --max_{unit} {longest}")
        for name in ("language_share", "max_duplicate_lines", "max_duplicate_ngrams"):
            self._require(name, 0 <= getattr(self, name) <= 1, "is a share: from 0 to 1")
        self._require("near_threshold", 0 < self.near_threshold <= 1, "must be above 0 and at most 1")
        self._require("eval_ngram", self.eval_ngram >= 1, "must be at least 1")
        self._require("seed", 0 <= self.seed < 2**64, "must be from 0 to 2^64 - 1")
        self._require("valid_ratio", 0 <= self.valid_ratio < 1, "must be at least 0 and below 1, e.g. 0.01")
        self._require(
            "valid_overlap",
            bool(self.valid_ratio) or self.valid_overlap not in ("drop", "move"),
            "no record is held out; give --valid_ratio, e.g. 0.01",
        )
        if self.mix_size not in ("smallest", "largest"):
            is_size = self.mix_size.isdecimal() and int(self.mix_size) > 0
            self._require("mix_size", is_size, "allowed: smallest, largest, or a whole number above 0")
        if self.counts_tokens and not self.tokenizer_path:
            raise UserError("tokens are to be counted: give --tokenizer_path a directory with tokenizer.json")
        try:
            "".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise UserError(f"--encoding {self.encoding}: unknown; for example utf-8, gb18030, utf-16, big5") from None
        parse_columns(self.columns)

    def _require(self, name: str, condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"--{name} {getattr(self, name)}: {message}")

    @property
    def counts_tokens(self) -> bool:
        """Whether a rule or the mixture needs the number of tokens."""
        return bool(self.min_tokens or self.max_tokens or self.weight_unit == "tokens")

    @property
    def paths(self) -> dict[str, Path]:
        """The files that a preparation can write, by their role."""
        train = Path(self.output)
        names = {
            "valid": "_valid.jsonl",
            "dropped": ".dropped.jsonl.gz",
            "report": ".report.json",
        }  # the report is last
        stem = train.name.removesuffix(OUTPUT_SUFFIX)
        return {"train": train} | {role: train.with_name(stem + ending) for role, ending in names.items()}

    @property
    def written_paths(self) -> dict[str, Path]:
        """The files that this preparation writes, by their role."""
        is_written = {"valid": bool(self.valid_ratio), "dropped": self.keep_dropped}
        return {role: path for role, path in self.paths.items() if is_written.get(role, True)}

    def as_dict(self) -> dict:
        """Return the settings that decide the result, by name."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_REPORT}
