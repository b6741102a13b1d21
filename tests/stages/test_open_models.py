"""eval_model.py on directories as transformers itself writes them: every family, each with a tokenizer of its kind."""

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import eval_model
import train_pretrain
from minillm.config.families import ARCHITECTURES
from minillm.tokenizer import load_tokenizer
from tests.foreign import models as foreign

WORDS = ["the", "fox", "Ġthe", "Ġfox"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FAMILIES = foreign.FAMILIES | {"mistral": {"sliding_window": 5}}


def merged(words):
    """Return the pairs that build each word, letter by letter, and all that they build."""
    pairs = list(dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word))))
    return pairs, ["".join(pair) for pair in pairs]


def bytes_tokenizer(special):
    """Return a tokenizer like those of Qwen and GLM: merges of bytes, special tokens behind them."""
    pairs, built = merged(WORDS)
    vocabulary = {token: number for number, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *built])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def sentencepiece_tokenizer():
    """Return a tokenizer like those of Llama, Mistral and Mixtral: ▁ for blanks, bytes for what else is unknown."""
    words = ["▁the", "▁fox"]
    pairs, built = merged(words)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *sorted(set("".join(words))), *built]
    vocabulary = {token: number for number, token in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_tokenizer(family):
    """Return transformers' object around a tokenizer of the kind that the family's releases have."""
    if family.startswith("qwen"):
        backend, names = bytes_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), QWEN
    elif family == "glm4_moe":
        backend = bytes_tokenizer(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        backend, names = sentencepiece_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHATML if family.startswith("qwen") else None
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def released(request, tmp_path_factory):
    """Return (family, directory, model, tokenizer); the last two are transformers' and wrote the directory."""
    family, path = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(family)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)  # biases and norms are constants at first
        model.lm_head.weight[len(tokenizer) :] = 0  # releases have more rows than tokens; they are never the best
    assert type(model).__name__ == ARCHITECTURES[family]
    model.save_pretrained(path, max_shard_size="40KB")
    tokenizer.save_pretrained(path)
    assert (path / "model.safetensors.index.json").is_file()
    return family, path, model, tokenizer


@pytest.fixture
def answer(released, tmp_path, monkeypatch):
    """Call it with --model_mode: the ids that ``eval_model.py --from_weight DIRECTORY`` answers to a prompt."""
    found, complete = [], eval_model.complete

    def spy(*args, **options):
        for done in complete(*args, **options):
            found.append(done.ids)
            yield done

    def answer(mode):
        (tmp_path / "prompts.txt").write_text("the fox the\n")
        flags = ["--from_weight", released[1], "--prompts", tmp_path / "prompts.txt", "--save_dir", tmp_path]
        flags += ["--model_mode", mode, "--temperature", 0, "--max_new_tokens", 8, "--device", "cpu"]
        eval_model.main([str(flag) for flag in flags])
        return found.pop()

    monkeypatch.setattr(eval_model, "complete", spy)
    return answer


def generated(model, prompt, ends):
    """Return what transformers' own loop adds to the prompt."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


def test_it_completes_text_as_transformers_does(released, answer, capsys):
    family, path, model, theirs = released
    ours = load_tokenizer(path)
    prompt = [ours.bos_token_id, *ours.encode("the fox the")]
    assert prompt[1:] == theirs("the fox the", add_special_tokens=False)["input_ids"]
    if not family.startswith(("qwen", "glm")):
        assert prompt == theirs("the fox the")["input_ids"]
    assert answer(0) == generated(model, prompt, [ours.eos_token_id])
    assert capsys.readouterr().out.startswith(f"{path}: parameters {model.num_parameters(exclude_embeddings=False):,}")


def test_it_chats_where_its_tokenizer_is_chatml(released, answer, capsys):
    family, _, model, theirs = released
    if family.startswith("qwen"):
        turns = [{"role": "user", "content": "the fox the"}]
        prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        ends = theirs.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert answer(1) == generated(model, prompt, ends)
    else:
        with pytest.raises(SystemExit) as ended:
            answer(1)
        assert ended.value.code == 2
        wanted = "has no chat template, and for plain ChatML it lacks <|im_start|> and <|im_end|>"
        assert wanted in capsys.readouterr().err


def test_it_trains_further_and_ends_where_its_tokenizer_says(released, tmp_path):
    """Most families have no token that ends a turn; what is saved must open, and end, all the same."""
    _, path, model, theirs = released
    (tmp_path / "text.txt").write_text("the fox the\n" * 20)
    sizes = ["--max_steps", 1, "--batch_size", 1, "--max_seq_len", 32, "--learning_rate", 1e-9, "--dtype", "float32"]
    flags = ["--from_weight", path, "--data_path", tmp_path / "text.txt", "--save_dir", tmp_path, *sizes]
    flags += ["--num_experts_per_tok", 2, "--use_moe"] if "moe" in path.name or "mixtral" in path.name else []
    train_pretrain.main([str(flag) for flag in flags])
    (saved,) = tmp_path.glob("pretrain_32*")
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, experts_implementation="eager")
    names = [theirs.eos_token, *(["<|im_end|>"] if "<|im_end|>" in theirs.get_vocab() else [])]
    ends = again.generation_config.eos_token_id
    assert {*([ends] if isinstance(ends, int) else ends)} >= set(theirs.convert_tokens_to_ids(names))
    ids = torch.tensor([load_tokenizer(path).encode("the fox the")])
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
