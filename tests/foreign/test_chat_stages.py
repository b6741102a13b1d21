"""Models of other chat formats through the stages: fine-tuned, adapted, compared, and answering."""

import json

import pytest
import torch

import eval_model
import train_dpo
import train_lora
import train_sft
from minillm.hub.huggingface import load_model
from minillm.inference import complete
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat, load_tokenizer
from tests.foreign.layouts import make_tokenizer
from tests.foreign.models import make_model

transformers = pytest.importorskip("transformers")

MODELS = {"llama2": "llama", "llama3": "llama", "qwen3": "qwen3"}
QUESTION = {"role": "user", "content": "Hi"}
TALKS = [[QUESTION, {"role": "assistant", "content": f"Hello {n}!"}] for n in range(6)]
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max_seq_len", "96", "--batch_size", "6", "--max_steps", "1",
         "--learning_rate", "1e-12", "--log_interval", "1", "--packing", "none"]  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def first_loss(run):
    return next(iter(read_metrics(run / "metrics.jsonl")))["loss"]


def answer_loss_of_theirs(directory, ours):
    """Mean over the answers' tokens of transformers' logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    loss_sum, n_targets = 0.0, 0
    for talk in TALKS:
        ids = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
        _, mask = encode_chat(ours, talk)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place, (token, marked) in enumerate(zip(ids, mask, strict=True)):
            loss_sum -= log_probs[place - 1, token].item() if marked else 0
        n_targets += sum(mask)
    return loss_sum / n_targets


@pytest.fixture
def made(tmp_path):
    """Call it with a layout: its model's directory, our tokenizer, and the flags of a stage that starts from it."""

    def made(layout):
        ours = load_tokenizer(make_tokenizer(layout, tmp_path / "tokenizer"))
        base = make_model(MODELS[layout], layout, tmp_path / "base", vocab_size=ours.vocab_size)
        data = write(tmp_path / "sft.jsonl", [{"messages": talk} for talk in TALKS])
        out = tmp_path / "out"
        return base, ours, out, ["--save_dir", str(out), "--from_weight", str(base), "--data_path", str(data), *FLAGS]

    return made


@pytest.mark.parametrize("layout", ["llama2", "qwen3"])
def test_fine_tuning_and_answers(layout, made, tmp_path):
    base, ours, out, flags = made(layout)
    train_sft.main(flags)
    (run,) = out.glob("full_sft_*")
    assert first_loss(run) == pytest.approx(answer_loss_of_theirs(base, ours), rel=1e-5)
    saved = load_tokenizer(run)
    assert encode_chat(saved, TALKS[0]) == encode_chat(ours, TALKS[0])
    assert saved.end_ids == ours.end_ids

    prompts = write(tmp_path / "prompts.jsonl", [{"messages": [QUESTION]}])
    flags = ["--from_weight", run, "--prompts", prompts, "--save_dir", out, "--output", tmp_path / "answers.json"]
    flags += ["--model_mode", 1, "--temperature", 0, "--max_new_tokens", 6, "--device", "cpu"]
    eval_model.main([str(flag) for flag in flags])
    (said,) = json.loads((tmp_path / "answers.json").read_text())["prompts"]
    theirs = transformers.AutoTokenizer.from_pretrained(run)
    prompt = theirs.apply_chat_template([QUESTION], return_dict=True, add_generation_prompt=True)["input_ids"]
    options = {"max_new_tokens": 6, "temperature": 0, "eos_token_id": ours.end_ids, "tokenizer": ours}
    (done,) = complete(load_model(run), [prompt], **options)
    assert said["answer"] == done.text


def test_adapters_and_preferences(made, tmp_path):
    base, ours, out, flags = made("llama3")
    train_lora.main(flags)
    (adapter,) = (out / "lora").glob("lora_*")
    assert first_loss(adapter) == pytest.approx(answer_loss_of_theirs(base, ours), rel=1e-5)
    pairs = [{"prompt": "Hi", "chosen": f"Hello {n}!", "rejected": "   No"} for n in range(6)]
    train_dpo.main([*flags, "--data_path", str(write(tmp_path / "dpo.jsonl", pairs))])
    (policy,) = out.glob("rlhf_*")
    assert first_loss(policy) == pytest.approx(0.693147, abs=1e-5)
