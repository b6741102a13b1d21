"""Which chat templates of published models train here: are ids and answer masks those of transformers and trl?

    python benchmarks/chat_templates.py
    python benchmarks/chat_templates.py --show qwen3

The templates are those of the installed package trl, each with a small tokenizer that has its control tokens. Per
template, several conversations are compared: one and several turns, system messages, thinking, tool calls and declared
tools. ``--show`` prints one conversation of three turns with a call and thinking; the targets are marked.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import write_json
from minillm.cli.command_line import parse, require, script
from minillm.errors import UserError
from minillm.terminal import BLACK_ON_GREEN, DIM, RESET, use_colour
from minillm.tokenizer import encode_chat


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to print."""

    show: str = ""
    """Print a conversation in this template with its targets marked (default: the table of all templates)."""
    output: str = "out/benchmarks/chat_templates.json"
    """JSON file for the table (empty: none)."""

    def check(self) -> None:
        """Raise UserError for an unknown template."""
        from tests.foreign.releases import release_names

        known = release_names()
        require(not self.show or self.show in known, f"--show {self.show}: known are {', '.join(known)}")


def main_table(directory: Path) -> list[dict]:
    """Return a row for each template."""
    from tests.foreign.releases import CONVERSATIONS, FACTS, IMAGES, Facts, compare, open_release, release_names

    rows = []
    for name in release_names():
        release = open_release(name, directory)
        found = {key: compare(release, *conversation) for key, conversation in CONVERSATIONS.items()}
        written = [comparison for comparison in found.values() if not comparison.refused]
        n_equal_masks = sum(comparison.mask_equal is True for comparison in written)
        remarks = [reason.replace("|", "\\|")] if (reason := FACTS.get(name, Facts()).reason) else []
        if name in IMAGES:
            remarks.append("contents are lists of texts and images")
        refused = [key for key, comparison in found.items() if comparison.refused]
        if refused and written:
            remarks.append(f"refused: {', '.join(refused)}")
        has_variant = release.variant is not None
        rows.append(
            {
                "template": name,
                "conversations": f"{len(written)} of {len(found)}",
                "ids equal": f"{sum(comparison.ids_equal for comparison in written)}",
                "mask equal": f"{n_equal_masks}" if has_variant else "no variant",
                "remark": "; ".join(remarks),
            }
        )
    return rows


def format_markdown(rows: list[dict]) -> str:
    """Return the rows as a table in Markdown."""
    head = list(rows[0])
    cells = [head, ["---"] * len(head), *([str(row[column]) for column in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def show(name: str, directory: Path) -> str:
    """Return three turns with a call and thinking, decoded, with the targets marked; less if the template refuses."""
    from tests.foreign.releases import CALL, TOOL, open_release, say

    release = open_release(name, directory)
    call = [say("assistant", "", tool_calls=[CALL]), say("tool", "7", name="lookup", tool_call_id="callabcde")]
    thought = {"reasoning_content": "The user wants the number."}
    question = [say("user", "How many foxes are there?")]
    last = [say("user", "Thanks!"), say("assistant", "You are welcome.")]
    attempts = {
        "three turns with a call and thinking": [
            *question, *call, say("assistant", "Seven.", **thought), *last[:1], last[1] | thought
        ],
        "three turns with a call": [*question, *call, say("assistant", "Seven."), *last],
        "two turns with thinking": [*question, say("assistant", "Seven.", **thought), *last[:1], last[1] | thought],
        "two turns": [*question, say("assistant", "Seven."), *last],
        "one turn": last,
    }  # fmt: skip
    lines = []
    for title, messages in attempts.items():
        try:
            tools = [TOOL] if "call" in title else None
            ids, mask = encode_chat(release.ours, messages, tools=tools)
        except UserError as error:
            lines.append(f"{title}: refused, because {error}")
            continue
        marks = (BLACK_ON_GREEN, RESET), (DIM, RESET)
        marks = marks if use_colour() else (("[[", "]]"), ("", ""))
        text = ""
        for is_target, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
            before, after = marks[0] if is_target else marks[1]
            text += before + release.theirs.decode([token for token, _ in run]) + after
        return "\n".join([*lines, f"{title}; {sum(mask)} of {len(ids)} tokens are targets", "", text])
    return "\n".join(lines)


@script
def main(argv: list[str] | None = None):
    """Print the table, or one conversation."""
    args = parse(Arguments, argv)
    with tempfile.TemporaryDirectory() as directory:
        if args.show:
            print(show(args.show, Path(directory)))
            return
        rows = main_table(Path(directory))
    print(format_markdown(rows))
    if args.output:
        write_json(args.output, {"templates": rows})


if __name__ == "__main__":
    main()
