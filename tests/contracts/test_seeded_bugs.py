"""Ten classic training bugs, each put in once: the check that guards against it must fail.

A check that cannot fail proves nothing. The tenth, a forward pass that bypasses DDP, needs two processes and
stands in ``test_engines.py``.
"""

import importlib

import pytest
import torch
from torch import nn

from minillm.checkpoints import checkpoint
from minillm.data.cache.shards import TokenStore
from minillm.distributed.engine import Engine
from minillm.model import KVCache, attention_plan
from minillm.training import optim, state
from minillm.training.step import Step
from tests.contracts import checks

cross_entropy = importlib.import_module("minillm.losses.cross_entropy")  # the package exports a function of this name
linear_cross_entropy, gather, begin = cross_entropy.linear_cross_entropy, TokenStore.gather, KVCache.begin
resume_from = state.resume_from


def mean_of_means(step, loss_sum, n_targets):
    """Each micro-batch divided by its own count: short ones weigh too much."""
    step.local_loss_sum += loss_sum.detach().double()
    step.local_count += n_targets
    step.engine.backward(loss_sum / max(float(n_targets), 1.0) / len(step))


def double_shift(hidden, weight, targets, weights=None, target_positions=None):
    """Targets that are shifted already, shifted once more in the loss."""
    return linear_cross_entropy(hidden[:, :-1], weight, targets[:, 1:], weights)


def unshifted_mask(store, column, index):
    """The answer mask taken at the inputs instead of at the targets."""
    return gather(store, column, index - 1 if column == "mask" else index)


def resume_one_batch_late(run, path, saved):
    """The data cursor points behind the batch that comes next."""
    resume_from(run, path, saved)
    run.progress.step_in_epoch += 1


def position_of_the_longest(cache, seq_len, document_ids):
    """Every row goes on at the position of the longest one."""
    begin(cache, seq_len, document_ids)
    cache.position_ids = cache.longest + torch.arange(seq_len).expand_as(cache.position_ids)


def causal_only(document_ids, window=None):
    """A causal mask that forgets the documents."""
    seq_len = document_ids.shape[1]
    return torch.ones(seq_len, seq_len, dtype=torch.bool).tril()[None, None]


def decay_everything(model, *, learning_rate, weight_decay, **options):
    """One parameter group: the norms' scales decay too."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)


def clip_before_unscale(engine, max_norm):
    """The norm of scaled gradients compared with a limit for unscaled ones."""
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    engine.scaler.unscale_(engine.optimizer)
    return norm


def partition_invariance(directory):
    checks.partition_invariance(directory, double=True, bound=1e-12)


BUGS = {
    "mean of means": (partition_invariance, Step, "backward", mean_of_means),
    "double shift": (checks.loss_is_next_token, cross_entropy, "linear_cross_entropy", double_shift),
    "unshifted mask": (checks.answers_are_the_targets, TokenStore, "gather", unshifted_mask),
    "RNG not restored": (checks.resume_is_exact, checkpoint, "set_rng_state", lambda state: None),
    "off-by-one resume": (checks.resume_is_exact, state, "resume_from", resume_one_batch_late),
    "cache position": (checks.cache_equals_full, KVCache, "begin", position_of_the_longest),
    "mask leak between documents": (checks.documents_are_apart, attention_plan, "document_mask", causal_only),
    "decay on norms": (checks.norms_do_not_decay, optim, "adamw", decay_everything),
    "clip before unscale": (checks.loss_scale_changes_nothing, Engine, "clip", clip_before_unscale),
}


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_caught(name, tmp_path, monkeypatch):
    check, owner, attribute, bug = BUGS[name]
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    check(tmp_path / "right")
    monkeypatch.setattr(owner, attribute, bug)
    with pytest.raises(AssertionError):
        check(tmp_path / "wrong")
