"""The study of the last stages runs through, on a tiny demo; its table has a line per thing that was trained."""

import json

import pytest
import torch

from benchmarks import stages
from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo that nobody trained."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = train_bpe(iter(["mod:1+2=3 yes no"] * 3), vocab_size=270)
    tokenizer.save(root / "demo" / "tokenizer")
    torch.manual_seed(0)
    config = ModelConfig.preset("demo", vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    for name in ("pretrain_128", "full_sft_128"):
        save_model(Transformer(config), root / "demo" / name, tokenizer=tokenizer)
    chat = [[{"role": "user", "content": f"mod:{n}"}, {"role": "assistant", "content": str(n)}] for n in range(9)]
    thought = "<think>\n{0}\n</think>\n<answer>\n{0}\n</answer>"
    files = {
        "pretrain_train": [{"text": f"{n}+1={n + 1}", "log_prob": -2.0} for n in range(30)],
        "sft_train": [{"conversations": turns} for turns in chat],
        "dpo_train": [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(9)],
        "reason_train": [{"conversations": [turns[0], turns[1] | {"content": thought.format(n)}], "final": str(n)}
                         for n, turns in enumerate(chat)],
        "direct_train": [{"conversations": turns, "final": str(n)} for n, turns in enumerate(chat)],
    }  # fmt: skip
    files |= {"pretrain_valid": files["pretrain_train"], "sft_test": files["sft_train"]}
    files |= {"dpo_test": files["dpo_train"], "reason_test": files["reason_train"]}
    (root / "data").mkdir()
    for name, records in files.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def test_every_part_runs_for_every_seed(demo, capsys):
    argv = ["--demo", str(demo / "demo"), "--data", str(demo / "data"), "--seeds", "1,2", "--max_steps", "1"]
    results = stages.main([*argv, "--n_test", "2", "--num_threads", "1", "--output", str(demo / "stages.json")])
    expected = ["before DPO", "DPO", "student, hard labels", "student, teacher", "answering at once",
                "reasoning, tag weight 10", "reasoning, tag weight 1"]  # fmt: skip
    assert [list(result) for result in results] == [expected, expected]
    assert results[0]["student, hard labels"] != results[1]["student, hard labels"]  # other weights, other rows
    assert results[0]["before DPO"] == results[1]["before DPO"]
    assert len(json.loads((demo / "stages.json").read_text())["results"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum("±" in line for line in lines) == len(expected)


def test_without_a_demo_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        stages.main(["--demo", str(tmp_path)])
    assert ended.value.code == 2
    assert "make demo" in capsys.readouterr().err
