"""The rows of training: what the machine does is asked once per row, and of the main rank alone."""

import pytest

from minillm.hardware import HardwareUse
from minillm.reports.divergence import LossAlarm
from minillm.reports.tracking import Tracker, read_metrics
from minillm.reports.train_log import TrainLog
from minillm.training.step import Progress


class Counted(HardwareUse):
    """Counts how often it is asked."""

    def __init__(self):
        self.n_asked = 0

    def row(self):
        self.n_asked += 1
        return {"cpu_percent": 100.0}


@pytest.mark.parametrize("is_main", [True, False])
def test_the_machine_is_asked_once_per_row_and_not_per_step(tmp_path, is_main):
    use, progress = Counted(), Progress()
    tracker = Tracker(tmp_path, enabled=is_main, total_steps=6, first_step=0, name="toy")
    log = TrainLog(tracker, LossAlarm(vocab_size=9, from_scratch=True), mfu=lambda rate: None, hardware=use)
    for step in range(1, 7):
        log.add_loss(step, 2.0, 1.0)
        log.add_time(10, 0.5)
        progress.step = step
        if step % 3 == 0:
            log.train_row(progress, epochs=0.5, memory_bytes=0, lr=1e-3, grad_norm=1.0)
    tracker.close()
    assert use.n_asked == (2 if is_main else 0)
    assert [row["cpu_percent"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [100.0] * use.n_asked
