"""The load of the experts: what a run counts, over which it moves the bias, and what it writes down."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from minillm.checkpoints import checkpoint
from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import RouterStats, Transformer
from minillm.model.moe import Router
from minillm.model.router_stats import relative_entropy
from minillm.model.sizes import active_parameters, describe_parameters, flops_per_token, trained_parameters
from minillm.training import state
from minillm.training.balance import Balance
from tests.contracts import checks
from tests.contracts.checks import ScaledEngine
from tests.contracts.harness import (
    CONFIG,
    MOE_CONFIG,
    RaggedRows,
    arguments,
    largest_difference,
    tiny_model,
    train,
)

N_LAYERS, E, K = 2, MOE_CONFIG.num_experts, MOE_CONFIG.num_experts_per_tok
BIASES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
SOFTMAX = dataclasses.replace(
    MOE_CONFIG, scoring_func="softmax", n_shared_experts=0, use_qk_norm=True, moe_intermediate_size=10
)


def settings(aux=0.3, z=0.2, speed=0.125):
    return SimpleNamespace(router_aux_loss_coef=aux, router_z_loss_coef=z, router_bias_update_speed=speed)


def micro_batches(n):
    return StepBatches(RaggedRows(3 * n), batch_size=3, global_batch_size=3 * n).step(0, 0)


def choices_of(model, batches):
    """Return, per layer, the chosen experts of every token that is one, found by looking at the routers."""
    found = [[] for _ in range(N_LAYERS)]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for batch in batches:
        hooks = []
        for layer, router in enumerate(routers):

            def look(module, args, out, layer=layer, batch=batch):
                for token, experts in zip(batch["document_ids"].flatten().tolist(), out[2].tolist(), strict=True):
                    found[layer] += experts if token >= 0 else []

            hooks.append(router.register_forward_hook(look))
        with torch.no_grad():
            causal_lm_loss(model, batch)
        for hook in hooks:
            hook.remove()
    return found


def test_a_step_is_counted_summed_and_balanced():
    model = tiny_model(double=True, config=MOE_CONFIG)
    balance, batches = Balance(model, settings(), Ranks()), micro_batches(4)
    plain = sum(causal_lm_loss(model, batch)[0].item() for batch in batches)
    whole = sum(causal_lm_loss(model, batch, balance.stats)[0].item() for batch in batches)
    assert float(balance.collect()) == pytest.approx(whole - plain, rel=1e-9)
    chosen = choices_of(model, batches)  # before the bias moves
    balance.apply()
    row = balance.row()
    for layer, experts in enumerate(chosen):
        counts = [experts.count(e) for e in range(E)]
        mean = len(experts) / E
        bias = model.state_dict()[BIASES[layer]]
        assert bias.tolist() == [0.125 * ((mean > count) - (mean < count)) for count in counts]
        assert row["expert_share"][layer] == pytest.approx([count / len(experts) for count in counts], abs=5e-6)
    shares = [[experts.count(e) / len(experts) for e in range(E)] for experts in chosen]
    assert row["expert_load_max"] == pytest.approx(max(max(layer) for layer in shares) * E)
    entropies = [-sum(p * math.log(p) for p in layer if p) / math.log(E) for layer in shares]
    assert row["expert_entropy"] == pytest.approx(sum(entropies) / N_LAYERS)
    assert row["dropped"] == 0
    terms = 0.3 * row["balance_loss"] + 0.2 * row["z_loss"]  # means over targets and layers
    n_targets = sum(int((batch["targets"] != -100).sum()) for batch in batches)
    assert terms * n_targets * N_LAYERS == pytest.approx(whole - plain, rel=1e-9)
    assert json.loads(json.dumps(row)) == row


def test_a_row_covers_all_steps_since_the_last():
    model = tiny_model(double=True, config=MOE_CONFIG)
    balance, batches = Balance(model, settings(speed=0.0), Ranks()), micro_batches(4)
    for batch in batches[:3]:
        causal_lm_loss(model, batch, balance.stats)
        balance.collect()
        balance.apply()
    shares = balance.row()["expert_share"]
    chosen = choices_of(model, batches[:3])
    for layer, experts in enumerate(chosen):
        assert shares[layer] == pytest.approx([experts.count(e) / len(experts) for e in range(E)], abs=5e-6)
    assert balance.row()["expert_share"] is None  # nothing since
    assert not model.state_dict()[BIASES[0]].any()  # speed 0


def test_softmax_routing_has_no_bias_to_move():
    model = tiny_model(config=SOFTMAX)
    balance = Balance(model, settings(), Ranks())
    causal_lm_loss(model, micro_batches(1)[0], balance.stats)
    balance.collect()
    balance.apply()
    assert 0 < balance.row()["expert_entropy"] <= 1
    assert not list(model.buffers())


def test_a_dense_model_has_none_of_this():
    balance = Balance(tiny_model(), settings(), Ranks())
    assert balance.stats is None
    assert (balance.collect(), balance.row(), balance.settings(), balance.state()) == (0.0, {}, {}, None)
    balance.apply()
    balance.load_state(None)


def test_a_loop_that_forgets_the_statistics_is_told():
    balance = Balance(tiny_model(config=MOE_CONFIG), settings(), Ranks())
    with pytest.raises(RuntimeError, match=r"run\.router_stats"):
        balance.collect()


def test_state_comes_back():
    model = tiny_model(config=MOE_CONFIG)
    one, two = (Balance(model, settings(speed=0.0), Ranks()) for _ in range(2))
    assert one.state() is None
    causal_lm_loss(model, micro_batches(1)[0], one.stats)
    one.collect()
    one.apply()
    two.load_state(one.state())
    assert two.row() == one.row()


# ---- within a run ------------------------------------------------------------------------------------------------


def rows_of(directory):
    (path,) = directory.glob("*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_metrics_and_the_directory(tmp_path):
    train(arguments(tmp_path, batch_size=4, log_interval=2, max_steps=4), config=MOE_CONFIG)
    assert (tmp_path / "pretrain_16_moe").is_dir()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert {"balance_loss", "z_loss", "expert_load_max", "expert_entropy", "expert_share", "dropped"} <= set(row)
        assert row["balance_loss"] > 0
        assert 1 <= row["expert_load_max"] <= E / K
        assert [len(layer) for layer in row["expert_share"]] == [E] * N_LAYERS
    train(arguments(tmp_path / "dense", batch_size=4))
    assert not any("expert" in name for name in rows_of(tmp_path / "dense")[0])


def test_the_loss_in_the_rows_is_that_of_the_tokens_alone(tmp_path):
    """So that it compares with the validation loss; the gradients have the routers' part nevertheless."""
    first = []
    for coef in (0.0, 10.0):
        args = arguments(
            tmp_path / str(coef), batch_size=4, max_steps=1, router_aux_loss_coef=coef, router_z_loss_coef=coef
        )
        first += train(args, config=MOE_CONFIG)["metrics"]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    assert first[1]["grad_norm"] > 1.5 * first[0]["grad_norm"]
    assert first[0]["balance_loss"] == pytest.approx(first[1]["balance_loss"], rel=1e-6)


def test_recomputed_blocks_are_counted_once(tmp_path):
    """Checkpointing calls each router twice: the rows of metrics and the weights must not notice."""
    plain, again = (
        train(arguments(tmp_path / str(recompute), batch_size=4, gradient_checkpointing=recompute), config=MOE_CONFIG)
        for recompute in (False, True)
    )
    for ours, wanted in zip(again["metrics"], plain["metrics"], strict=True):
        assert ours["expert_share"] == wanted["expert_share"]
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert largest_difference(again["weights"], plain["weights"]) <= 1e-6


def test_a_skipped_step_moves_no_bias_and_is_not_counted(tmp_path):
    biases = []

    def poison(run):
        if run.step == 1:
            next(run.model.parameters()).grad.view(-1)[3] = math.inf
        biases.append([run.model.state_dict()[name].clone() for name in BIASES])

    args = arguments(tmp_path, batch_size=4, max_steps=3)
    train(args, engine=ScaledEngine, before_update=poison, config=MOE_CONFIG)
    before_first, before_second, before_third = (torch.cat(bias) for bias in biases)
    assert not before_first.any()
    assert before_second.any()
    assert torch.equal(before_second, before_third)
    shares = [row["expert_share"] for row in rows_of(tmp_path)]
    assert [share is None for share in shares] == [False, True, False]


def test_the_bias_evens_out_the_load(tmp_path):
    """The first expert attracts everyone at first; without its losses and with the weights frozen the bias must do."""

    def prepare(run):
        for name, bias in run.model.named_buffers():
            assert name in BIASES
            bias[0] = 0.3

    args = arguments(
        tmp_path, batch_size=8, max_steps=60, learning_rate=1e-30, weight_decay=0.0, router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0, router_bias_update_speed=0.02, log_interval=10,
    )  # fmt: skip
    rows = train(args, config=MOE_CONFIG, prepare=prepare)["metrics"]
    assert rows[0]["expert_entropy"] < 0.95
    assert rows[-1]["expert_entropy"] > 0.985
    assert rows[-1]["expert_load_max"] < 0.8 * rows[0]["expert_load_max"]


def test_other_coefficients_do_not_go_on_with_a_checkpoint(tmp_path):
    common = {"batch_size": 4, "save_interval": 1}
    train(arguments(tmp_path, **common), config=MOE_CONFIG)
    with pytest.raises(UserError, match=r"router_aux_loss_coef: 0\.001 then, 0\.01 now"):
        train(arguments(tmp_path, from_resume=True, router_aux_loss_coef=0.01, **common), config=MOE_CONFIG)


def test_a_dense_checkpoint_without_a_word_of_experts_is_gone_on_with(tmp_path, monkeypatch):
    real = checkpoint.load_state
    old = lambda path: {name: part for name, part in real(path).items() if name != "experts"}  # noqa: E731
    train(arguments(tmp_path, batch_size=4, save_interval=1))
    monkeypatch.setattr(checkpoint, "load_state", old)
    rows = train(arguments(tmp_path, batch_size=4, save_interval=1, from_resume=True))["metrics"]
    assert [row["step"] for row in rows] == [1, 2, 3]


# ---- seeded bugs -------------------------------------------------------------------------------------------------


def partition(directory):
    checks.partition_invariance(directory, double=True, bound=1e-12, config=MOE_CONFIG)


def resume(directory):
    checks.resume_is_exact(directory, config=MOE_CONFIG, log_interval=3)


begin, finish, resume_from = RouterStats.begin, RouterStats.finish, state.resume_from


def mean_over_the_micro_batch(stats, batch):
    """Each row weighs as the mean row of its micro-batch: whom it shares that with decides."""
    begin(stats, batch)
    stats._targets = torch.full_like(stats._targets, stats._targets.double().mean(), dtype=torch.float64)


def padding_counts(stats, batch):
    """Padding is routed in the statistics: the longest row of a micro-batch decides."""
    begin(stats, {"targets": batch["targets"]})


def last_micro_batch_alone(stats):
    """The bias moves by the counts of a step's last micro-batch."""
    stats.reset()
    return finish(stats)


def resume_without_bias(run, path, saved):
    """The bias is taken for a constant and left out of the checkpoint."""
    resume_from(run, path, saved)
    for bias in run.model.buffers():
        bias.zero_()


BUGS = {
    "mean over the micro-batch": (partition, RouterStats, "begin", mean_over_the_micro_batch),
    "padding counts": (partition, RouterStats, "begin", padding_counts),
    "counts of the last micro-batch": (partition, RouterStats, "finish", last_micro_batch_alone),
    "load not restored": (resume, Balance, "load_state", lambda balance, state: None),
    "bias not restored": (resume, state, "resume_from", resume_without_bias),
}


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_caught(name, tmp_path, monkeypatch):
    check, owner, attribute, bug = BUGS[name]
    monkeypatch.setattr(owner, attribute, bug)
    with pytest.raises(AssertionError):
        check(tmp_path)


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_relative_entropy():
    assert relative_entropy([0.25] * 4) == pytest.approx(1)
    assert relative_entropy([0.0, 1.0, 0.0]) == 0
    assert relative_entropy([1.0]) == 1
    assert relative_entropy([0.5, 0.5, 0, 0]) == pytest.approx(0.5)


def test_the_active_share():
    model = tiny_model(config=MOE_CONFIG)
    total, active = active_parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    idle = sum(block.mlp.experts.gate_up_proj[K:].numel() * 3 // 2 for block in model.model.layers[1:])
    assert active == total - idle
    assert describe_parameters(model) == f"{total:,} ({active:,} active per token, {active / total:.0%})"
    dense = tiny_model()
    assert describe_parameters(dense) == f"{CONFIG.num_parameters():,}"
    with torch.device("meta"):
        preset = Transformer(ModelConfig.preset("moe"))
    assert [round(n / 1e6) for n in active_parameters(preset)] == [145, 92]


def test_frozen_routers_are_left_as_they_are(tmp_path):
    """An adapter is trained: the bias belongs to the model beneath, which must stay what it was."""
    model = tiny_model(config=MOE_CONFIG)
    apply_lora(model, rank=2)
    balance = Balance(model, settings(), Ranks())
    assert balance.stats is None
    assert balance.collect() == 0.0
    balance.apply()
    assert not any(model.get_buffer(name).any() for name in BIASES)
    assert balance.row() == balance.settings() == {}


def test_parameters_that_are_trained_are_told():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    assert describe_parameters(model) == f"{total:,}"
    apply_lora(model, rank=2, target_modules="q_proj")
    trained = 2 * 2 * (16 + 16)  # two blocks: A and B of rank 2
    assert trained_parameters(model) == trained
    share = trained / (total + trained)
    assert describe_parameters(model) == f"{total + trained:,}, {trained} of them trained ({share:.2%})"


def test_frozen_weights_save_the_third_of_their_own_gradient():
    model = tiny_model()
    whole = flops_per_token(model, 32)
    assert whole == CONFIG.flops_per_token(32)
    apply_lora(model, rank=2, target_modules="q_proj")
    assert flops_per_token(model, 32) == pytest.approx(whole * 2 / 3 + 6 * 2 * 2 * (16 + 16))
