"""From raw files to training files:

    python -m minillm.data.prepare --data_path raw/ --output data/text.jsonl --near_duplicates drop --valid_ratio 0.01
    python -m minillm.data.prepare --data_path zh.jsonl:0.7,en.jsonl:0.3 --output data/mixed.jsonl
    python -m minillm.data.prepare --data_path alpaca.json --output data/sft.jsonl --eval_files eval/

What each rule did is in a table at the end; the output's .report.json and .dropped.jsonl.gz have the details.
"""

import signal
import threading

from minillm.cli.command_line import parse, script
from minillm.data.prepare.counts import format_counts
from minillm.data.prepare.run import prepare
from minillm.data.prepare.settings import PrepareSettings


@script
def main(argv: list[str] | None = None) -> dict:
    """Prepare the files and print the table; return the report."""
    settings = parse(PrepareSettings, argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    report = prepare(settings)
    print(format_counts(report))
    if report["dropped"] and "dropped" in settings.written_paths:
        print(f"each dropped record and the reason: {settings.written_paths['dropped']}")
    return report


def _end(number: int, frame) -> None:
    """End as the signal would have, but remove the temporary files first."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
