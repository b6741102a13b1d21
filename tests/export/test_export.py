"""``python -m minillm.export``: every format opens again with the same logits; bad requests end before any work."""

import errno
import json
import os
import shutil

import pytest
import torch

from benchmarks.gguf_parity import make_model
from minillm.cli.export_arguments import ExportArguments
from minillm.export.__main__ import main
from minillm.hub import load_model, open_model
from minillm.hub.pth import infer_config
from minillm.lora import apply_lora, save_lora
from minillm.tokenizer import load_tokenizer
from tests.foreign.layouts import CHATML, make_tokenizer
from tests.foreign.test_open_models import make_release


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Return an adapter that changes the model."""
    model = load_model(base)
    apply_lora(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    save_lora(model, path)
    return path


def call(*argv) -> None:
    main([str(word) for word in argv])


def fails(capsys, *argv) -> str:
    """Return the one line with which the program ends."""
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@torch.no_grad()
def logits_of(path, *, lora_name="", config=None):
    ids = torch.arange(40)[None]
    model = load_model(path, config=config) if config else open_model(path, lora_name=lora_name, device="cpu")[0]
    return model.eval()(ids)


@pytest.mark.parametrize("dtype, bound", [("f32", 0), ("bf16", 5e-2), ("f16", 5e-3)])
def test_a_hugging_face_directory(base, tmp_path, dtype, bound):
    call("--from_weight", base, "--format", "hf", "--dtype", dtype, "--output", tmp_path / "out")
    ours, expected = logits_of(tmp_path / "out"), logits_of(base)
    assert (ours - expected).abs().max() <= bound * expected.abs().max()
    assert load_tokenizer(tmp_path / "out").encoding_hash == load_tokenizer(base).encoding_hash
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pth(base, tmp_path):
    call("--from_weight", base, "--format", "pth", "--dtype", "f32", "--output", tmp_path / "x.pth")
    tensors = torch.load(tmp_path / "x.pth", weights_only=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config = infer_config(tmp_path / "x.pth", given={"num_attention_heads": 6, "rope_theta": 1e4})
    assert torch.equal(logits_of(tmp_path / "x.pth", config=config), logits_of(base))


def test_a_pth_of_experts_has_their_names_on_disk(tmp_path):
    directory = make_model("mixtral", tmp_path / "moe")
    call("--from_weight", directory, "--format", "pth", "--dtype", "f32", "--output", tmp_path / "x.pth")
    given = {"num_attention_heads": 6, "rope_theta": 1e4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config = infer_config(tmp_path / "x.pth", given=given)
    assert torch.equal(logits_of(tmp_path / "x.pth", config=config), logits_of(directory))


def test_ends_that_are_no_ids_are_not_copied(base, tmp_path):
    directory = tmp_path / "base"
    shutil.copytree(base, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [[1], 2]}')
    call("--from_weight", directory, "--format", "hf", "--output", tmp_path / "out")
    ends = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert set(ends) >= {2, *load_tokenizer(base).end_ids}


def test_an_adapter_is_merged(base, adapter, tmp_path):
    call("--from_weight", base, "--lora_name", adapter, "--format", "hf", "--output", tmp_path / "out")
    merged = logits_of(tmp_path / "out")
    expected = logits_of(base, lora_name=str(adapter))
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (merged - logits_of(base)).abs().max() > 1e-2 * expected.abs().max()


def test_gguf_of_a_pth_and_of_an_adapter(base, adapter, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    flags = ("--dtype", "f32", "--tokenizer_path", base)
    call("--from_weight", base, "--format", "pth", "--dtype", "f32", "--output", tmp_path / "x.pth")
    shape = ("--hidden_size", 48, "--num_attention_heads", 6, "--rope_theta", 10000)
    call("--from_weight", tmp_path / "x.pth", *shape, *flags, "--output", tmp_path / "a.gguf")
    call("--from_weight", base, *flags, "--output", tmp_path / "b.gguf")
    call("--from_weight", base, "--lora_name", adapter, *flags, "--output", tmp_path / "c.gguf")
    readers = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "abc"]
    a, b, c = ({tensor.name: tensor.data.copy() for tensor in reader.tensors} for reader in readers)
    assert a.keys() == b.keys() == c.keys()
    assert all((a[name] == b[name]).all() for name in a)
    assert not (c["blk.0.attn_q.weight"] == b["blk.0.attn_q.weight"]).all()
    names = sorted(path.name for path in tmp_path.iterdir() if path.stem in ("a", "b", "c"))
    assert names == ["a.Modelfile", "a.gguf", "b.Modelfile", "b.gguf", "c.Modelfile", "c.gguf"]


def test_default_names(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/full_sft_48").symlink_to(base)
    call()
    assert (tmp_path / "out/export/base.gguf").is_file()
    assert "saved out/export/base.gguf (f16)" in capsys.readouterr().out


def test_bad_requests(base, tmp_path, capsys):
    taken = tmp_path / "x.gguf"
    taken.write_bytes(b"mine")
    assert "exists already" in fails(capsys, "--from_weight", base, "--output", taken)
    (tmp_path / "d.gguf").mkdir()
    assert "is a directory" in fails(capsys, "--from_weight", base, "--output", tmp_path / "d.gguf")
    assert "--format pth has f32, f16, bf16" in fails(capsys, "--format", "pth", "--dtype", "q8_0")
    assert "ends in .onnx" in fails(capsys, "--format", "onnx", "--output", "x.gguf")
    assert "no weights 'nothing'" in fails(capsys, "--from_weight", "nothing", "--save_dir", tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    line = fails(capsys, "--from_weight", base, "--format", "hf", "--output", tmp_path / "full", "--overwrite")
    assert "a directory is not replaced" in line
    assert taken.read_bytes() == b"mine"


@pytest.mark.parametrize("form", ["pth", "hf"])
def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch, capsys, form):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minillm.files.os.replace", full)
    output = tmp_path / ("x.pth" if form == "pth" else "x")
    assert "No space left on device" in fails(capsys, "--from_weight", base, "--format", form, "--output", output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.gguf", "x.pth", "x"])
def test_a_limit_on_the_size_of_files_leaves_nothing(base, tmp_path, capsys, largest_file, name):
    form = {".gguf": "gguf", ".pth": "pth", "": "hf"}[(tmp_path / name).suffix]
    largest_file(20_000)
    line = fails(capsys, "--from_weight", base, "--format", form, "--output", tmp_path / name)
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("release", ["GLM-4.5", "Llama-3.2-1B-Instruct", "Qwen2.5-0.5B-Instruct"])
def test_a_pth_is_the_same_model_when_it_is_opened(release, tmp_path, capsys):
    """Shapes do not tell the eps, the scaling of RoPE, the share of a head that is rotated, ..."""
    (tmp_path / "base").mkdir()
    directory = make_release(release, tmp_path / "base")
    call("--from_weight", directory, "--format", "pth", "--dtype", "f32", "--output", tmp_path / "x.pth")
    assert f"--from_weight {tmp_path / 'x.pth'} --tokenizer_path {directory}" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    model = open_model(tmp_path / "x.pth", tokenizer_path=str(directory), device="cpu")[0]
    with torch.no_grad():
        assert torch.equal(model(ids), load_model(directory).eval()(ids))
    call("--from_weight", tmp_path / "x.pth", "--tokenizer_path", directory, "--format", "hf", "--dtype", "f32",
         "--output", tmp_path / "again")  # fmt: skip
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(directory))


def test_files_next_to_the_output_are_not_replaced(base, tmp_path, capsys):
    for form, name, other in (("gguf", "x.gguf", "x.Modelfile"), ("pth", "x.pth", "x.config.json")):
        (tmp_path / other).write_text("mine")
        line = fails(capsys, "--from_weight", base, "--format", form, "--output", tmp_path / name)
        assert f"{other} exists already" in line
        assert (tmp_path / other).read_text() == "mine"
    make_tokenizer("qwen2", tmp_path / "onnx")
    before = (tmp_path / "onnx/tokenizer.json").read_bytes()
    line = fails(capsys, "--from_weight", base, "--format", "onnx", "--output", tmp_path / "onnx/x.onnx")
    assert "has the tokenizer of another model" in line
    assert (tmp_path / "onnx/tokenizer.json").read_bytes() == before


def test_the_flags_have_one_default_each():
    assert ExportArguments().chosen_dtype == "f16"
    assert ExportArguments(format="onnx").chosen_dtype == "f32"


# ---- the Modelfile ---------------------------------------------------------------------------------


def modelfile_of(directory, tmp_path, generation: str = "{}") -> str:
    from minillm.export.modelfile import modelfile

    (directory / "generation_config.json").write_text(generation, encoding="utf-8")
    return modelfile(tmp_path / "m.gguf", load_tokenizer(directory), directory)[0]


def test_a_modelfile_of_chatml(tmp_path):
    directory = make_tokenizer("llama2_chatml", tmp_path / "t")
    generation = '{"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.05, "do_sample": true}'
    assert modelfile_of(directory, tmp_path, generation) == (
        "FROM ./m.gguf\n"
        "# this model's chat template has no proven translation: write a TEMPLATE by hand, or use llama-server\n"
        "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.05\n"
        'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    )  # this tokenizer adds bos to a text, its template does not write one: Ollama would add a token
    directory = make_tokenizer("minimind2", tmp_path / "u", template=CHATML)
    text = modelfile_of(directory, tmp_path, generation)
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert "SYSTEM" not in text


def test_a_default_system_message_is_kept(tmp_path):
    text = modelfile_of(make_tokenizer("qwen2", tmp_path / "t"), tmp_path)
    assert 'SYSTEM """You are Layout."""' in text


def test_llama3_writes_bos_once(tmp_path):
    text = modelfile_of(make_tokenizer("llama3", tmp_path / "t"), tmp_path)
    assert 'TEMPLATE """{{- range .Messages }}<|start_header_id|>' in text
    assert "<|begin_of_text|>" not in text


@pytest.mark.parametrize("layout", ["qwen3", "minimind3", "llama2", "deepseek"])
def test_other_templates_are_not_guessed(layout, tmp_path):
    text = modelfile_of(make_tokenizer(layout, tmp_path / "t"), tmp_path)
    assert ("TEMPLATE" in text.split("#")[0]) == (layout == "qwen3")  # qwen3's has habits only in answers that think
