"""--add_tokens: a base model without chat tokens learns a chat format; every result opens with its new rows."""

import json
from dataclasses import replace

import pytest
import torch

import eval_model
import train_dpo
import train_lora
import train_pretrain
import train_sft
from minillm.errors import UserError
from minillm.hub import load_model, open_model
from minillm.lora.__main__ import main as lora_program
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import add_tokens, encode_chat, load_tokenizer, token_names, with_chat
from minillm.tokenizer.extend import set_template
from tests.foreign.layouts import LAYOUTS, make_tokenizer
from tests.foreign.models import make_model
from tests.foreign.test_open_models import difference, losses, run_stage, their_model, write

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CHATML = "<|im_start|>,<|im_end|>"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
STEPS = ["--batch_size", 2, "--max_steps", 4, "--learning_rate", 1e-2, "--warmup_ratio", 0]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "sft.jsonl", [{"messages": TALK}] * 2)


def base_model(path, *, padding, tied=False, layout="mistral"):
    """A base model without a template; its embeddings have ``padding`` rows more than its tokenizer has tokens."""
    n_tokens = load_tokenizer(make_tokenizer(layout, path / "tokenizer")).vocab_size
    return make_model("llama", layout, path / "base", vocab_size=n_tokens + padding, tie_word_embeddings=tied), n_tokens


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_fine_tuning_with_new_tokens(tmp_path, data, capsys, padding, tied):
    base, n = base_model(tmp_path, padding=padding, tied=tied)
    run = run_stage(train_sft.main, base, tmp_path / "out", data, *STEPS, "--add_tokens", CHATML)
    said = capsys.readouterr().out
    assert f"<|im_start|> = {n}, <|im_end|> = {n + 1}; their rows begin at the mean of the others" in said
    assert "written as ChatML, because the tokenizer has no chat template" in said
    assert losses(run)[-1] < losses(run)[0]
    tokenizer, model = load_tokenizer(run), load_model(run).eval()
    assert (tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.vocab_size) == (n, n + 1, n + 2)
    assert len(model.model.embed_tokens.weight) == model.config.vocab_size == max(n + 2, n + padding)
    assert tokenizer.encoding_hash != load_tokenizer(base).encoding_hash
    theirs, their_tokenizer = their_model(run), transformers.AutoTokenizer.from_pretrained(run)
    assert difference(model, theirs, n + 2) <= 1e-5
    ids, _ = encode_chat(tokenizer, TALK)
    assert ids == their_tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert n + 1 in theirs.generation_config.eos_token_id
    # the result has the tokens: a second run needs no flag, and with it says so
    again = tmp_path / "again"
    run_stage(train_sft.main, run, again, data, *STEPS, "--add_tokens", CHATML)
    assert "has <|im_start|>, <|im_end|> already" in capsys.readouterr().out


def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, data):
    base, n = base_model(tmp_path, padding=1)
    before = load_model(base)
    more = [*STEPS[:2], "--max_steps", 1, "--learning_rate", 1e-30, "--add_tokens", "<|im_start|>,<|im_end|>,<think>"]
    run = run_stage(train_sft.main, base, tmp_path / "out", data, *more)
    after = load_model(run)
    for name in ("model.embed_tokens", "lm_head"):
        old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
        assert len(new) == n + 3
        assert torch.equal(new[:n], old[:n])
        for row in new[n:]:
            assert torch.allclose(row, old[:n].mean(dim=0), atol=1e-6)
    tokenizer = load_tokenizer(run)
    assert tokenizer.special_ids >= {n, n + 1}
    assert n + 2 not in tokenizer.special_ids  # a tag is ordinary output


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_carries_its_tokens(tmp_path, data, padding, tied):
    """The new rows learn, and are saved with it: in peft, in open_model and merged the answers are the same."""
    base, n = base_model(tmp_path, padding=padding, tied=tied)
    run = run_stage(train_lora.main, base, tmp_path / "out", data, *STEPS, "--add_tokens", CHATML, "--lora_name", "a")
    assert losses(run)[-1] < losses(run)[0]
    assert json.loads((run / "adapter_config.json").read_text())["modules_to_save"]
    ours, tokenizer = open_model(base, device="cpu", lora_name=str(run), save_dir=str(tmp_path / "out"))
    ours = ours.eval()
    assert tokenizer.vocab_size == n + 2
    old, new = load_model(base).model.embed_tokens.weight, ours.model.embed_tokens.weight
    assert not torch.allclose(new[n + 1], old[:n].mean(dim=0), atol=1e-4)  # it has learned
    ids = torch.tensor([encode_chat(tokenizer, TALK)[0]])
    reference = their_model(base)
    if not padding:
        reference.resize_token_embeddings(n + 2)
    theirs = peft.PeftModel.from_pretrained(reference, run).eval()
    with torch.no_grad():
        logits = ours(ids)
        assert ids.max() == n + 1
        assert (logits - theirs(ids).logits).abs().max() <= 1e-5 * logits.abs().max()
    lora_program(["merge", "--model", str(base), "--adapter", str(run), "--output", str(tmp_path / "merged")])
    merged = load_model(tmp_path / "merged").eval()
    assert load_tokenizer(tmp_path / "merged").encoding_hash == tokenizer.encoding_hash
    with torch.no_grad():
        assert (logits - merged(ids)).abs().max() <= 1e-5 * logits.abs().max()
    flags = ["--from_weight", base, "--lora_name", run, "--prompt", "Hi", "--max_new_tokens", 3, "--device", "cpu"]
    eval_model.main([str(flag) for flag in [*flags, "--save_dir", tmp_path / "out"]])


@pytest.mark.parametrize("reference", ["copy", "adapter", "cached"])
def test_preferences_begin_at_their_reference(tmp_path, reference):
    base, n = base_model(tmp_path, padding=0)
    data = write(tmp_path / "dpo.jsonl", [{"prompt": "Hi", "chosen": f"Hello {k}", "rejected": "No"} for k in range(2)])
    more = [*STEPS, "--add_tokens", CHATML, "--reference", reference]
    more += ["--lora_name", "a"] if reference == "adapter" else []
    run = run_stage(train_dpo.main, base, tmp_path / "out", data, *more)
    assert losses(run)[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses(run)[-1] < 0.69
    assert load_tokenizer(run).vocab_size == n + 2


def test_pretraining_and_resume(tmp_path):
    base, n = base_model(tmp_path, padding=0)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox\n\n" * 20)
    flags = [*STEPS, "--add_tokens", "<think>,</think>", "--save_interval", 2]
    base_flags = ["--from_weight", base, "--save_dir", tmp_path / "out", "--data_path", text, "--device", "cpu"]
    base_flags += ["--dtype", "float32", "--max_seq_len", 32, "--log_interval", 1, *flags]
    train_pretrain.main([str(flag) for flag in base_flags])
    (run,) = [path.parent for path in (tmp_path / "out").rglob("run.yaml")]
    first = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]
    weights = load_model(run).state_dict()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train_pretrain.main([str(flag) for flag in [*base_flags, "--from_resume"]])
    assert [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"] == first
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(run).state_dict().items())
    assert load_tokenizer(run).vocab_size == n + 2


def test_a_template_of_ones_own(tmp_path, data, capsys):
    base, _ = base_model(tmp_path, padding=0)
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    more = [*STEPS, "--add_tokens", "<|im_end|>", "--chat_template", template]
    run = run_stage(train_sft.main, base, tmp_path / "out", data, *more)
    assert f"conversations are written with {template}" in capsys.readouterr().out
    assert (run / "chat_template.jinja").read_text() == template.read_text()
    tokenizer = load_tokenizer(run)
    ids, mask = encode_chat(tokenizer, TALK)
    targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(targets) == "Hello!<|im_end|>"


def test_files_of_other_editors(tmp_path):
    """A byte order mark is no text of a template, and a damaged copy of the added tokens is not read."""
    directory = make_tokenizer("mistral_chat", tmp_path / "t", added_tokens_decoder=[])
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8-sig")
    tokenizer = set_template(add_tokens(load_tokenizer(directory), ["<|x|>"]), str(tmp_path / "mine.jinja"))
    assert tokenizer.files["chat_template.jinja"] == template
    assert tokenizer.token_id("<|x|>") == tokenizer.vocab_size - 1


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a,,b", " , ", "a b", "x" * 65, "a,a"])
def test_names_that_are_no_tokens(text):
    with pytest.raises(UserError, match="--add_tokens"):
        token_names(text)


def test_bad_flags_end_before_anything_is_written(tmp_path, data, capsys):
    base, _ = base_model(tmp_path, padding=0)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for")
    cases = {
        "is not a name of a token": ["--add_tokens", "a b"],
        "lacks <|im_start|> and <|im_end|>; add --add_tokens": ["--chat_template", "chatml"],
        "nowhere.jinja: cannot be read": ["--chat_template", "nowhere.jinja"],
        "does not compile": ["--chat_template", broken],
    }
    for reason, flags in cases.items():
        with pytest.raises(SystemExit) as ended:
            run_stage(train_sft.main, base, tmp_path / "out", data, *STEPS, *flags)
        assert ended.value.code == 2
        assert reason in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("run.yaml"))


def test_an_id_that_the_model_uses_is_not_given_away(tmp_path, data, capsys):
    base, n = base_model(tmp_path, padding=7)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": n}))
    with pytest.raises(SystemExit):
        run_stage(train_sft.main, base, tmp_path / "out", data, *STEPS, "--add_tokens", CHATML)
    assert f"configuration uses the id {n}" in capsys.readouterr().err


def test_the_adapter_of_another_tokenizer_is_refused(tmp_path, data):
    base, _ = base_model(tmp_path, padding=0)
    run = run_stage(train_lora.main, base, tmp_path / "out", data, *STEPS, "--add_tokens", CHATML, "--lora_name", "a")
    other = make_model("llama", "llama2", tmp_path / "other")
    with pytest.raises(UserError, match=r"is not that of .* with added tokens"):
        open_model(other, device="cpu", lora_name=str(run), save_dir=str(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["gpt2", "mistral", "llama3", "qwen3", "yi"])
def test_only_the_new_names_change(tmp_path, layout):
    """Texts keep their ids, and the names are tokens in templates and never in texts."""
    before = load_tokenizer(make_tokenizer(replace(LAYOUTS[layout], template=None), tmp_path / "a"))
    after = add_tokens(before, ["<|new|>", "<|im_start|>", "<|im_end|>"])
    assert after.grown_from is before
    for text in ("Hi 你好\n\n  a", "<|new|> <|im_end|>", ""):
        assert after.encode(text) == before.encode(text)
    assert after.token_id("<|new|>") == before.vocab_size
    assert add_tokens(after, ["<|new|>"]) is after
    after, lines = with_chat(before, ["<|im_start|>", "<|im_end|>"])
    assert lines
    after.save(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert encode_chat(after, TALK)[0] == theirs.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert load_tokenizer(tmp_path / "b").encoding_hash == after.encoding_hash
