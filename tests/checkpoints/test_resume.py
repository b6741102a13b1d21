"""What a checkpoint holds and what is compared when a run resumes; the exactness itself is in tests/contracts."""

from pathlib import Path

import pytest

from minillm.checkpoints import resume
from minillm.checkpoints.interrupt import Interrupted
from minillm.errors import UserError
from minillm.reports.tracking import CLOCK, read_metrics
from minillm.training.state import identity_of, training_state
from minillm.training.step import Progress
from tests.contracts.pair_runs import arguments, train


def test_the_loss_is_part_of_what_must_be_the_same(tmp_path):
    settings = {"max_steps": 4, "save_interval": 2, "batch_size": 4}
    run, _ = train(arguments(tmp_path, **settings))
    assert identity_of(run)["beta"] == 0.3
    counters = training_state(run, [({}, [])])["counters"]
    older = {f"_{name}" if name in ("eval_step", "validation_due") else name: value for name, value in counters.items()}
    progress = Progress()
    progress.load_state(older)
    assert progress == run.progress
    with pytest.raises(UserError) as error:
        train(arguments(tmp_path, beta=0.5, loss_type="ipo", from_resume=True, **settings))
    assert "beta: 0.3 then, 0.5 now" in str(error.value)
    assert "loss_type: sigmoid then, ipo now" in str(error.value)
    with pytest.raises(UserError, match="reference's weights"):  # a model trained anew in the same place
        train(arguments(tmp_path, from_resume=True, **settings), double=True)


def test_figures_go_on_amid_a_window(tmp_path):
    """The checkpoint is at step 2 of a window of 3: the row at step 3 is that of the whole window."""
    settings = {"max_steps": 6, "save_interval": 2, "log_interval": 3, "batch_size": 4}
    train(arguments(tmp_path / "whole", **settings))

    def stop(run, reference):
        if run.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(arguments(tmp_path / "cut", **settings), before_update=stop)
    train(arguments(tmp_path / "cut", from_resume=True, **settings))
    rows = [read_metrics(tmp_path / name / "rlhf_16" / "metrics.jsonl") for name in ("whole", "cut")]
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in each] for each in rows]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [3, 6]


def test_checkpoints_of_earlier_versions_are_resumed_with_the_defaults_of_newer_flags():
    older = {"identity": {"seed": 1, "total_steps": 9}}
    now = older["identity"] | {"warmup_steps": 0, "eval_metric": "loss"}
    assert not resume.check_same_run(Path("step-1"), older, now, data_files={})
    for changed in ({"warmup_steps": 5}, {"eval_metric": "exact"}):
        with pytest.raises(UserError, match=next(iter(changed))):
            resume.check_same_run(Path("step-1"), older, now | changed, data_files={})
