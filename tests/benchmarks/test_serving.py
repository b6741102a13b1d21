"""The benchmarks of decoding and serving at tiny sizes: both sides give the same ids, and the figures are there."""

import json

import pytest
import torch

from benchmarks import generate, serve


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_generate(tmp_path, capsys):
    pytest.importorskip("transformers")
    flags = "--shapes demo --batch_sizes 1,3 --prompt_len 5 --max_new_tokens 6 --rounds 1 --compile 0 --num_threads 1"
    generate.main([*flags.split(), "--output", str(tmp_path / "generate.json")])
    results = json.loads((tmp_path / "generate.json").read_text())["results"]
    assert [result["batch_size"] for result in results] == [1, 3]
    for result in results:
        assert set(result["ratio"]) == {"transformers", "generate", "engine"}
        assert all(result["same_ids"].values())
    assert results[0]["bandwidth_share"] > 0
    assert "engine tok/s" in capsys.readouterr().out


def test_serve(tmp_path, capsys):
    flags = "--shape demo --n_clients 3 --max_new_tokens 6 --rounds 1 --compile 0 --num_threads 1"
    serve.main([*flags.split(), "--output", str(tmp_path / "serve.json")])
    results = json.loads((tmp_path / "serve.json").read_text())["results"]
    assert all(results["clients"]["same_ids"].values())
    assert set(results["first_token"]) == {"whole prompts", "parts of 64"}
    assert results["repeats"]["same_ids"]
    assert results["repeats"]["tokens_per_step"] > 1
    assert "all at once" in capsys.readouterr().out
