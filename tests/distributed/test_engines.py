"""Which engine a run has, and how it ends before its time: asked to, or because another rank is gone."""

import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minillm.checkpoints.checkpoint import list_checkpoints
from minillm.checkpoints.interrupt import Interrupted
from minillm.distributed.engine import Engine
from minillm.distributed.engines import engine_class
from minillm.distributed.fsdp import FSDP
from minillm.distributed.zero import ZeRO
from minillm.errors import UserError
from minillm.training import endings
from tests.contracts.harness import arguments, train


def test_parallel_names_the_engine():
    assert engine_class("ddp") is Engine
    assert engine_class("fsdp") is FSDP
    assert engine_class("deepspeed") is ZeRO


def test_a_missing_deepspeed_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    args = arguments("unused", parallel="deepspeed")
    with pytest.raises(UserError, match=r"--parallel deepspeed needs .*pip install deepspeed"):
        engine_class("deepspeed")(None, torch.device("cpu"), torch.float32, args)


@pytest.fixture
def run(monkeypatch):
    """The parts of a run on rank 0 of 2; ``run.calls`` are those to them, in order."""
    monkeypatch.setattr("sys.argv", ["train_pretrain.py", "--data_path", "a b.jsonl", "--from_resume"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    calls = []

    def part(**names):
        return SimpleNamespace(**{name: lambda name=name: calls.append(name) for name in names})

    ranks = part(barrier=1)
    ranks.is_main, ranks.rank, ranks.world_size = True, 0, 2
    return SimpleNamespace(calls=calls, ranks=ranks, tracker=part(close=1))


@pytest.mark.parametrize("is_main", [True, False])
def test_stop_waits_for_the_others(run, capsys, is_main):
    run.ranks.is_main = is_main
    with pytest.raises(Interrupted) as ended:
        endings.stop(run.ranks, signal.SIGTERM, tracker=run.tracker, step=5, total_steps=9)
    assert ended.value.code == 143
    assert run.calls == [*(["close"] if is_main else []), "barrier"]
    shown = capsys.readouterr()
    assert shown.out == ""
    expected = (
        "SIGTERM: saved after step 5 of 9\n"
        "resume with: python train_pretrain.py --data_path 'a b.jsonl' --from_resume\n"
    )
    assert shown.err == (expected if is_main else "")


GONE = [
    RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4567\nmore lines"),
    RuntimeError("Connection closed by remote peer"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    RuntimeError("NCCL communicator was aborted on rank 1"),
    dist.DistBackendError("the watchdog got stuck\nat collective 7"),
    dist.DistNetworkError("The client socket has failed to connect"),
]


@pytest.mark.parametrize("error", GONE, ids=lambda error: str(error)[:30])
def test_a_rank_that_is_gone_is_said_plainly(run, error):
    run.ranks.rank = 1
    with pytest.raises(UserError) as said:
        endings.explain(error, run.ranks, step=5, is_saved=True)
    message = str(said.value)
    assert message.startswith("rank 1 of 2 lost the others after step 5: ")
    assert str(error).splitlines()[0] in message
    assert "--from_resume" in message
    assert "\n" not in message
    assert said.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), UserError("gloomy"), KeyError("gloo")])
def test_other_errors_are_left_as_they_are(run, error, capsys):
    endings.explain(error, run.ranks, step=5, is_saved=True)
    assert capsys.readouterr() == ("", "")


def test_an_error_without_a_message_is_no_error_of_ours(run):
    endings.explain(RuntimeError(), run.ranks, step=5, is_saved=True)
    with pytest.raises(UserError, match="lost the others"):
        endings.explain(dist.DistError(), run.ranks, step=5, is_saved=True)


def test_alone_there_is_no_other_to_lose(run):
    run.ranks.world_size = 1
    for error in GONE:
        endings.explain(error, run.ranks, step=5, is_saved=True)


@pytest.mark.parametrize(("is_main", "is_saved"), [(True, True), (True, False), (False, True)])
def test_ctrl_c_says_how_to_go_on_if_there_is_something_to_go_on_from(run, capsys, is_main, is_saved):
    run.ranks.is_main = is_main
    with pytest.raises(Interrupted) as ended:
        endings.explain(KeyboardInterrupt(), run.ranks, step=5, is_saved=is_saved)
    assert ended.value.code == 130
    shown = capsys.readouterr().err
    says = is_main and is_saved
    assert ("interrupted after step 5; resume with: python train_pretrain.py" in shown) == says
    assert ("interrupted after step 5, before its first checkpoint" in shown) == (is_main and not says)
    assert bool(shown) == is_main


# ---- in a run ----------------------------------------------------------------------------------------------------


def send(number, at):
    def send(run):
        if run.step == at:
            signal.raise_signal(number)

    return send


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(tmp_path, capsys, number, code):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as ended:
        train(arguments(tmp_path, batch_size=3, max_steps=5), before_update=send(number, at=1))
    assert ended.value.code == code
    assert signal.getsignal(number) == handler
    (saved,) = list_checkpoints(tmp_path / "pretrain_16" / "checkpoints")
    assert saved.name == "step-00000002"
    assert f"{signal.Signals(number).name}: saved after step 2 of 5" in capsys.readouterr().err
    whole = train(arguments(tmp_path / "whole", batch_size=3, max_steps=5))
    again = train(arguments(tmp_path, batch_size=3, max_steps=5, from_resume=True))
    assert again["metrics"] == whole["metrics"]


def test_a_signal_in_the_last_step_saves_it_and_leaves_the_rest_to_a_resume(tmp_path, capsys):
    flags = {"batch_size": 3, "max_steps": 3}
    with pytest.raises(Interrupted) as ended:
        train(arguments(tmp_path, **flags), before_update=send(signal.SIGTERM, at=2), finish=True)
    assert ended.value.code == 143
    assert "saved after step 3 of 3" in capsys.readouterr().err
    assert not (tmp_path / "pretrain_16" / "model.safetensors").is_file()
    result = train(arguments(tmp_path, from_resume=True, **flags), finish=True)
    assert [row["step"] for row in result["metrics"]] == [1, 2, 3]
    assert (tmp_path / "pretrain_16" / "model.safetensors").is_file()


def test_a_run_passes_on_what_it_means_that_a_rank_is_gone(tmp_path):
    def lose(run):
        if run.step == 2:
            run.ranks.world_size = 2
            raise GONE[0]

    with pytest.raises(UserError, match="rank 0 of 2 lost the others after step 2"):
        train(arguments(tmp_path, batch_size=3), before_update=lose)
