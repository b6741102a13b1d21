"""The explanation: its numbers are the model's, and looking changes nothing."""

import json
import re

import pytest
import torch

from minillm.config import ModelConfig
from minillm.explain import trace
from minillm.explain.__main__ import main
from minillm.explain.page import as_page
from minillm.explain.text import as_text, number, shown, width
from minillm.explain.words import WORDS
from minillm.hub import save_model
from minillm.model import Transformer, attention
from minillm.tokenizer import train_bpe

IDS = [3, 1, 4, 1, 5, 9, 2]


def tiny(**overrides) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    return Transformer(ModelConfig(**(sizes | overrides)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 3}, {"use_qk_norm": True, "tie_word_embeddings": False}])
def test_attention_is_that_of_the_model(shape):
    model = tiny(**shape)
    values, outputs = [], []
    for block in model.model.layers:
        block.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output))
        block.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    found = trace(model, IDS)
    parts = [part for part in found.parts if part.kind == "attention"]
    for part, value, output in zip(parts, values, outputs, strict=False):
        assert part.probabilities.shape == (4, 7, 7)
        torch.testing.assert_close(part.probabilities.sum(-1), torch.ones(4, 7))
        heads = value.view(7, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)  # (H, T, K)
        torch.testing.assert_close((part.probabilities @ heads).transpose(0, 1).reshape(1, 7, 32), output)
    is_above = torch.ones(7, 7).triu(1).bool()
    assert not parts[0].probabilities[:, is_above].any()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_flops_and_the_next_token(tied):
    model = tiny(tie_word_embeddings=tied)
    found = trace(model, IDS)
    blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    norms = 4 * 32  # the norms of the blocks are not shown
    assert found.total("n_parameters") == sum(p.numel() for p in model.parameters()) - norms
    n_pairs = 7 * 8 // 2
    expected = 2 * 7 * (blocks - norms) + 2 * 7 * 267 * 32 + 2 * 4 * 32 * n_pairs + 4 * 7 * 32
    assert found.total("flops") == expected
    with torch.no_grad():
        probabilities = model(torch.tensor([IDS]))[0, -1].softmax(-1)
    best = int(probabilities.argmax())
    assert found.candidates[0] == (best, pytest.approx(float(probabilities[best]), rel=1e-4))
    assert found.entropy == pytest.approx(float(-(probabilities * probabilities.log()).sum()), rel=1e-4)
    token, probability = found.parts[-3].guess  # after the last block nothing is added
    assert (token, probability) == (found.candidates[0][0], pytest.approx(found.candidates[0][1], rel=1e-4))


def test_looking_changes_nothing():
    model, attend = tiny().train(), attention.attend
    trace(model, IDS)
    assert model.training
    assert attention.attend is attend
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts():
    model = tiny(num_experts=4, num_experts_per_tok=2)
    found = trace(model, IDS)
    sparse = [part for part in found.parts if part.kind == "experts"]
    assert [part.experts.shape for part in sparse] == [(7, 2), (7, 2)]
    config = model.config
    total, active = (config.num_parameters(active=flag) for flag in (False, True))
    assert sum(part.n_parameters - part.n_active for part in sparse) == total - active


@pytest.mark.parametrize("language", ["en", "zh"])
def test_text_and_page(tokenizer, language):
    model = tiny(num_experts=4)
    found = trace(model, tokenizer.encode("a </script> b"))
    text = as_text(found, tokenizer, model.config, language)
    assert WORDS[language]["way"] in text
    assert "layer 1" in text if language == "en" else "层 1" in text
    page = as_page(found, tokenizer, model.config, language)
    assert page.count("</script>") == 1  # what the text says is no part of the page's code
    data = json.loads(re.search(r"const data = (\{.*?\});", page, re.S)[1])
    assert len(data["attention"]) == 2
    assert len(data["tokens"]) == len(found.ids) == len(data["attention"][0][0])
    assert all(words["title"] in page for words in WORDS.values())
    assert page.count('"value"') == 3  # a tap on a square of the map writes into it, where no mouse can point
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere


def test_both_languages_have_the_same_words():
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for name, text in WORDS["en"].items():
        assert re.findall(r"\{\w+", text) == re.findall(r"\{\w+", WORDS["zh"][name]) or name == "next_note"


def test_small_things(tokenizer):
    assert [number(value) for value in (7, 1234, 2.5e6, 3e9)] == ["7", "1.23k", "2.5M", "3G"]
    assert width("词元a") == 5
    assert shown(tokenizer, tokenizer.encode(" ")[0]) == "␣"
    assert shown(tokenizer, 10**6) == "<1000000>"


def test_the_program(tmp_path, tokenizer, capsys):
    save_model(tiny(), tmp_path / "model", tokenizer=tokenizer)
    flags = ["--from_weight", str(tmp_path / "model"), "--device", "cpu"]
    main(["abc", *flags, "--output", str(tmp_path / "deep" / "page.html"), "--language", "zh"])
    assert "注意力" in capsys.readouterr().out
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    main(["abc", *flags, "--chat", "--output", "none"])
    assert "<|im_start|>" in capsys.readouterr().out  # of the template
    with pytest.raises(SystemExit):
        main(["abc" * 40, *flags])
    assert "raise --max_tokens" in capsys.readouterr().err
