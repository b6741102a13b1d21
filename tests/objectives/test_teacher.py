"""The teacher: what it says, whom it refuses, and its best tokens on disk."""

import pytest
import torch

from minillm.data import StepBatches
from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.model import Transformer
from minillm.objectives.teacher import Teacher
from minillm.tokenizer import train_bpe
from minillm.training.run import Run
from tests.contracts.distill_runs import V, arguments, make_teacher, make_tokenizer, shape
from tests.contracts.harness import RaggedRows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def teach(tmp_path, tokenizer):
    """Call it with settings: (teacher, run) of the directory ``teacher``."""

    def teach(path=None, **changes):
        path = path or make_teacher(tmp_path / "out" / "full_sft_24", tokenizer)
        args = arguments(tmp_path / "out", path, **changes)
        return Teacher(args, Run(args, stage="distill").engine, tokenizer), path

    return teach


def test_its_outputs_multiply_to_its_logits(teach):
    teacher, path = teach()
    batch = StepBatches(RaggedRows(), batch_size=7, global_batch_size=7).step(0, 0)[0]
    outputs = teacher.outputs(batch)
    plain = load_model(path).train()
    logits = plain(batch["input_ids"], position_ids=batch["position_ids"], document_ids=batch["document_ids"])
    assert torch.equal(outputs["teacher_hidden"] @ outputs["teacher_weight"].T, logits)
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("name", ["{path}", "full_sft_24"])
def test_it_is_found_by_directory_or_stage_with_width(teach, name):
    _, path = teach()
    assert teach(name.format(path=path))[0].model.config.hidden_size == 24


def test_a_missing_one_is_named_with_what_there_is(teach, tmp_path):
    teach()
    with pytest.raises(UserError) as error:
        teach("full_sft_99")
    assert "full_sft_99" in str(error.value)
    assert "full_sft_24" in str(error.value)


def test_another_tokenizer_is_refused(teach, tmp_path):
    other = train_bpe(iter(["一只老狐狸 a quick brown cat"]), vocab_size=V)
    path = make_teacher(tmp_path / "other", other)
    with pytest.raises(UserError) as error:
        teach(path)
    assert all(word in str(error.value) for word in ("another tokenizer", str(path), "train_sft.py"))
    (path / "tokenizer.json").unlink()  # nothing lies beside the weights: taken to be the same
    teach(path)


def test_positions_are_compared(teach, tmp_path, tokenizer):
    path = make_teacher(tmp_path / "short", tokenizer, max_position_embeddings=16)
    with pytest.raises(UserError, match="16 positions"):
        teach(path)


def test_fewer_tokens_than_the_tokenizer_are_refused(teach, tmp_path, tokenizer):
    save_model(Transformer(shape(24, vocab_size=V - 1)), tmp_path / "small")
    with pytest.raises(UserError, match=f"embeddings for {V - 1} tokens"):
        teach(tmp_path / "small")


def test_its_best_tokens_are_those_of_its_logits(teach):
    teacher, path = teach(top_k=5, temperature=2.0)
    rows = RaggedRows()
    found = teacher.add_to(rows, vocab_size=V - 10)
    plain = load_model(path)
    for index in (0, 1, 17, 32):
        row = found[index]
        columns = {name: torch.from_numpy(row[name])[None] for name in ("input_ids", "position_ids", "document_ids")}
        logits = plain(**columns)[0, :, : V - 10]
        best = torch.log_softmax(logits / 2.0, dim=-1).topk(5)
        has_target = row["targets"] != -100
        ids, log_probs = (torch.from_numpy(row[name].copy()) for name in ("teacher_ids", "teacher_log_probs"))
        assert (ids[has_target].long() == best.indices[has_target]).all()
        torch.testing.assert_close(
            log_probs[has_target].float(), best.values[has_target], rtol=1e-3, atol=1e-3
        )  # kept as float16
        assert (ids[~has_target] == 0).all()


def test_its_size_is_limited(teach):
    teacher, _ = teach(top_k=64, max_cache_gib=1e-6)
    with pytest.raises(UserError, match="--max_cache_gib"):
        teacher.add_to(RaggedRows(), vocab_size=V)
