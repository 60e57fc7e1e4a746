"""Devices by name, and waits that only order a device's stream."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import Job, alone, under_another_default
from models import grads, mlp
from pool import Do
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional

from pipeproof.exec import Pipeline, RankError, Ranks, profile
from pipeproof.exec.communicators import TorchWire
from pipeproof.exec.failure import Failure
from pipeproof.exec.homes import as_named
from pipeproof.exec.transport import HELD, Across
from pipeproof.sched import ParameterError, catalog, lower, recompute


@pytest.mark.parametrize("name", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there(name: str) -> None:
    schedule = catalog.make("gpipe", devices=1, micro_batches=1)

    with pytest.raises(ParameterError, match=f"device '{name}' cannot be used: "):
        Pipeline([nn.Linear(1, 1)], schedule, functional.mse_loss, name)


def test_a_device_is_called_what_its_tensors_call_it() -> None:
    """`cuda` was another device than its own tensors', which are on `cuda:0`."""
    for name in ("cpu", "cpu:0", "meta"):
        assert as_named(name) == torch.empty(1, device=name).device


@pytest.mark.usefixtures("one_thread")
def test_ranks_beside_another_default_device(do: Do) -> None:
    """What they tell each other was made on torch's default device."""
    job = Job("1f1b", 2, 4)
    expected = alone(job)

    for found in do(under_another_default, job, 2):
        assert found.losses == expected.losses


def test_a_step_on_the_meta_device() -> None:
    """It computes nothing, and all else is as anywhere."""
    schedule = recompute(catalog.make("zb-h1", devices=2, micro_batches=3), "always")
    stages = mlp(2)
    x = torch.ones(6, 4, dtype=torch.float64)

    loss = Pipeline(stages, schedule, functional.mse_loss, "meta").step(x, x)

    assert loss.device.type == "meta"
    assert all(grad is not None and grad.is_meta for grad in grads(stages))


def test_a_profile_takes_targets_to_their_stage() -> None:
    """They were left where the batch was, and the loss is made on the device."""
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    x = torch.ones(4, 4, dtype=torch.float64)

    elsewhere, here = (
        profile(mlp(2), schedule, nn.MSELoss(), x, x, rounds=1, devices=device)
        for device in ("meta", "cpu")
    )

    assert elsewhere.stages == here.stages


@dataclass
class Work:
    """Of a communicator whose waits return at once, as NCCL's do."""

    done: bool = False
    waited: int = 0

    def wait(self) -> None:
        self.waited += 1

    def is_completed(self) -> bool:
        return self.done


class OnDevice:
    """Such a communicator."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def send(self, tensors: list[Tensor], place: int, tag: int) -> Work:
        self.works.append(Work())
        return self.works[-1]

    recv = send

    def wire(self) -> TorchWire:
        return TorchWire(self, 1, 1, False)  # type: ignore[arg-type]


def test_who_waits_for_a_device_learns_of_a_failure() -> None:
    """And what the device waits for is given up, once."""
    ranks = Ranks(HashStore(), 0, 1, lost_s=0.6)
    aborted, group = [], OnDevice()
    over = threading.Event()
    ranks._beats.aborts += [lambda: aborted.append("first"), over.set]
    try:
        ranks.wait(group.wire().send(torch.ones(1)), "a message")
        ranks.record.write(Failure(1, "fell silent"))
        with pytest.raises(RankError, match="rank 0 ends: rank 1 fell silent"):
            ranks.wait(group.wire().send(torch.ones(1)), "a message")
        assert over.wait(30)
        ranks._beats._thread.join(0.5)
        assert aborted == ["first"]
    finally:
        ranks.leave()


def test_what_a_device_has_sent_is_let_go() -> None:
    """All that was sent was held until an answer came: in GPipe, to the backwards."""
    program = lower(catalog.make("gpipe", devices=2, micro_batches=4))
    group, cpu = OnDevice(), torch.device("cpu")
    headers: Any = {1: SimpleNamespace(send=lambda text: None)}
    across = Across(program, {1: group.wire()}, {}, headers, cpu, lambda *_: None)
    across.begin(lambda: False)
    held = []
    for message in map(program.message_at, range(4)):
        across.send(message, torch.ones(HELD))
        held.append(len(across._sent[1]))
        group.works[-1].done = message.index < 2

    assert held == [1, 1, 1, 2]
