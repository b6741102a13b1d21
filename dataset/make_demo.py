"""Write the demo world: ``python dataset/make_demo.py [--out_dir dataset/demo] [--seed 42] [--n_... N]``

It writes pretraining text with the exact log-probability of every record, conversations with answers that can be
checked, an identity set, preference pairs, reasoning problems and conversations with tools, each with held-out sets.
``dataset/README.md`` describes the files. No network is needed; the same seed and sizes give the same bytes on every
machine.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent)) if p not in sys.path]

from demo_world.arguments import DemoDataArguments  # noqa: E402
from demo_world.grammar import Draw, Source  # noqa: E402
from demo_world.identity import identity_records  # noqa: E402
from demo_world.items import COUNT_LENGTHS, HELD_OUT_ONE_IN, SORT_LENGTHS, Items  # noqa: E402
from demo_world.tasks import OPEN_TASKS, TASKS, Tasks, reason_records, without_reasons  # noqa: E402
from demo_world.tool_use import ToolTasks, notes  # noqa: E402
from demo_world.world import make_world  # noqa: E402

from minillm.cli.command_line import parse, script  # noqa: E402
from minillm.errors import UserError  # noqa: E402


def make_files(args: DemoDataArguments) -> tuple[dict[str, list[dict]], dict]:
    """Return (file name -> records, meta). Each file has its own random generator, seeded with its name.

    A record of the file ``notes`` is a line of text.
    """
    stream = lambda name: random.Random(f"{name} {args.seed}")  # noqa: E731
    world, items = make_world(args.seed), Items(args.seed)
    source, tasks = Source(world, items), Tasks(world, items)

    def documents(name: str, n: int) -> list[dict]:
        draw = Draw(stream(name))
        return [source.sample(draw) for _ in range(n)]

    def conversations(name: str, split: str, counts: dict[str, int]) -> list[dict]:
        rng = stream(name)
        records = [tasks.record(task, split, rng) for task, n in counts.items() for _ in range(n)]
        rng.shuffle(records)
        return records

    sft_counts = {task: getattr(args, f"n_{task}") for task in TASKS}
    closed = [task for task in TASKS if task not in OPEN_TASKS]
    valid_counts = dict.fromkeys(closed, max(1, args.n_sft_valid // len(closed)))
    files = {
        "pretrain_train": documents("pretrain_train", args.n_pretrain),
        "pretrain_valid": documents("pretrain_valid", args.n_valid),
        "sft_train": conversations("sft_train", "train", sft_counts),
        "sft_valid": conversations("sft_valid", "valid", valid_counts),
        "sft_test": tasks.test_records(args.n_test, stream("sft_test")),
        "dpo_train": tasks.pairs("train"),
        "dpo_test": tasks.pairs("test"),
    }
    files["identity_train"], files["identity_test"] = identity_records()
    files["reason_train"], files["reason_test"] = reason_records(args.n_reason, args.n_reason_test, stream("reason"))
    files["direct_train"] = without_reasons(files["reason_train"])
    tool_tasks, rng = ToolTasks(tasks), stream("tools_train")
    files["tools_train"] = [tool_tasks.record("train", rng) for _ in range(args.n_tools)]
    files["tools_train"] += rng.sample(files["sft_train"], min(args.n_tools_replay, len(files["sft_train"])))
    rng.shuffle(files["tools_train"])
    files["tools_test"] = tool_tasks.test_records(args.n_tools_test, stream("tools_test"))
    files["notes"] = [{"text": line} for line in notes(stream("notes"))]
    meta = {
        "seed": args.seed,
        "records": {name: len(records) for name, records in files.items()},
        "sft_train_per_task": sft_counts,
        "document_shares": source.kinds,
        "floor": floors(files["pretrain_valid"]),
        "held_out": held_out_rules(items, tasks),
    }
    return files, meta


def floors(records: list[dict]) -> dict[str, dict]:
    """Return the entropy floor of each kind and of "all": in nats, and per document and per byte.

    The floor is -sum(log_prob): a model's total loss is below it only by chance. Bytes are those of the UTF-8 text;
    the end of a document has nats but no byte.
    """
    totals: dict[str, list] = {}
    for record in records:
        for kind in (record["kind"], "all"):
            row = totals.setdefault(kind, [0, 0.0, 0])
            row[0] += 1
            row[1] -= record["log_prob"]
            row[2] += len(record["text"].encode())
    return {
        kind: {
            "documents": n,
            "bytes": n_bytes,
            "nats": round(nats, 6),
            "nats_per_document": round(nats / n, 6),
            "nats_per_byte": round(nats / n_bytes, 6),
        }
        for kind, (n, nats, n_bytes) in sorted(totals.items())
    }


def held_out_rules(items: Items, tasks: Tasks) -> dict:
    """Return what the test files hold out, in words and numbers."""
    return {
        "addition": f"{len(items.held_sums)} of 8,100 sums (and mirrors) in no training or pretraining text",
        "sorting": f"one list in {HELD_OUT_ONE_IN} by hash, likewise; lengths {SORT_LENGTHS}",
        "counting": f"one string in {HELD_OUT_ONE_IN} by hash, likewise; lengths {COUNT_LENGTHS}",
        "translation": f"{len(tasks.words['test'])} words never asked in SFT, paired in the pretraining text",
        "facts asked": "asked in SFT, here in other phrasings",
        "facts derived": f"{len(tasks.facts['test'])} facts never asked in SFT, told in the pretraining text",
        "multi_turn": "pairs (name, word) and triples (amount, amount, thing) that SFT never combines",
        "identity": "two questions per topic and language",
        "dpo": f"{len(tasks.pair_facts['test'] + tasks.pair_facts['valid'])} facts in no training pair",
        "reason": "other problems",
        "tools": "other numbers, owners of numbers and openings of questions",
        "phrasings": "every prompt of sft_test begins in a way that no training prompt of its task does",
    }


def write_files(out_dir: str | Path, files: dict[str, list[dict]], meta: dict) -> None:
    """Write all files or none: each has a temporary name until all are complete.

    Raises:
        UserError: the folder cannot be made or written.
    """
    out = Path(out_dir)
    temporary: dict[Path, Path] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        texts = {file_name(name): (_line(r) for r in records) for name, records in files.items() if name != "notes"}
        texts[file_name("notes")] = (record["text"] + "\n" for record in files.get("notes", ()))
        texts["meta.json"] = iter([json.dumps(meta, ensure_ascii=False, indent=2) + "\n"])
        for name, lines in texts.items():
            handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=out)
            temporary[Path(path)] = out / name
            with open(handle, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            os.chmod(path, 0o644)
        for path, final in temporary.items():
            os.replace(path, final)
    except OSError as error:
        raise UserError(
            f"--out_dir {out}: cannot write ({error.strerror}); choose a folder you may write to"
        ) from error
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()


def file_name(name: str) -> str:
    """Return the name of the file that holds these records: the notes are plain text."""
    return f"{name}.txt" if name == "notes" else f"{name}.jsonl"


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(DemoDataArguments, argv)
    started = time.perf_counter()
    files, meta = make_files(args)
    write_files(args.out_dir, files, meta)
    print(f"wrote {args.out_dir} in {time.perf_counter() - started:.1f} s (seed {args.seed})")
    for name, n in meta["records"].items():
        print(f"  {file_name(name):22s} {n:8,d} records")
    print("entropy floor of pretrain_valid.jsonl, nats per byte:")
    for kind, row in meta["floor"].items():
        print(f"  {kind:12s} {row['nats_per_byte']:.4f}   ({row['documents']:,} documents)")


if __name__ == "__main__":
    main()
