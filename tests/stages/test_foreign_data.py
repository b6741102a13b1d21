"""Scripts on data as other projects write it: folders, arrays, tables, other names for columns."""

import csv
import json

import torch

import train_pretrain
import train_sft
import train_tokenizer
from minillm.hub.huggingface import load_model

from .conftest import sentence

SMALL = ["--max_seq_len", "200", "--batch_size", "2", "--max_steps", "2", "--from_weight", ""]


def asked(number: int) -> tuple[str, str]:
    return sentence(number, 1 + number % 5), sentence(number + 3, 1 + number % 7)


def write_json(path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_table(path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def test_a_folder_of_arrays_and_tables_trains_as_its_messages_do(world, call):
    folder = world.folder / "raw, as found"  # a comma in a name
    folder.mkdir()
    rows = [{"who": "x", "ask": question, "reply": answer} for question, answer in map(asked, range(12))]
    write_json(folder / "a.json", rows[:5])
    write_table(folder / "b.csv", rows[5:])
    write_json(folder / "dataset_info.json", {"a": {"file_name": "a.json"}})
    argv = [*SMALL, "--data_path", folder, "--valid_path", folder / "*.csv", "--columns", "prompt=ask,completion=reply"]
    done = call(train_sft.main, world, *argv)
    assert done.code == 0, done.err
    weights = load_model(world.out / "full_sft_32").state_dict()

    talks = [
        {"messages": [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["reply"]}]}
        for row in rows
    ]
    parts = [world.write(world.folder / f"{n}.jsonl", part) for n, part in enumerate((talks[:5], talks[5:]))]
    argv = [*SMALL, "--data_path", ",".join(map(str, parts)), "--valid_path", parts[1], "--overwrite"]
    done = call(train_sft.main, world, *argv)
    assert done.code == 0, done.err
    for name, weight in load_model(world.out / "full_sft_32").state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_column_that_nobody_knows_ends_before_the_run(world, call):
    done = call(train_sft.main, world, *SMALL, "--data_path", world.chat, "--columns", "ask=prompt")
    assert done.code == 2
    assert "'ask' is not a name of ours; known: text, " in done.err
    assert not (world.out / "full_sft_32").exists()


def test_judged_answers_are_not_learned_as_good_ones(world, call):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad answer"}]
    write_json(world.folder / "kto.json", [{"messages": turns, "label": False}, {"messages": turns, "label": True}])
    done = call(train_sft.main, world, *SMALL, "--data_path", world.folder / "kto.json")
    assert done.code == 2
    assert "a judged record, where chat records are expected: it is data for train_dpo.py --loss_type kto" in done.err


def test_texts_of_a_table_make_a_tokenizer_and_a_model(world, call, capsys):
    write_table(world.folder / "web.csv", [{"url": "u", "content": sentence(n, 20)} for n in range(60)])
    data = ["--data_path", str(world.folder / "web.csv"), "--columns", "text=content"]
    train_tokenizer.main([*data, "--save_dir", str(world.out), "--vocab_size", "300"])
    assert "trained 300 tokens" in capsys.readouterr().out
    done = call(train_pretrain.main, world, *data, "--max_seq_len", "32", "--max_steps", "1")
    assert done.code == 0, done.err
