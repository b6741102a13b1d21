"""Counts of a preparation: records by rule, with examples; the table at the end."""

from minillm.data.prepare.one_record import EXCERPT, Outcome
from minillm.data.prepare.rules import CHANGES
from minillm.data.prepare.store import RULES

N_EXAMPLES = 3  # of each rule
N_REPEATS = 4  # epochs up to which repeated data is about as good as new (Muennighoff et al. 2023, arXiv:2305.16264)


class Counts:
    """Counts what happens to the records."""

    def __init__(self):
        self.read = self.reference = 0
        self.changed = dict.fromkeys(CHANGES, 0)
        self.dropped = dict.fromkeys(RULES[1:], 0)
        self.examples: dict[str, list[dict]] = {}

    def add(self, outcomes: list[Outcome], names: list[str], *, n_reference_files: int) -> None:
        """Count records that were read, and the changes to them; ``names`` are those of the files."""
        for outcome in outcomes:
            if outcome.file_index < n_reference_files:
                self.reference += 1
                continue
            self.read += 1
            for rule, before, after in outcome.changes:
                self.changed[rule] += 1
                where = {"file": names[outcome.file_index], "line": outcome.line_number}
                self._example(rule, where | {"before": before, "after": after})

    def drop(self, rule: str, entry: dict) -> None:
        """Count a dropped record; ``entry`` is its line in the file of dropped records."""
        self.dropped[rule] += 1
        text = str(entry.get("record", entry.get("raw", "")))
        example = {key: item for key, item in entry.items() if key not in ("rule", "record", "raw")}
        self._example(rule, example | {"begins": text[:EXCERPT]})

    def _example(self, rule: str, example: dict) -> None:
        examples = self.examples.setdefault(rule, [])
        if len(examples) < N_EXAMPLES:
            examples.append(example)

    def as_dict(self) -> dict:
        """Return the counts of all rules that met a record, and the examples."""
        parts = {"changed": self.changed, "dropped": self.dropped}
        met = {name: {rule: n for rule, n in part.items() if n} for name, part in parts.items()}
        return {"read": self.read, "reference": self.reference, **met, "examples": self.examples}


def format_counts(report: dict) -> str:
    """Return the table of a report: what was read, what each rule did, what was written."""
    read = report["read"]
    rows = [("read", read, "")]
    if report["reference"]:
        rows.append(("compared with (--against)", report["reference"], ""))
    rows += [(f"  {rule}", n, "changed") for rule, n in report["changed"].items()]
    rows += [(f"  {rule}", n, "dropped") for rule, n in report["dropped"].items()]
    rows += [(path, part["records"], f"written, {part['bytes']:,} bytes") for path, part in report["outputs"].items()]
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{label:{width}}  {n:>12,}  {n / max(1, read):>7.2%}  {note}".rstrip() for label, n, note in rows]
    for entry in report["mixture"]:
        lines.append(
            f"{entry['source']}: {entry['written_share']:.2%} of the {report['settings']['weight_unit']} "
            f"(asked for {entry['share']:.2%}), {entry['written']:,} written of {entry['available']:,} available, "
            + (f"repeated {entry['repeats']:.2f} times" if entry["repeats"] > 1 else "no record twice")
        )
        if entry["repeats"] > N_REPEATS:
            lines.append(f"WARNING: more than {N_REPEATS} repetitions teach little more: give a smaller share")
    if report["questions"]:
        questions = report["questions"]
        lines.append(
            f"{questions['looked_for']:,} evaluation questions looked for; {questions['too_short']:,} are too short "
            "to be told from ordinary text"
        )
    if report["leakage"]:
        lines.append(f"{report['leakage']['exact']:,} records of the training file equal one of the held-out file")
        lines += _describe_passages(report["leakage"]["passages"], report["settings"])
    return "\n".join(lines)


def _describe_passages(passages: dict | None, settings: dict) -> list[str]:
    """Return what the table says about held-out records that share a passage with the training file."""
    if passages is None:
        return []
    n_words = settings["eval_ngram"]
    text = (
        f"{passages['sharing']:,} of {passages['held_out']:,} held-out records "
        f"({passages['sharing'] / max(1, passages['held_out']):.1%}) share {n_words} words or Chinese characters in a "
        f"row with a training record ({passages['too_short']:,} are too short to tell)"
    )
    done = {
        "report": "--valid_overlap drop or move removes them from the held-out file" if passages["sharing"] else "",
        "drop": "they are dropped",
        "move": f"they and those that share one with them, {passages.get('moved', 0):,}, are in the training file",
    }[settings["valid_overlap"]]
    return [f"{text}: {done}" if done else text]
