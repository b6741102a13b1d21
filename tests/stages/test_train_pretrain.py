"""train_pretrain.py from its command line: what it leaves, what it computes, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import train_pretrain
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints, load_state
from minillm.hub import weights
from minillm.hub.huggingface import load_model
from minillm.inference import generate
from minillm.reports.tracking import read_metrics

DATA = ["--max_seq_len", "24", "--batch_size", "3"]
MODEL_FILES = {
    "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(make_world, tmp_path_factory, flags):
    """A finished run: 7 updates of 2 micro-batches, validated at 3, 6 and 7, saved at 2, 4, 6 and 7."""
    world = make_world(tmp_path_factory.mktemp("pretrain"))
    argv = ["--data_path", str(world.text), "--valid_path", str(world.text_valid), "--packing", "best_fit"]
    argv += ["--max_seq_len", "100", "--batch_size", "3", "--accumulation_steps", "2", "--max_steps", "7"]
    argv += ["--learning_rate", "3e-3", "--log_interval", "2", "--eval_interval", "3", "--save_interval", "2"]
    world.result = train_pretrain.main([*flags(world), *argv])
    world.run = world.out / "pretrain_32"
    return world


def token_loss(model, sequences):
    """Nats per target, one sequence at a time: position t predicts token t + 1."""
    loss_sum = n_targets = 0.0
    with torch.no_grad():
        for ids in map(torch.tensor, sequences):
            loss_sum += float(F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="sum"))
            n_targets += len(ids) - 1
    return loss_sum / n_targets


def documents_of(path, tokenizer):
    """<|endoftext|> text <|endoftext|>, for each record."""
    end = tokenizer.eos_token_id
    return [[end, *tokenizer.encode(json.loads(line)["text"]), end] for line in path.read_text("utf-8").splitlines()]


def test_the_run_directory_holds_everything(finished):
    names = {path.name for path in finished.run.iterdir()}
    assert MODEL_FILES | {"README.md", "run.yaml", "metrics.jsonl", "summary.png", "summary.html"} <= names
    assert {path.name for path in (finished.run / "best").iterdir()} >= MODEL_FILES
    saved = list_checkpoints(finished.run / "checkpoints")
    assert [path.name for path in saved] == ["step-00000007", "step-00000006"]  # --keep_last 2
    for path in saved:
        assert find_damage(path) is None
        assert {file.name for file in path.iterdir()} >= MODEL_FILES | {"training_state.pt", "manifest.json"}
    left = [path for path in finished.out.rglob("*") if "tmp" in path.name or path.name.startswith(".step")]
    assert left == []


def test_the_checkpoint_holds_the_whole_state(finished):
    state = load_state(finished.run / "checkpoints" / "step-00000007")
    assert {"optimizer", "scaler", "rng", "counters", "window", "identity", "tracker_run_ids"} <= set(state)
    assert state["counters"]["step"] == 7
    rows = [row for row in read_metrics(finished.run / "metrics.jsonl") if row["split"] == "valid"]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert state["counters"]["best_value"] == min(row["loss"] for row in rows[:2])  # it comes before the last one
    assert state["counters"]["validation_due"]
    final = load_model(finished.run).state_dict()
    stored = load_model(finished.run / "checkpoints" / "step-00000007").state_dict()
    assert all(torch.equal(final[name], stored[name]) for name in final)


def test_metrics_rows(finished, read_jsonl):
    rows = read_jsonl(finished.run / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [
        (2, "train"), (3, "valid"), (4, "train"), (6, "train"), (6, "valid"), (7, "train"), (7, "valid"),
    ]  # fmt: skip
    keys = {"step", "epoch", "tokens", "loss", "seconds", "split"}
    machine = {"tokens_per_s", "cpu_percent", "cpu_memory_gib"}
    more = {"train": {"lr", "grad_norm", *machine}, "valid": {"bits_per_byte", "n_targets"}}
    for row in rows:
        assert set(row) >= keys | more[row["split"]]
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens)
    # All rows of an epoch hold every pair of every document; 7 steps of 6 rows are more than one epoch here.
    steps_per_epoch = 7 // rows[-1]["epoch"] if rows[-1]["epoch"] else None
    pairs = sum(len(ids) - 1 for ids in documents_of(finished.text, finished.tokenizer))
    assert steps_per_epoch is not None
    assert tokens[-1] > pairs
    # Linear warm-up over ceil(0.02 * 7) = 1 step, then a cosine from step 1 to step 6 down to a tenth.
    for row in (row for row in rows if row["split"] == "train"):
        progress = (row["step"] - 2) / 5  # the row of step n was updated with the rate of number n - 1
        assert row["lr"] == pytest.approx(3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2))
    assert rows[-2]["loss"] < rows[0]["loss"]
    assert finished.result["loss"] == rows[-1]["loss"]


def test_the_validation_loss_is_that_of_the_saved_model(finished):
    model = load_model(finished.run).eval()
    documents = documents_of(finished.text_valid, finished.tokenizer)
    loss = token_loss(model, documents)
    last = read_metrics(finished.run / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert last["n_targets"] == sum(len(ids) - 1 for ids in documents)
    texts = [json.loads(line)["text"] for line in finished.text_valid.read_text("utf-8").splitlines()]
    n_bytes = sum(len(text.encode()) for text in texts)
    assert last["bits_per_byte"] == pytest.approx(loss * last["n_targets"] / math.log(2) / n_bytes, rel=1e-5)


def test_run_yaml_and_the_model_card(finished):
    content = yaml.safe_load((finished.run / "run.yaml").read_text(encoding="utf-8"))
    assert content["stage"] == "pretrain"
    assert content["arguments"]["learning_rate"] == 3e-3
    assert content["resolved"] == {
        "device": "cpu", "dtype": "float32", "ranks": 1, "rows_per_step": 6, "total_steps": 7
    }  # fmt: skip
    assert content["model"]["hidden_size"] == 32
    assert content["n_parameters"] == load_model(finished.run).config.num_parameters()
    assert len(content["data"]["hash"]) == 64
    assert content["data"]["summary"]["documents"] == 30
    assert content["versions"]["torch"] == str(torch.__version__)
    card = (finished.run / "README.md").read_text(encoding="utf-8")
    last = read_metrics(finished.run / "metrics.jsonl")[-1]
    for words in ("library_name: transformers", content["data"]["hash"][:16], f"{last['loss']:.4f}", "| command |"):
        assert words in card
    page = (finished.run / "summary.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert page.count("<pre>") == 4  # samples of four validation texts


@pytest.mark.parametrize("where", [".", "best", "checkpoints/step-00000007"])
def test_transformers_opens_it_with_equal_logits_and_text(finished, where):
    transformers = pytest.importorskip("transformers")
    ours = load_model(finished.run / where).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished.run / where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished.run / where)
    for ids in documents_of(finished.text_valid, finished.tokenizer):
        with torch.no_grad():
            a, b = ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        prompt = ids[:3]
        ends = theirs.generation_config.eos_token_id
        mine = generate(ours, [prompt], max_new_tokens=12, temperature=0, eos_token_id=ends)[0]
        reference = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
        assert tokenizer.decode(mine) == tokenizer.decode(reference) == finished.tokenizer.decode(reference)


def test_one_batch_is_learned_by_heart(world, call):
    world.write(world.text, [{"text": "the little fox saw 12 apples"}, {"text": "old dog"}])
    argv = ["--data_path", world.text, *DATA, "--max_steps", "80", "--learning_rate", "1e-2", "--log_interval", "1"]
    argv += ["--save_interval", "0", "--weight_decay", "0", "--packing", "none"]
    done = call(train_pretrain.main, world, *argv)
    assert done.code == 0, done.err
    losses = [row["loss"] for row in read_metrics(world.out / "pretrain_32" / "metrics.jsonl")]
    assert losses[0] > 4
    # Two documents begin differently after <|endoftext|>, which costs ln 2 each: that is the floor.
    n_targets = sum(len(ids) - 1 for ids in documents_of(world.text, world.tokenizer))
    assert losses[-1] == pytest.approx(2 * math.log(2) / n_targets, abs=0.01)  # 0.01 nats: 80 steps are not forever
    assert done.result == {}  # nothing to validate on


def test_save_dtype_is_for_the_export_alone(world, call):
    argv = ["--data_path", world.text, *DATA, "--max_steps", "1", "--save_dtype", "bfloat16"]
    assert call(train_pretrain.main, world, *argv).code == 0
    run = world.out / "pretrain_32"
    assert json.loads((run / "config.json").read_text())["torch_dtype"] == "bfloat16"
    exact, rounded = load_model(run / "checkpoints" / "step-00000001"), load_model(run)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].bfloat16().float())


def test_the_first_loss_is_compared_with_ln_v(world, call, monkeypatch):
    argv = ["--data_path", world.text, *DATA, "--max_steps", "2", "--save_interval", "0"]
    assert "warning" not in call(train_pretrain.main, world, *argv).out
    real = weights.Transformer

    def too_large(config):
        model = real(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(60)
        return model

    monkeypatch.setattr(weights, "Transformer", too_large)
    done = call(train_pretrain.main, world, *argv, "--overwrite")
    assert done.code == 0
    assert done.out.count("warning: the first loss is") == 1
    assert f"ln V = {math.log(world.tokenizer.vocab_size):.3f}" in done.out


def test_weights_that_were_trained_may_start_below_ln_v_but_not_above(finished, world, call):
    argv = ["--data_path", world.text, *DATA, "--max_steps", "1", "--from_weight", finished.run]
    assert "warning" not in call(train_pretrain.main, world, *argv).out
    model = load_model(finished.run)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    torch.save(model.state_dict(), world.folder / "m.pth")
    argv = ["--data_path", world.text, *DATA, "--max_steps", "1", "--from_weight", world.folder / "m.pth"]
    done = call(train_pretrain.main, world, *argv, "--overwrite")
    assert done.code == 0, done.err
    assert "a fresh model" not in done.out
    assert "warning: step 1: the loss of the first step is " in done.out


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_the_run_and_keeps_its_batch(world, call, monkeypatch, what):
    argv = ["--data_path", world.text, *DATA, "--accumulation_steps", "2", "--max_steps", "9", "--save_interval", "2"]
    real, seen = train_pretrain.causal_lm_loss, []

    def breaks_at_step_4(model, batch, router_stats=None):
        loss_sum, n_targets = real(model, batch, router_stats)
        seen.append({name: tensor.clone() for name, tensor in batch.items()})
        if len(seen) == 8:
            if what == "loss":
                loss_sum = loss_sum * float("inf")
            else:
                loss_sum.register_hook(lambda gradient: gradient * float("nan"))
        return loss_sum, n_targets

    monkeypatch.setattr(train_pretrain, "causal_lm_loss", breaks_at_step_4)
    done = call(train_pretrain.main, world, *argv)
    run = world.out / "pretrain_32"
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "step 4" in line
    assert "not finite" in line
    (saved,) = run.glob("nonfinite-*.pt")
    assert str(saved) in line
    content = torch.load(saved, weights_only=True)
    assert content["step"] == 4
    for batch, fed in zip(content["micro_batches"], seen[-2:], strict=True):
        assert all(torch.equal(batch[name], fed[name]) for name in fed)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert checkpoint.name == "step-00000002"
    assert find_damage(checkpoint) is None
    assert not (run / "model.safetensors").exists()


def test_wandb_offline(world, call, monkeypatch, appears):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = ["--data_path", world.text, *DATA, "--max_steps", "2", "--use_wandb", "--log_interval", "1"]
    assert call(train_pretrain.main, world, *argv).code == 0
    run = world.out / "pretrain_32"
    (record,) = run.glob("wandb/offline-run-*/*.wandb")
    assert appears(b"train/loss", record)
    run_id = load_state(run / "checkpoints" / "step-00000002")["tracker_run_ids"]["wandb"]
    assert run_id in record.name


def test_dry_run_writes_nothing_but_the_token_cache(world, call):
    before = {path for path in world.folder.rglob("*") if ".token_cache" not in path.parts}
    done = call(train_pretrain.main, world, "--data_path", world.text, *DATA, "--dry_run")
    assert done.code == 0
    assert done.result is None
    assert {path for path in world.folder.rglob("*") if ".token_cache" not in path.parts} == before
    assert "parameters: " in done.out
    assert "memory: about" in done.out
    assert "time: about" in done.out


def test_a_full_disk_at_a_checkpoint_is_one_line(world, call, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    argv = ["--data_path", world.text, *DATA, "--max_steps", "3", "--save_interval", "1"]
    done = call(train_pretrain.main, world, *argv)
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    run = world.out / "pretrain_32"
    assert list((run / "checkpoints").iterdir()) == []
    assert not (run / "model.safetensors").exists()


def test_a_full_disk_at_the_export_is_one_line(world, call, monkeypatch):
    def full(model, path, **options):
        if Path(path).name == "pretrain_32":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillm.checkpoints.outputs.save_model", full)
    done = call(train_pretrain.main, world, "--data_path", world.text, *DATA, "--max_steps", "2")
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line


BROKEN = '{"text": "the'


def test_a_broken_line_is_set_aside_with_its_number(world, call, read_jsonl):
    records = [{"text": f"the little fox {n}"} for n in range(12)]
    records[6] = BROKEN
    world.write(world.text, records)
    done = call(train_pretrain.main, world, "--data_path", world.text, *DATA, "--max_steps", "1")
    assert done.code == 0, done.err
    (rejected,) = read_jsonl(world.folder / "text.jsonl.rejected.jsonl")
    assert rejected["line"] == 7
    assert "JSON" in rejected["reason"]
    summary = yaml.safe_load((world.out / "pretrain_32" / "run.yaml").read_text())["data"]["summary"]
    assert (summary["documents"], summary["rejected"]) == (11, 1)


def test_a_broken_line_is_fatal_when_strict(world, call, refused):
    world.write(world.text, [{"text": "a"}] * 6 + [BROKEN] + [{"text": "a"}] * 5)
    done = call(train_pretrain.main, world, "--data_path", world.text, *DATA, "--strict")
    refused(done, world, "text.jsonl", "line 7")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data_path", "{folder}/missing.jsonl"], ["missing.jsonl"]),
        (["--valid_path", "{folder}/missing.jsonl"], ["missing.jsonl"]),
        (["--data_path", "{folder}/empty.jsonl"], ["empty.jsonl"]),
        (["--valid_path", "{folder}/empty.jsonl"], ["empty.jsonl"]),
        (["--data_path", "{folder}/chat.jsonl"], ["chat.jsonl", "text"]),
        (["--data_path", "{folder}/binary.jsonl"], ["binary.jsonl"]),
        (["--data_path", "{folder}/out"], ["out is a directory that holds no data file", ".jsonl"]),
        (["--max_seq_len", "0"], ["--max_seq_len 0", "at least 1"]),
        (["--max_seq_len", "40000"], ["40000", "32768"]),
        (["--global_batch_size", "8"], ["8", "3", "multiple"]),
        (["--tokenizer_path", "{folder}/nowhere"], ["nowhere"]),
        (["--tokenizer_path", "{folder}"], ["tokenizer"]),
        (["--from_weight", "rlhf"], ["rlhf", "there are: none"]),
        (["--hidden_size", "33"], ["33", "num_attention_heads"]),
        (["--num_key_value_heads", "3"], ["3", "num_attention_heads"]),
        (["--dtype", "float16"], ["float16", "CPU"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--config", "{folder}/none.yaml"], ["none.yaml"]),
        (["--from_resume"], ["--from_resume", "no intact checkpoint"]),
    ],
)  # fmt: skip
def test_refusals(world, call, refused, argv, words):
    (world.folder / "empty.jsonl").write_text("")
    (world.folder / "binary.jsonl").write_bytes(b"\x80\xff\x00\n" * 3)
    argv = [word.format(folder=world.folder) for word in argv]
    refused(call(train_pretrain.main, world, "--data_path", world.text, *DATA, *argv), world, *words)


@pytest.mark.parametrize("cache", [True, False])
def test_a_save_dir_that_cannot_be_made(world, call, refused, cache):
    (world.folder / "file").write_text("")
    argv = ["--data_path", world.text, *DATA, "--save_dir", world.folder / "file" / "out"]
    argv += ["--tokenizer_path", world.out / "tokenizer"]
    argv += ["--cache_dir", world.folder / "cache"] if cache else []
    refused(call(train_pretrain.main, world, *argv), world, str(world.folder / "file" / "out"))


def test_a_save_dir_without_write_permission(world, call, refused, monkeypatch):
    real = Path.mkdir

    def mkdir(path, *args, **kwargs):
        if path.name == "pretrain_32":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    argv = ["--data_path", world.text, *DATA]
    refused(call(train_pretrain.main, world, *argv), world, "pretrain_32", "Permission denied", "--save_dir")
