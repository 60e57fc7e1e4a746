"""What ranks are asked to do, and the same in one process."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import torch
from models import Attention, Nested
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn import functional

from pipeproof.exec import Pipeline, communicators, group, neighbours, transport
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import Schedule, Trace, catalog, recompute
from pipeproof.sched.lower import Messages

WIDTH = 4
OVER_GLOO: dict[Ranks, Ranks] = {}


class Split(nn.Module):
    """A tensor → three, of which one is no float and one wants no gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.transpose(0, 1), x.detach().argsort(-1), x.detach()[..., ::2] / 2


class Join(nn.Module):
    """And back."""

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        x, order, half = parts
        assert not order.requires_grad
        assert not half.requires_grad
        x = x.transpose(0, 1).gather(-1, order)
        return x + half.repeat_interleave(2, -1)


class Mixed(nn.Module):
    """A stage whose input and output are tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.join, self.split = Join(), Split()

    def forward(self, value: Any) -> Any:
        x = self.join(value) if isinstance(value, tuple) else value
        return self.split(self.linear(x).tanh())


def attentive(number: int) -> nn.Module:
    """Dropout, and attention that slices carry on."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), Attention(WIDTH), nn.LayerNorm(WIDTH)
    )


def mixed(number: int) -> nn.Module:
    return Mixed()


def nested(number: int) -> nn.Module:
    return Nested()


def frozen_start(number: int) -> nn.Module:
    """What enters stage 1 wants no gradient, so none comes back."""
    layer = nn.Linear(WIDTH, WIDTH)
    return layer.requires_grad_(number > 0)


def same_values(output: Any, targets: Tensor) -> Tensor:
    x = Join()(output) if isinstance(output, tuple) else output
    return functional.mse_loss(x, targets)


def weight_of(targets: Tensor) -> Tensor:
    """Micro-batches with a negative first target do not count."""
    return (targets.flatten()[0] > 0) * targets.shape[0]


@dataclass(frozen=True)
class Job:
    """A schedule, a model and some steps.

    Attributes:
        name, devices, micro_batches, policy: of the schedule.
        stage: makes one from its number.
        shapes: rows and positions of the batch of each step.
        own_only: ranks are given None for the stages of others.
        weighted: micro-batches count as `weight_of` says.
        dtype: of everything.
        loss: of the last stage's output.
        messages: how they are posted.
        recomputed: of each stage, what an R runs again.
    """

    name: str
    devices: int
    micro_batches: int
    policy: str = "never"
    stage: Callable[[int], nn.Module] = attentive
    shapes: tuple[tuple[int, ...], ...] = ((11, 6),)
    own_only: bool = False
    weighted: bool = False
    dtype: torch.dtype = torch.float64
    loss: Callable[[Any, Tensor], Tensor] = same_values
    messages: Messages = "single"
    recomputed: tuple[int, ...] | None = None

    @property
    def schedule(self) -> Schedule:
        schedule = catalog.make(
            self.name, devices=self.devices, micro_batches=self.micro_batches
        )
        return schedule if self.policy == "never" else recompute(schedule, self.policy)

    def stages(self) -> list[nn.Module]:
        torch.manual_seed(3)
        return [self.stage(n).to(self.dtype) for n in range(self.schedule.stages)]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(4)
        return [
            tuple(torch.randn(2, *shape, WIDTH, dtype=self.dtype))
            for shape in self.shapes
        ]

    @property
    def options(self) -> dict[str, Any]:
        return {"loss_scale": weight_of} if self.weighted else {}


@dataclass(frozen=True)
class Result:
    """What must be equal, bit by bit.

    Attributes:
        losses: of the steps.
        grads: of each stage.
        drawn: from the generator afterwards.
    """

    losses: list[str]
    grads: dict[int, str]
    drawn: float


def digest(*tensors: Tensor | None) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"None" if tensor is None else tensor.numpy().tobytes())
    return found.hexdigest()


def grads_of(stages: Sequence[nn.Module], numbers: Sequence[int]) -> dict[int, str]:
    return {n: digest(*(p.grad for p in stages[n].parameters())) for n in numbers}


def run(
    job: Job,
    step: Callable[[Tensor, Tensor], Tensor],
    stages: Sequence[nn.Module],
    numbers: Sequence[int],
    seed: int = 5,
) -> Result:
    batches = job.batches()
    torch.manual_seed(seed)
    losses = [digest(step(*batch)) for batch in batches]
    return Result(losses, grads_of(stages, numbers), float(torch.rand(1)))


def alone(job: Job) -> Result:
    """In one process."""
    stages = job.stages()
    pipeline = Pipeline(
        stages, job.schedule, job.loss, messages=job.messages, **job.options
    )
    return run(job, pipeline.step, stages, range(len(stages)))


def timed(ranks: Ranks, job: Job) -> Trace:
    """The trace of a step after the first."""
    stages = job.stages()
    pipeline = Pipeline(
        stages, job.schedule, same_values, ranks=ranks, messages=job.messages
    )
    (batch,) = job.batches()
    pipeline.step(*batch)
    pipeline.step(*batch, record=True)
    return pipeline.trace


def offsets(ranks: Ranks, job: Job) -> tuple[float, float]:
    """What separates this rank's clock from rank 0's: on one host, and on others.

    The clock of host r is 1,000 r seconds ahead.
    """
    here = ranks.clock_offset()
    ranks._far = None  # what they know of each other's hosts
    ahead = 1000.0 * ranks.rank
    skewed = SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + ahead, sleep=time.sleep
    )
    with (
        patch.object(group, "host_clock", lambda: f"host {ranks.rank}"),
        patch.object(group, "time", skewed),
    ):
        far = ranks.clock_offset()
    ranks._far = None
    return here, far


def part(ranks: Ranks, job: Job) -> Result:
    """As one of several ranks."""
    schedule, stages = job.schedule, job.stages()
    mine = [n for n in range(schedule.stages) if ranks.rank in holders(schedule, n)]
    given = [s if n in mine or not job.own_only else None for n, s in enumerate(stages)]
    pipeline = Pipeline(
        given,
        schedule,
        job.loss,
        ranks=ranks,
        messages=job.messages,
        recomputed=job.recomputed and [job.recomputed] * schedule.stages,
        **job.options,
    )

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        first, last = 0 in mine, schedule.stages - 1 in mine
        return pipeline.step(inputs if first else None, targets if last else None)

    # Rank 0's seed counts; the others' own draws are not used.
    return run(job, step, stages, mine, seed=5 + ranks.rank)


def over_gloo(ranks: Ranks, task: tuple[Callable[..., Any], Job]) -> Any:
    """What a function does for a job where ranks share no memory."""
    function, job = task
    if ranks not in OVER_GLOO:
        OVER_GLOO[ranks] = Ranks(
            PrefixStore("over gloo", ranks.store), ranks.rank, ranks.size
        )
    with patch.dict(os.environ, {neighbours.VARIABLE: "gloo"}):
        return function(OVER_GLOO[ranks], job)


def little_held(ranks: Ranks, job: Job) -> Result:
    """As `part`, where threads wait for all that is sent."""
    with patch.object(transport, "HELD", 0):
        return part(ranks, job)


def on_gpus(ranks: Ranks | None, name: str, replicas: int) -> dict[int, str]:
    """Gradients of two steps: a GPU for each rank, or all on one."""
    size = 2 // replicas
    schedule = catalog.make(name, devices=size, micro_batches=4)
    torch.manual_seed(3)
    stages = [attentive(n).double() for n in range(schedule.stages)]
    given: dict[str, Any] = {"devices": "cuda:0"}
    numbers = list(range(schedule.stages))
    if ranks is not None:
        device = ranks.rank % size
        given = {"devices": f"cuda:{ranks.rank}", "ranks": ranks}
        given["data_parallel"] = replicas
        numbers = [n for n in numbers if device in holders(schedule, n)]
    pipeline = Pipeline(stages, schedule, same_values, **given)
    torch.manual_seed(4)
    x = torch.randn(8, 6, WIDTH, dtype=torch.float64)
    for _ in range(2):
        pipeline.step(x, x)
    cpu = [
        [None if p.grad is None else p.grad.cpu() for p in s.parameters()]
        for s in stages
    ]
    return {n: digest(*cpu[n]) for n in numbers}


def policies(ranks: Ranks, job: Job) -> list[int]:
    """How the kernel schedules this process's main thread, and then its others."""
    part(ranks, job)
    others = {int(task) for task in os.listdir("/proc/self/task")} - {os.getpid()}
    return [os.sched_getscheduler(task) for task in (os.getpid(), *others)]


def followed(ranks: Ranks, job: Job, waited_s: float) -> tuple[Trace, int]:
    """The trace of a step after the first, and what a thread has waited for in it.

    Where an op is taken to have been kept waiting from so many seconds on.
    """
    found = []
    serve = communicators.TorchWire.serve

    def counted(
        self: communicators.TorchWire, transfer: communicators.Transfer
    ) -> None:
        found.append(transfer)
        serve(self, transfer)

    with (
        patch.object(transport, "WAITED_S", waited_s),
        patch.object(communicators.TorchWire, "serve", counted),
    ):
        return timed(ranks, job), len(found)


def nobody_waits(ranks: Ranks, job: Job) -> tuple[Trace, int]:
    return followed(ranks, job, math.inf)


def all_wait(ranks: Ranks, job: Job) -> tuple[Trace, int]:
    return followed(ranks, job, -1.0)


def listening(ranks: Ranks, job: Job) -> list[str]:
    """Where this process accepts connections, once it has run a job."""
    part(ranks, job)
    found = psutil.Process().net_connections(kind="inet")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]


def under_another_default(ranks: Ranks, job: Job) -> Result:
    """As `part`, by a company that meets while torch makes tensors elsewhere."""
    stages, batches = job.stages(), job.batches()
    given = job.schedule, job.loss
    torch.set_default_device("meta")
    try:
        store = PrefixStore("another default", ranks.store)
        company = Ranks(store, ranks.rank, ranks.size)
        pipeline = Pipeline(stages, *given, ranks=company)
        torch.manual_seed(5)
        losses = [digest(pipeline.step(*batch)) for batch in batches]
        company.leave()
    finally:
        torch.set_default_device(None)
    return Result(losses, grads_of(stages, []), 0.0)
