"""When a loss is said to diverge, and when it is not: series of losses, as runs have them."""

import math
import random

import pytest

from minillm.reports.divergence import LossAlarm, advice_of
from tests.contracts.harness import arguments

V = 1024  # ln V = 6.931


def steps_of(losses, **settings):
    """Return the alarm, and the steps at which it spoke."""
    alarm = LossAlarm(**({"vocab_size": V, "from_scratch": False} | settings))
    return alarm, [step for step, loss in enumerate(losses, 1) if alarm.train(step, loss)]


def noisy(losses, spread, seed=0, most=0.25):
    """Return the losses with what batches add to them: a share of the loss, at most 0.25 nats of tokens."""
    draw = random.Random(seed)
    return [max(1e-4, loss + draw.gauss(0, min(spread * loss, most))) for loss in losses]


def falling(start, end, n, per_step=0.02):
    return [end + (start - end) * math.exp(-per_step * step) for step in range(n)]


QUIET = {
    "pretraining": (falling(6.95, 0.92, 2000), 0.02, {"from_scratch": True}),
    "fine-tuning to a loss near zero": (falling(3.0, 0.012, 1500), 0.5, {}),
    "batches of one row, some of them hard": ([0.01 if step % 9 else 3.0 for step in range(500)], 0.2, {}),
    "a learned model, hard rows first": ([0.02, 0.03, 2.5] + [0.1] * 100, 0.1, {}),
    "an adapter": (falling(4.2, 0.15, 945), 0.3, {}),
    "unseen end tokens": (falling(6.2, 0.2, 300), 0.05, {}),
    "dpo": (falling(math.log(2), 0.02, 60), 0.5, {"unit": "pair"}),
    "dpo with an sft term": (falling(math.log(2) + 1.5, 0.3, 200), 0.3, {"unit": "pair"}),
    "ipo, which begins at 25": (falling(25.0, 3.0, 300), 0.6, {"unit": "pair"}),
    "distillation at temperature 4, above ln V": (falling(60.0, 4.0, 400), 0.1, {"is_cross_entropy": False}),
}


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_cry_wolf(name, seed):
    losses, spread, settings = QUIET[name]
    alarm, steps = steps_of(noisy(losses, spread, seed, most=math.inf if losses[0] > 20 else 0.25), **settings)
    assert (steps, alarm.messages) == ([], [])


@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_loss_above_that_of_guessing(from_scratch):
    start = 6.93 if from_scratch else 2.0
    alarm, steps = steps_of([start, 500.0, 900.0, *[2000.0] * 20], from_scratch=from_scratch)
    assert steps == [2]
    assert "step 2: the training loss" in alarm.messages[0]
    assert "ln V = 6.931" in alarm.messages[0]


def test_weights_that_do_not_know_the_data_are_said_at_the_first_step():
    alarm, steps = steps_of([15.0, 14.0, *falling(13.0, 1.0, 200, 0.05)])
    assert steps == [1]
    assert "the loss of the first step is 15.000" in alarm.messages[0]
    assert "--from_weight" in alarm.messages[0]


def test_markers_that_are_new_to_a_base_model_are_a_note():
    """The demo's fine-tuning begins at 8.3 after a short pretraining, and is below ln V within a few steps."""
    alarm = LossAlarm(vocab_size=V, from_scratch=False)
    said = [alarm.train(step, loss) for step, loss in enumerate(falling(8.3, 0.2, 300, 0.1), 1)]
    assert said[0].startswith("note: the loss of the first step is 8.300, more than ln V = 6.931")
    assert said[1:] == [None] * 299
    assert alarm.messages == []


def test_above_guessing_for_long_is_no_beginning():
    alarm, steps = steps_of([8.3] * 60)
    assert steps == [1, 30]  # a note, and a warning
    assert "step 30: the training loss" in alarm.messages[0]
    assert not alarm.valid(1, 8.3)
    assert "ln V" in alarm.valid(60, 8.3)


@pytest.mark.parametrize("loss, warns", [(6.93, False), (7.42, False), (6.44, False), (6.42, True), (7.44, True)])
def test_a_fresh_model_starts_near_guessing(loss, warns):
    alarm, steps = steps_of([loss], from_scratch=True)
    assert bool(steps) == warns
    assert all("ln V = 6.931" in line and f"{loss:.3f}" in line for line in alarm.messages)


def test_three_times_the_best_below_guessing():
    losses = noisy([*falling(3.0, 0.5, 300), *[4.0] * 100], 0.1)
    alarm, steps = steps_of(losses)
    assert len(steps) == 1
    assert 300 < steps[0] <= 325
    assert "3 times its best, 0.5" in alarm.messages[0]


def test_every_episode_is_said_once():
    calm, high = falling(3.0, 0.5, 200), [5.0] * 60
    _, steps = steps_of([*calm, *high, *[0.5] * 200, *high])
    assert len(steps) == 2
    assert 200 < steps[0] < 260
    assert steps[1] > 460


@pytest.mark.parametrize("unit, losses, n", [("pair", [math.log(2), *[0.1] * 50, *[0.9] * 60], 0),
                                             ("pair", [math.log(2), *[0.1] * 50, *[1.5] * 60], 1),
                                             ("token", [math.log(2), *[0.1] * 50, *[0.9] * 60], 1)])  # fmt: skip
def test_losses_of_pairs_are_compared_with_their_beginning(unit, losses, n):
    """0.9 is nine times the best, but not much above ln 2, where an untrained model is."""
    assert len(steps_of(losses, unit=unit)[1]) == n


def test_validation():
    alarm = LossAlarm(vocab_size=V, from_scratch=False, advice="lower it")
    losses = [2.0, 0.4, 0.6, 1.69, 1.71, 2.0, 0.4, 8.0]
    said = [bool(alarm.valid(step, loss)) for step, loss in enumerate(losses, 40)]
    assert said == [False, False, False, False, True, False, False, True]
    assert "the validation loss is 1.710, more than 3 times its best, 0.400; lower it" in alarm.messages[0]
    assert "ln V" in alarm.messages[1]
    distilled = LossAlarm(vocab_size=V, from_scratch=False, is_cross_entropy=False)
    assert distilled.valid(40, 8.0)  # of distillation, validation is a cross-entropy


def test_a_resumed_alarm_goes_on_where_it_was():
    losses = noisy([*falling(3.0, 0.3, 120), *[4.0] * 60], 0.2)
    whole, steps = steps_of(losses)
    for cut in (1, 60, 130, 170):
        first, early = steps_of(losses[:cut])
        second = LossAlarm(vocab_size=V, from_scratch=False)
        second.load_state(first.state())
        late = [step for step, loss in enumerate(losses[cut:], cut + 1) if second.train(step, loss)]
        assert early + late == steps
        assert second.messages == whole.messages


def test_the_advice_names_the_values(tmp_path):
    text = advice_of(arguments(tmp_path, learning_rate=10.0, warmup_ratio=0.02, grad_clip=0.5))
    for words in ("--learning_rate (now 10)", "--warmup_ratio (now 0.02)", "lower --grad_clip (now 0.5)"):
        assert words in text
    assert "set --grad_clip 1" in advice_of(arguments(tmp_path, grad_clip=0.0))
