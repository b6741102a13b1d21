"""--valid_ratio in every stage: what is held out is validated with and never trained on."""

import pytest

import train_distill
import train_dpo
import train_lora
import train_pretrain
import train_reason
import train_sft
from minillm.data import DataFiles, read_records
from minillm.training.run import Run
from minillm.training.state import identity_of

from .conftest import conversations, documents, sentence

FEW = ["--max_seq_len", "200", "--batch_size", "2", "--max_steps", "1", "--save_interval", "0"]
STAGES = {
    "pretrain": (train_pretrain.main, []),
    "sft": (train_sft.main, ["--from_weight", ""]),
    "lora": (train_lora.main, ["--lora_name", "a", "--from_weight", "pretrain"]),
    "dpo": (train_dpo.main, ["--reference", "cached", "--from_weight", "pretrain"]),
    "distill": (train_distill.main, ["--teacher", "pretrain_32", "--top_k", "4"]),
    "reason": (train_reason.main, ["--from_weight", "pretrain"]),
}


def records_of(stage: str) -> list[dict]:
    if stage in ("sft", "lora"):
        return conversations(24)
    if stage == "dpo":
        return [{"prompt": sentence(n, 3), "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(24)]
    if stage == "reason":
        answer = "<think>\nwhy\n</think>\n<answer>\n{}\n</answer>"
        return [{"instruction": f"what is {n}", "output": answer.format(n)} for n in range(24)]
    return documents(24)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_held_out_is_never_trained_on(stage, world, call, monkeypatch):
    main, more = STAGES[stage]
    data = world.write(world.folder / "data.jsonl", records_of(stage))
    if stage not in ("pretrain", "sft"):
        assert call(train_pretrain.main, world, "--data_path", world.text, *FEW).code == 0
    runs, start = [], Run.start
    monkeypatch.setattr(Run, "start", lambda run, *a, **k: runs.append(run) or start(run, *a, **k))
    argv = ["--data_path", data, *FEW, *more]
    done = call(main, world, *argv, "--valid_ratio", "0.3")
    assert done.code == 0, done.err
    (run,) = runs
    n_valid = sum(map(DataFiles(data, 0.3, "valid").takes, read_records(data)))
    train_rows, valid_rows = run.loader.rows, run.valid_loader.rows
    assert 0 < n_valid < 24
    assert done.result["n_targets"] == valid_rows.n_targets > 0
    lines = [{int(n) for shard in rows.store.shards for n in shard.lines} for rows in (train_rows, valid_rows)]
    assert len(lines[1]) == n_valid
    assert not lines[0] & lines[1]
    assert len(lines[0] | lines[1]) == 24
    assert identity_of(run)["valid_ratio"] == 0.3


def test_refusals(world, call):
    for argv, words in (
        (["--valid_ratio", "1"], ["--valid_ratio 1.0", "below 1"]),
        (["--valid_ratio", "-0.1"], ["--valid_ratio -0.1"]),
        (["--valid_ratio", "0.1", "--valid_path", world.text_valid], ["--valid_ratio 0.1", "--valid_path", "choose"]),
        (["--valid_ratio", "1e-9"], ["--valid_ratio 1e-09", "none of the 30 usable records", "raise it"]),
    ):
        done = call(train_pretrain.main, world, "--data_path", world.text, *FEW, *argv)
        assert (done.code, done.err.strip().count("\n")) == (2, 0), done.err
        assert all(word in done.err for word in words), done.err
