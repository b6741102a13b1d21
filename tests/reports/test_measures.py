"""Means over what a loss counts, over micro-batches and ranks."""

from types import SimpleNamespace

import pytest
import torch

from minillm.reports.measures import NO_MEASURES, Measures

ALONE = SimpleNamespace(sum=lambda tensor: tensor, world_size=1, rank=0, is_main=True)


def test_means_over_micro_batches_of_different_sizes():
    measures = Measures(("margin", "length"), shown=("margin",))
    values = torch.tensor([1.0, 2.0, 6.0, 0.5, -3.0]), torch.tensor([3.0, 4.0])
    for cut in (slice(0, 1), slice(1, 5), slice(5, 5)):
        measures.add(margin=values[0][cut], length=values[1][cut])
    row = measures.row(ALONE)
    assert row == pytest.approx({"margin": 6.5 / 5, "length": 3.5})  # the mean of means would be another number
    assert measures.text(row) == ", margin 1.3"
    assert measures.row(ALONE) == {"margin": None, "length": None}  # begun anew


def test_ranks_are_added_up():
    measures = Measures(("margin",))
    measures.add(margin=torch.tensor([1.0, 2.0]))
    two = SimpleNamespace(sum=lambda tensor: tensor + torch.tensor([[9.0], [1.0]]))
    assert measures.row(two) == {"margin": 4.0}


def test_validation_counts_apart():
    measures = Measures(("margin",))
    measures.add(margin=torch.tensor([1.0]))
    before = measures.swap_sums(None)
    measures.add(margin=torch.tensor([100.0]))
    assert measures.row(ALONE) == {"margin": 100.0}
    measures.swap_sums(before)
    measures.add(margin=torch.tensor([3.0]))
    assert measures.row(ALONE) == {"margin": 2.0}


def test_a_checkpoint_keeps_what_was_counted():
    first, second = Measures(("margin",)), Measures(("margin",))
    first.add(margin=torch.tensor([0.1, 0.7], dtype=torch.float64))
    second.load_state([first.state()], ALONE)
    for measures in (first, second):
        measures.add(margin=torch.tensor([0.3], dtype=torch.float64))
    assert first.row(ALONE) == second.row(ALONE)
    second.load_state([None], ALONE)
    assert second.row(ALONE) == {"margin": None}


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_every_rank_goes_on_with_its_own_and_others_with_the_sum(n_ranks):
    """Two ranks have counted; on one or three ranks the main one goes on with all, and none is without a count."""
    states = [[[1.0], [2.0]], [[10.0], [3.0]]]
    found = []
    for rank in range(n_ranks):
        measures = Measures(("margin",))
        measures.load_state(states, SimpleNamespace(world_size=n_ranks, rank=rank, is_main=rank == 0))
        found.append(measures.state())
    assert found == (states if n_ranks == 2 else [[[11.0], [5.0]], *[[[0.0], [0.0]]] * (n_ranks - 1)])


def test_notes_need_a_whole_row():
    measures = Measures(("margin",), notes=lambda row: [f"margin is {row['margin']}"])
    assert measures.notes({"margin": None}) == []
    assert measures.notes({"margin": 2.0}) == ["margin is 2.0"]


def test_other_figures_than_named_are_a_mistake():
    with pytest.raises(ValueError, match="margin"):
        Measures(("margin",)).add(margins=torch.ones(1))
    assert NO_MEASURES.row(ALONE) == {}
    assert NO_MEASURES.text({"loss": 1.0}) == ""
    assert NO_MEASURES.notes({}) == []
