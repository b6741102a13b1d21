"""The validation loss against a loop over single tokens: one sum, one count, one division."""

import math

import numpy as np
import pytest
import torch

from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.objectives.objective import Objective
from minillm.training.validation import evaluate_loss

V = 37
LENGTHS = [9, 1, 4, 12, 2, 7, 5]  # with batches of 3, the last micro-batch holds two rows of padding


class Rows:
    """Ragged rows of one document each; targets with holes, and one row without any."""

    fixed_len = None
    target_bytes = 0
    log_prob = None

    def __init__(self, *, weighted=False):
        rng = np.random.default_rng(4)
        self.rows = []
        for number, length in enumerate(LENGTHS):
            targets = rng.integers(0, V, length)
            targets[rng.random(length) < 0.3] = -100
            if number == 3:
                targets[:] = -100
            row = {"input_ids": rng.integers(0, V, length), "targets": targets}
            row |= {"position_ids": np.arange(length), "document_ids": np.zeros(length, int)}
            if weighted:
                row["weights"] = rng.random(length).astype(np.float32)
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.fixture
def model():
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Transformer(ModelConfig(vocab_size=V, initializer_range=0.3, **shape)).double()


@pytest.fixture
def sparse_model():
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 5, "scoring_func": "sigmoid", "n_shared_experts": 1, "moe_intermediate_size": 8}
    return Transformer(ModelConfig(vocab_size=V, initializer_range=0.3, **shape, **experts)).double()


def evaluate(model, loader, **options):
    engine = Engine(Ranks(), torch.device("cpu"))
    engine.wrap(model)
    return evaluate_loss(engine, loader, Objective(causal_lm_loss), **options)


def by_hand(model, rows):
    """Σ −log p and Σ weights, one row and one token at a time."""
    loss_sum = n_targets = 0.0
    for row in rows.rows:
        with torch.no_grad():
            logits = model(torch.from_numpy(row["input_ids"])[None])[0]
        for position, target in enumerate(row["targets"]):
            if target != -100:
                weight = float(row["weights"][position]) if "weights" in row else 1.0
                loss_sum += weight * float(torch.logsumexp(logits[position], 0) - logits[position][target])
                n_targets += weight
    return loss_sum, n_targets


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "global_batch_size"), [(1, 1), (3, 3), (2, 6), (8, 8)])
def test_the_loss_is_the_sum_over_the_count_however_it_is_cut(model, weighted, batch_size, global_batch_size):
    rows = Rows(weighted=weighted)
    loader = StepBatches(rows, batch_size=batch_size, global_batch_size=global_batch_size, shuffle=False)
    result = evaluate(model, loader)
    loss_sum, n_targets = by_hand(model, rows)
    assert result["n_targets"] == pytest.approx(n_targets, rel=1e-12)
    assert result["loss"] == pytest.approx(loss_sum / n_targets, rel=1e-12)
    assert set(result) == {"loss", "n_targets"}  # nothing is known of bytes or a floor


def test_bits_per_byte_and_the_floor(model):
    rows = Rows()
    rows.target_bytes, rows.log_prob = 91, -13.5
    result = evaluate(model, StepBatches(rows, batch_size=3, global_batch_size=3, shuffle=False))
    loss_sum, n_targets = by_hand(model, rows)
    assert result["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / 91, rel=1e-12)
    assert result["floor"] == pytest.approx(13.5 / n_targets, rel=1e-12)


def test_experts_add_nothing_to_the_validation_loss(sparse_model):
    rows = Rows()
    result = evaluate(sparse_model, StepBatches(rows, batch_size=3, global_batch_size=3, shuffle=False))
    loss_sum, n_targets = by_hand(sparse_model, rows)
    assert result == {"loss": pytest.approx(loss_sum / n_targets, rel=1e-12), "n_targets": n_targets}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_meanwhile_and_the_mode_comes_back(model, training):
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, out: torch.nn.functional.dropout(out, 0.9, module.training)
    )
    model.train(training)
    loader = StepBatches(Rows(), batch_size=3, global_batch_size=3, shuffle=False)
    results = [evaluate(model, loader) for _ in range(2)]
    assert results[0] == results[1]
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_target_at_all_is_zero(model):
    rows = Rows()
    for row in rows.rows:
        row["targets"][:] = -100
    result = evaluate(model, StepBatches(rows, batch_size=3, global_batch_size=3, shuffle=False))
    assert result == {"loss": 0.0, "n_targets": 0.0}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("batch_size", "global_batch_size"), [(1, 1), (3, 3), (2, 6), (8, 8)])
def test_accuracy_is_the_share_of_targets_that_are_most_probable(model, weighted, batch_size, global_batch_size):
    """Every target counts alike, whatever it weighs. Some targets are made right, or few would be."""
    rows = Rows(weighted=weighted)
    n_hits = n_targets = 0
    for number, row in enumerate(rows.rows):
        with torch.no_grad():
            best = model(torch.from_numpy(row["input_ids"])[None])[0].argmax(-1).numpy()
        has_target = row["targets"] != -100
        is_set = has_target & (np.arange(len(best)) % 3 == number % 3)
        row["targets"] = np.where(is_set, best, row["targets"])
        for place in range(len(best)):
            n_targets += bool(has_target[place])
            n_hits += bool(has_target[place] and row["targets"][place] == best[place])
    assert 0 < n_hits < n_targets
    loader = StepBatches(rows, batch_size=batch_size, global_batch_size=global_batch_size, shuffle=False)
    result = evaluate(model, loader, with_accuracy=True)
    assert result["accuracy"] == pytest.approx(n_hits / n_targets, rel=1e-12)
    assert "accuracy" not in evaluate(model, loader)


def test_an_adapted_output_layer_has_an_accuracy_too(model):
    """It makes logits itself, so the head gets no weight."""
    rows = Rows()
    loader = StepBatches(rows, batch_size=3, global_batch_size=3, shuffle=False)
    before = evaluate(model, loader, with_accuracy=True)
    apply_lora(model, rank=2, target_modules=["lm_head"])
    assert evaluate(model, loader, with_accuracy=True) == pytest.approx(before)
