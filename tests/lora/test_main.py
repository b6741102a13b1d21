"""``python -m minillm.lora``: merged directories that transformers opens, and what an adapter is."""

import json
import subprocess
from pathlib import Path

import peft
import pytest
import torch
import transformers

from minillm.hub.huggingface import load_model, save_model
from minillm.lora import apply_lora, load_lora, merge_lora, save_lora, set_adapter
from minillm.lora.__main__ import main
from minillm.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tools, tmp_path):
    """A model directory with a tokenizer, and two adapters of it."""
    model = tools.model(dtype=torch.float32, vocab_size=270, attention_bias=False)
    model.origin = "base"
    save_model(model, tmp_path / "base", tokenizer=train_bpe(iter(["a b c"]), vocab_size=270))
    for seed, (name, settings) in enumerate({"one": {}, "two": {"target_modules": "lm_head,mlp"}}.items()):
        adapted = load_model(tmp_path / "base")
        apply_lora(adapted, rank=3, generator=torch.Generator().manual_seed(seed), **settings)
        tools.train(adapted, 3)
        save_lora(adapted, tmp_path / name)
    return tmp_path


def argv(world, *more, adapter="one", output="merged"):
    paths = [str(world / part) for part in adapter.split()]
    return ["merge", "--model", str(world / "base"), "--adapter", *paths, "--output", str(world / output), *more]


def test_merge_gives_a_model_like_any_other(tools, world, python):
    command = [python, "-m", "minillm.lora", *argv(world)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"saved {world / 'merged'} (float32)\n"), done.stderr
    expected = load_model(world / "base")
    load_lora(expected, world / "one")
    wanted = tools.logits(merge_lora(expected, keep_base=False))
    assert torch.equal(tools.logits(load_model(world / "merged")), wanted)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world / "merged")
    torch.testing.assert_close(tools.logits(theirs), wanted, rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(world / "merged").encode("a b") == (
        transformers.AutoTokenizer.from_pretrained(world / "base").encode("a b")
    )
    names = [{path.name for path in (world / name).iterdir()} for name in ("base", "merged")]
    assert names[0] == names[1]
    generation = [(world / name / "generation_config.json").read_text() for name in ("base", "merged")]
    assert generation[0] == generation[1]


def test_it_is_what_peft_makes_of_it(tools, world):
    main(argv(world))
    base = transformers.AutoModelForCausalLM.from_pretrained(world / "base")
    theirs = peft.PeftModel.from_pretrained(base, world / "one").merge_and_unload()
    torch.testing.assert_close(tools.logits(load_model(world / "merged")), tools.logits(theirs), rtol=0, atol=1e-5)


def test_several_with_weights_and_another_dtype(tools, world, capsys):
    main([*argv(world, "--dtype", "bfloat16", adapter="one:0.5 two:-0.25", output="both")])
    assert capsys.readouterr().out.endswith("both (bfloat16)\n")
    assert json.loads((world / "both" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = load_model(world / "base")
    for name in ("one", "two"):
        load_lora(expected, world / name, adapter_name=name)
    set_adapter(expected, {"one": 0.5, "two": -0.25})
    merge_lora(expected, keep_base=False).bfloat16()
    merged = load_model(world / "both", dtype=torch.bfloat16)
    assert torch.equal(tools.logits(merged), tools.logits(expected))
    assert not merged.config.tie_word_embeddings  # the second changes the output layer alone


def test_merging_into_float16(tools, world, capsys):
    large = load_model(world / "base")
    load_lora(large, world / "one")
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            if name.endswith("lora.B.weight"):
                parameter.mul_(1e8)
    save_lora(large, world / "large")
    with pytest.raises(SystemExit) as ended:
        main(argv(world, "--dtype", "float16", adapter="large"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "has the number" in message
    assert "float16 ends at 6.55e+04: nothing was written; choose bfloat16 or float32" in message
    assert not (world / "merged").exists()
    main(argv(world, "--dtype", "bfloat16", adapter="large"))
    assert load_model(world / "merged").lm_head.weight.isfinite().all()


def test_show(world, capsys):
    main(["show", "--adapter", str(world / "one")])
    shown = capsys.readouterr().out
    assert "LoRA: rank 3, alpha 16, dropout 0" in shown
    assert "model.layers.1.mlp.down_proj.A (3, 40) float32" in shown
    assert "made for: unknown" in shown


def test_show_a_damaged_base_json(world, capsys):
    (world / "one" / "base.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["show", "--adapter", str(world / "one")])
    assert "base.json is damaged, copy it again" in capsys.readouterr().err


@pytest.mark.parametrize("stored, written", [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "torch.float16"},
                                           "float16"), ({"torch_dtype": "auto"}, "float32")])  # fmt: skip
def test_the_dtype_is_that_of_the_model_under_either_name(world, capsys, stored, written):
    path = world / "base" / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("torch_dtype")
    path.write_text(json.dumps(raw | stored))
    main(argv(world))
    assert capsys.readouterr().out.endswith(f"({written})\n")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda argv: [*argv[:-1], argv[2]], "it exists already; choose a new directory"),
        (lambda argv: [*argv[:4], "nowhere", *argv[5:]], "no adapter 'nowhere'"),
        (lambda argv: [*argv[:4], f"{argv[4]}:much", *argv[5:]], "'much' is not a weight; write PATH:0.7"),
        (lambda argv: [*argv[:4], f"{argv[4]}:nan", *argv[5:]], "one has the weight nan: give a number"),
        (lambda argv: [*argv[:4], *argv[5:]], "no adapter is named"),
        (lambda argv: [*argv[:5], argv[4] + ":0.5", *argv[5:]], "an adapter is named twice"),
        (lambda argv: [argv[0], "--model", "nowhere", *argv[3:]], "no weights 'nowhere'"),
    ],
)
def test_refusals_are_one_line(world, change, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(change(argv(world)))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (world / "merged").exists()


def test_another_base_is_refused_without_any_base(tools, world, capsys):
    other = load_model(world / "base")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    save_model(other, world / "base")
    with pytest.raises(SystemExit):
        main(argv(world))
    assert "whose weights are not those of" in capsys.readouterr().err
    main(argv(world, "--any_base"))
    assert (world / "merged" / "model.safetensors").is_file()


def test_a_full_disk_is_named(world, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillm.lora.__main__.save_model", full)
    with pytest.raises(SystemExit):
        main(argv(world))
    assert "No space left on device; choose another path" in capsys.readouterr().err
