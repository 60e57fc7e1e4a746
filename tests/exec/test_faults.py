"""A rank that fails ends all, and each says who it was and why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from failing import (
    OTHERWISE,
    Fault,
    endless,
    faulty,
    interrupted,
    leaving_a_pid,
    standing_still,
    told,
)
from pool import Do
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline, RankError, launch
from pipeproof.exec.beats import LOOKS, LOST_S, PATIENCE, Beats, Silence
from pipeproof.exec.failure import Failure, Record
from pipeproof.exec.host import process_here, runs
from pipeproof.sched import ParameterError, catalog


def test_a_stage_that_raises(do: Do) -> None:
    said = do(told, Fault("stage", 2))

    assert said[2].startswith(
        "StepError: the step broke off at 2F2 (stage 2, micro-batch 2, device cpu): "
        "ValueError: no such word: 7"
    )
    for rank in (0, 1, 3):
        assert said[rank].startswith(
            f"RankError: rank {rank} ends: rank 2 failed in the step: StepError: the "
            "step broke off at 2F2 (stage 2, micro-batch 2, device cpu): ValueError"
        )
        assert "in spoil\n" in said[rank], "the original traceback"


def test_a_stage_whose_error_has_no_text(do: Do) -> None:
    """Nobody learned where it was raised."""
    for message in do(told, Fault("speechless", 1)):
        assert (
            "the step broke off at 1F2 (stage 1, micro-batch 2, device cpu): "
            "Speechless: its text cannot be made: TypeError"
        ) in message


def test_a_rank_whose_memory_another_one_uses(do: Do) -> None:
    said = do(told, Fault("lender", 3))

    for rank in (0, 1, 2):
        assert said[rank].startswith(
            f"RankError: rank {rank} ends: rank 3 failed in the step: StepError: the "
            "step broke off at 3F2 (stage 3, micro-batch 2"
        )


def test_a_loss_that_raises(do: Do) -> None:
    said = do(told, Fault("loss", 3))

    assert "3F0 (stage 3, micro-batch 0" in said[3]
    for rank in (0, 1, 2):
        assert "rank 3 failed in the step: StepError" in said[rank]
        assert "ArithmeticError: a loss of its own" in said[rank]


def test_an_interrupted_rank(do: Do) -> None:
    said = do(told, Fault("interrupt", 1))

    assert said[1].startswith("KeyboardInterrupt")
    for rank in (0, 2, 3):
        assert "rank 1 failed in the step: KeyboardInterrupt" in said[rank]


def test_ranks_with_different_schedules(do: Do) -> None:
    said = do(told, Fault("schedule", 2))

    for message in said:
        assert message.startswith("RankError: ")
        assert "ranks differ; give all the same:\n  schedule:\n    ranks 0, 1, 3:" in (
            message
        )
        assert "    ranks 2: " in message


def test_ranks_with_different_stages(do: Do) -> None:
    for message in do(told, Fault("shapes", 1)):
        assert "  stage 0:\n    ranks 0, 2, 3: 1 units; [4, 4] torch.float32, [4]" in (
            message
        )


def test_messages_that_are_posted_otherwise(do: Do) -> None:
    """They came in another order than they were sent in, and gradients were wrong."""
    for message in do(told, Fault("messages", 2)):
        assert "  messages:\n    ranks 0, 1, 3: single\n    ranks 2: grouped" in message


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("leaves", "rank 1 has left, and rank 0 waits for the other ranks' next step"),
        ("vanishes", "rank 1 ended with exit status 0"),
    ],
)
def test_a_rank_that_ends_before_the_others(kind: str, reason: str) -> None:
    """They told of a broken link, or missed it after 6 s, as if it had been killed."""
    with pytest.raises(RankError) as caught:
        launch(faulty, 2, Fault(kind, 1))

    assert str(caught.value) == reason


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_rank_that_is_at_something_else(what: str, do: Do) -> None:
    """Texts were taken for others, or all waited for the deadline."""
    said = do(told, Fault(what, 1))

    for message in said:
        assert "call the same on all ranks, in the same order" in message
        assert f" {what}" in message
        assert "the other ranks' next step" in message


def test_targets_of_another_batch(do: Do) -> None:
    for message in do(told, Fault("rows", 0)):
        assert "the targets of rank 3 have 5 rows, and the inputs 8 rows" in message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("devices", -1), "runs on 5 ranks, one for each device, got 4"),
        (Fault("none", 2), "rank 2 runs stage 2 and was given None for it"),
        (
            Fault("tied", 3),
            "stages 1 and 3 share a parameter, and its copies on",
        ),
        (
            Fault("apart", 0),
            "stages 0 and 4 share a parameter on another rank, and on rank 0 each has "
            "its own: let them share it there too",
        ),
        (
            Fault("data", 0),
            "activation 0→1:0 is [1, 4] of float32, and was [2, 4] of float32 in the "
            "step before, for a batch of the same shapes",
        ),
    ],
)
def test_what_ranks_refuse(fault: Fault, message: str, do: Do) -> None:
    for said in do(told, fault):
        assert message in said


def test_ranks_need_processes() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    stages = [nn.Linear(1, 1) for _ in range(2)]

    with pytest.raises(ParameterError, match="call init_process_group first"):
        Pipeline(stages, schedule, functional.mse_loss, ranks=True)
    with pytest.raises(ModelError, match="stage 1 is None: only other ranks' may be"):
        Pipeline([stages[0], None], schedule, functional.mse_loss)


def test_a_rank_beats_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped before its thread first ran was missed by nobody."""
    store = HashStore()
    beats = Beats(store, Record(store), 1, 2, 30.0, LOST_S)
    monkeypatch.setattr(beats._thread, "start", lambda: None)

    beats.start()

    silence = Silence(store, [0, 1], LOST_S)
    for _ in range(LOOKS + 1):
        silence.look()
    monkeypatch.setattr("pipeproof.exec.beats.runs", lambda process: False)
    assert silence.lost() == Failure(
        1, "has not been heard of for 6 s: it was killed or stopped"
    )


def test_one_that_is_starved_is_given_time() -> None:
    """Ranks on a crowded host were taken for dead when a beat came late."""
    store = HashStore()
    Beats(store, Record(store), 1, 2, 30.0, LOST_S)
    store.set("beat 1", "0 0 in the step")
    store.set("process 1", process_here())
    silence = Silence(store, [1], LOST_S)
    for _ in range(LOOKS * PATIENCE):
        silence.look()

    assert silence.lost() is None
    silence.look()
    assert silence.lost() == Failure(
        1, "has not been heard of for 30 s, though its process runs"
    )


def test_who_is_seen_to_run() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        sleeper = f"{process_here().rpartition(' ')[0]} {process.pid}"
        elsewhere = f"another boot {process.pid}"
        assert (runs(process_here()), runs(sleeper), runs(elsewhere)) == (1, 1, 0)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not runs(sleeper)
        process.kill()
    assert not runs(sleeper)


def test_ranks_that_stand_still(do: Do) -> None:
    for message in do(standing_still, Fault("still", 2)):
        assert "no rank has moved for 1 s:\n" in message
        assert "  rank 2: 0 a long op\n" in message
        assert "waiting for the other ranks' skips" in message


def test_an_op_that_does_not_end(do: Do) -> None:
    """Nobody learned in which op of the step it was."""
    for message in do(endless, Fault("endless", 1)):
        assert "no rank has moved for 1 s:\n" in message
        assert re.search(r"  rank 1: \d+ the step, in 1F2\n", message)
        assert "the step, in 0B0, waiting for the header of gradient 1→0:0" in message


def test_who_goes_on_moves() -> None:
    """A rank with much to do before it next waits for another was taken for stuck."""
    store, ops = HashStore(), iter(range(200))
    beats = Beats(store, Record(store), 0, 1, timeout_s=0.004, lost_s=0.012)
    beats.at, beats.where = "the step", lambda: f"op {next(ops, 200)}"
    beats.start()

    while (failure := beats._record.read()) is None:
        pass
    beats.stop()

    assert (
        str(failure)
        == "no rank has moved for 0.004 s:\n  rank 0: 0 the step, in op 200"
    )


def test_a_rank_that_is_interrupted_while_it_waits(do: Do) -> None:
    """It went on to wait in gloo, where Python raises nothing, until the deadline."""
    said = do(interrupted, Fault("waiting", 1))

    assert said[1] == "KeyboardInterrupt: "
    for rank in (0, 2, 3):
        assert said[rank] == (
            f"RankError: rank {rank} ends: rank 1 failed in its beginning: "
            "KeyboardInterrupt"
        )


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "rank 1 was ended by SIGKILL"),
        (signal.SIGSTOP, "rank 1 has not been heard of for 6 s: it was killed or stop"),
    ],
)
def test_a_rank_that_cannot_say_why(
    number: int, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = Fault("signal", 1, number)

    with pytest.raises(RankError, match=reason):
        launch(leaving_a_pid, 2, fault, str(tmp_path))

    assert f"rank 0 ends: {reason}" in capfd.readouterr().err
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))
