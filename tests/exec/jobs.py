"""What a pool of ranks is asked to do, and the same in one process."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Attention, Masked, Nested, keywords
from real_work import Residual
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn import functional

from pipeproof.exec import (
    ActivationMeter,
    Pipeline,
    group,
    profile,
    split_at,
    split_evenly,
    transport,
)
from pipeproof.exec.errors import BatchError, RankError
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.exec.launch import launch
from pipeproof.exec.profile import Profile
from pipeproof.exec.tensors import flat
from pipeproof.sched import Schedule, Trace, catalog, recompute, with_steps
from pipeproof.sched.instructions import Message
from pipeproof.sched.lower import Messages

WIDTH = 4


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


def listening(ranks: Ranks, job: Job) -> list[str]:
    """Where this process accepts connections, once it has run a job."""
    part(ranks, job)
    found = psutil.Process().net_connections(kind="inet")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]


class Gives(nn.Module):
    """Gives what it makes, and an int, to stages further on."""

    gives_skips = ("fine", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        fine = self.first(x).tanh()
        return self.second(fine) * fine, {"fine": fine, "scale": 3}


class Takes(nn.Module):
    """Uses that twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, fine: Tensor, scale: int) -> Tensor:
        return self.linear(x) + fine * fine.sigmoid() / scale


def skipping(number: int) -> nn.Module:
    """The first stage gives, the second takes, and so do those from the fourth on."""
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)]
    if number == 0:
        layers.insert(1, Gives())
    elif number != 2:
        layers.append(Takes())
    return nn.Sequential(*layers)


def sent(ranks: Ranks, job: Job) -> list[tuple[str, int]]:
    """The messages that this rank sends, with the bytes of their tensors."""
    found: list[tuple[str, int]] = []
    send = transport.Across.send

    def counted(self: Any, message: Message, value: Any) -> None:
        tensors = [x for x in flat(value) if isinstance(x, Tensor)]
        found.append((str(message), sum(tensor.nbytes for tensor in tensors)))
        send(self, message, value)

    with patch.object(transport.Across, "send", counted):
        part(ranks, job)
    return found


ROWS = 16
"""Of a micro-batch of images."""


def residual_stages(number: int) -> list[nn.Sequential]:
    """12 blocks with batch norm; they end with a ReLU, which keeps its output."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        layers.append(Residual(inputs, outputs, outputs // inputs))
        layers += [Residual(outputs, outputs, 1) for _ in range(3)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return split_evenly([*layers, nn.Sequential(*head)], number)


def peak_of_a_convnet(ranks: Ranks, schedule: Schedule) -> int:
    """The most bytes of activations and stage inputs that this rank keeps."""
    stages = residual_stages(schedule.stages)
    mine = [n for n in range(len(stages)) if ranks.rank in holders(schedule, n)]
    given = [stage if n in mine else None for n, stage in enumerate(stages)]
    pipeline = Pipeline(given, schedule, functional.cross_entropy, ranks=ranks)
    x, labels = images(ROWS * schedule.micro_batches)
    with ActivationMeter([stages[n] for n in mine]) as meter:
        meter.ignore(x, labels)
        pipeline.step(x, labels)
    assert meter.live == 0
    return meter.peak


def images(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10


def small_stages(number: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        for _ in range(number)
    ]


def profiled(ranks: Ranks | None, name: str, steps: bool = False) -> Profile:
    """Leaves all as it was: gradients, and with STEPs weights and moments."""
    schedule = catalog.make(name, devices=2, micro_batches=2)
    schedule = with_steps(schedule) if steps else schedule
    stages, x = small_stages(schedule.stages), torch.randn(6, 8)
    stages[0][0].weight.grad = torch.ones(8, 8)
    optimizers = [torch.optim.Adam(stage.parameters(), lr=0.1) for stage in stages]
    optimizers[0].step()
    before = copy.deepcopy([*stages, *optimizers])
    found = profile(
        stages,
        schedule,
        functional.mse_loss,
        x,
        x,
        ranks=ranks,
        rounds=1,
        optimizers=optimizers if steps else None,
    )
    for now, was in zip([*stages, *optimizers], before):
        torch.testing.assert_close(now.state_dict(), was.state_dict(), rtol=0, atol=0)
    assert stages[0][0].weight.grad.sum() == 64, "gradients are as they were"
    assert stages[1][0].weight.grad is None
    return found


def profiled_with_steps(ranks: Ranks | None, name: str) -> Profile:
    return profiled(ranks, name, steps=True)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gives, between two steps.

    Attributes:
        losses: of a step, the evaluation, and another step.
        predicted: where the last stage is; else empty.
    """

    losses: list[str]
    predicted: str


def evaluated(ranks: Ranks | bool, job: Job) -> Evaluated:
    """Evaluate and predict between two steps."""
    (batch,) = job.batches()
    pipeline = Pipeline(job.stages(), job.schedule, job.loss, ranks=ranks)
    torch.manual_seed(5)
    losses = [pipeline.step(*batch), pipeline.evaluate(*batch)]
    predicted = pipeline.predict(batch[0])
    losses.append(pipeline.step(*batch))
    return Evaluated(
        list(map(digest, losses)), "" if predicted is None else digest(predicted)
    )


@dataclass(frozen=True)
class Clipped:
    """The norm of all gradients, and those of the stages here when clipped."""

    norm: float
    grads: dict[int, str]


def clipped(ranks: Ranks | bool, job: Job) -> Clipped:
    """Clip after a step."""
    (batch,) = job.batches()
    stages, schedule = job.stages(), job.schedule
    mine = [
        n
        for n in range(schedule.stages)
        if not isinstance(ranks, Ranks) or ranks.rank in holders(schedule, n)
    ]
    pipeline = Pipeline(stages, schedule, job.loss, ranks=ranks)
    torch.manual_seed(5)
    pipeline.step(*batch)
    norm = pipeline.clip_grad_norm_(1e-2)
    return Clipped(norm, grads_of(stages, mine))


@dataclass(frozen=True)
class Tied:
    """Steps of a model of which two stages share their weight.

    Attributes:
        name, devices: of the schedule.
        told: ranks that are given all stages; the others only have their own.
        pair: the two.
    """

    name: str = "1f1b"
    devices: int = 4
    told: tuple[int, ...] = (0, 1, 2, 3)
    pair: tuple[int, int] = (0, -1)


@dataclass(frozen=True)
class Trained:
    """What tied training leaves.

    Attributes:
        norms: of each step, before clipping.
        weights: of each stage here.
    """

    norms: list[float]
    weights: dict[int, Tensor]


def tied(ranks: Ranks | bool, job: Tied) -> Trained:
    """Three steps with clipping, an optimizer, and gradients over two steps once."""
    schedule = catalog.make(job.name, devices=job.devices, micro_batches=8)
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
        for _ in range(schedule.stages)
    ]
    one, other = job.pair
    stages[other][0].weight = stages[one][0].weight
    mine = list(range(schedule.stages))
    given: list[Any] = list(stages)
    if isinstance(ranks, Ranks):
        mine = [n for n in mine if ranks.rank in holders(schedule, n)]
        if ranks.rank not in job.told:
            given = [stage if n in mine else None for n, stage in enumerate(stages)]
    pipeline = Pipeline(given, schedule, functional.mse_loss, ranks=ranks)
    parameters = {id(p): p for n in mine for p in stages[n].parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1)
    norms = []
    for twice in (False, True, False):
        for _ in range(1 + twice):
            torch.manual_seed(len(norms))
            pipeline.step(*torch.randn(2, 9, WIDTH, dtype=torch.float64))
        norms.append(pipeline.clip_grad_norm_(1e-2))
        optimizer.step()
        optimizer.zero_grad()
    return Trained(norms, {n: stages[n][0].weight.detach() for n in mine})


@dataclass(frozen=True)
class Scaled:
    """A step with scaled losses, in which a stage's gradient may overflow."""

    broken: int | None


@dataclass(frozen=True)
class Moved:
    """Of each stage here, whether its optimizer stepped, and its scale afterwards."""

    moved: list[bool]
    scales: list[float]


def scaled(ranks: Ranks | bool, job: Scaled) -> Moved:
    """Each stage has its own optimizer, each process a scaler."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    torch.manual_seed(0)
    stages = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    if job.broken is not None:
        stages[job.broken].weight.register_hook(lambda grad: grad * torch.inf)
    mine = [ranks.rank] if isinstance(ranks, Ranks) else [0, 1]
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pipeline.step(*torch.randn(2, 6, WIDTH), scaler=scaler)
    before = [stages[n].weight.detach().clone() for n in mine]
    for optimizer in [torch.optim.SGD(stages[n].parameters(), lr=0.1) for n in mine]:
        scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(stages[n].weight, w) for n, w in zip(mine, before)]
    return Moved(moved, [scaler.get_scale()] * len(mine))


@dataclass(frozen=True)
class Saved:
    """A model of four layers whose state two ranks save."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def saved(ranks: Ranks, job: Saved) -> dict[str, Tensor]:
    """This rank's part of the model's state."""
    model = job.model()
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    stages = split_at(model, (1, 3))
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    return pipeline.state_dict(model)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that ranks write together, or read.

    Attributes:
        path: of it.
        meeting: a file where these ranks meet.
        sizes: layers in each stage.
        seed: of the model's first weights.
        reads: whether it is read, and not trained and written.
    """

    path: Path
    meeting: Path
    sizes: tuple[int, ...]
    seed: int = 0
    reads: bool = False

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        return nn.Sequential(nn.BatchNorm1d(WIDTH), *layers, nn.BatchNorm1d(WIDTH))


def checkpointed(ranks: Ranks, job: Checkpoint) -> dict[str, str]:
    """Of this rank's part of the model, the values: as written, or as read."""
    meeting = dist.FileStore(str(job.meeting), ranks.size)
    dist.init_process_group(
        "gloo", store=meeting, rank=ranks.rank, world_size=ranks.size
    )
    try:
        model = job.model()
        schedule = catalog.make("1f1b", devices=ranks.size, micro_batches=4)
        stages = split_at(model, job.sizes)
        pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
        state = pipeline.state_dict(model)
        if job.reads:
            dcp.load(state, checkpoint_id=job.path)  # into the model's own tensors
        else:
            own = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(own, lr=0.1)
            pipeline.step(*torch.randn(2, 9, WIDTH))
            optimizer.step()
            dcp.save(state, checkpoint_id=job.path)
        here = pipeline.state_dict(model)
        return {key: digest(value) for key, value in here.items()}
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Keyed:
    """A step with keyword inputs.

    Attributes:
        missing: a rank that is not given one of them.
        unknown: whether there is one that no unit takes.
    """

    missing: int = -1
    unknown: bool = False


def keyed(ranks: Ranks | bool, job: Keyed) -> Any:
    """The gradients of the stages here, or what is refused."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    torch.manual_seed(0)
    stages = [Masked(), Masked()]
    x, y = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    given = keywords(7)
    mine = range(2)
    if isinstance(ranks, Ranks):
        mine = range(ranks.rank, ranks.rank + 1)
        store = PrefixStore(f"{job}", ranks.store)
        ranks = Ranks(store, ranks.rank, ranks.size, timeout_s=5)
        if ranks.rank == job.missing:
            del given["mask"]
    if job.unknown:
        given["musk"] = 1
    try:
        pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
        pipeline.step(x, y, keywords=given)
        return [digest(*(p.grad for p in stages[n].parameters())) for n in mine]
    except (BatchError, RankError) as error:
        return str(error)
    finally:
        if isinstance(ranks, Ranks):
            ranks.leave()


def serve(
    ranks: Ranks, ears: Sequence[Connection], mouths: Sequence[Connection]
) -> None:
    """Do jobs until there is None; those for two are done by ranks 0 and 1."""
    two = (
        Ranks(PrefixStore("two", ranks.store), ranks.rank, 2)
        if ranks.rank < 2
        else None
    )
    while (task := ears[ranks.rank].recv()) is not None:
        function, job, size = task
        among = ranks if size == ranks.size else two
        done = None if among is None else function(among, job)
        mouths[ranks.rank].send(done)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a step of 1F1B on one rank.

    Attributes:
        kind: what.
        rank: where.
        signal: to end it with, for the kind `signal`.
    """

    kind: str
    rank: int
    signal: int = 0


class Failing(nn.Module):
    """Fails at the third micro-batch that comes through."""

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.fail, self.calls = fail, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            self.fail()
        return self.linear(x)


def spoil(fault: Fault) -> None:
    match fault.kind:
        case "stage" | "lender":
            raise ValueError("no such word: 7")
        case "interrupt":
            raise KeyboardInterrupt
        case "signal":
            os.kill(os.getpid(), fault.signal)


class Dropping(nn.Module):
    """Its output's shape depends on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x[:1]


def sum_of_squares(output: Tensor, targets: Tensor) -> Tensor:
    return output.square().sum()


def bad_loss(output: Tensor, targets: Tensor) -> Tensor:
    raise ArithmeticError("a loss of its own")


def faulty(ranks: Ranks, fault: Fault) -> None:
    """Two steps, in which this happens."""
    here, kind = ranks.rank == fault.rank, fault.kind
    micro_batches = 5 if here and kind == "schedule" else 4
    devices = ranks.size + (kind == "devices")
    name = {"lender": "bpipe", "apart": "interleaved"}.get(kind, "1f1b")
    schedule = catalog.make(name, devices=devices, micro_batches=micro_batches)
    stages: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(schedule.stages)]
    if here and kind in ("stage", "lender", "interrupt", "signal"):
        stages[ranks.rank] = Failing(lambda: spoil(fault))
    elif here and kind == "shapes":
        stages[0] = nn.Linear(WIDTH, WIDTH, bias=False)
    elif here and kind == "none":
        stages[ranks.rank] = None
    elif kind == "tied":
        stages[1].weight = stages[3].weight
        if here:
            nn.init.zeros_(stages[3].weight)
    elif kind == "apart" and not here:
        stages[4].weight = stages[0].weight
    elif kind == "data":
        stages[fault.rank] = Dropping()
    loss_fn = bad_loss if kind == "loss" else sum_of_squares
    pipeline = Pipeline(stages, schedule, loss_fn, ranks=ranks)
    x = torch.ones(8, WIDTH)
    pipeline.step(x, x[:5] if kind == "rows" else x)
    pipeline.step(-x, x)


def told(ranks: Ranks, fault: Fault) -> str:
    """What a rank says of a fault, which ends a company of its own."""
    store = PrefixStore(f"{fault}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=5)
    try:
        faulty(company, fault)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()
    return "nothing"


def standing_still(ranks: Ranks, fault: Fault) -> str:
    """One rank is in a step and does nothing, until another one says so."""
    store = PrefixStore(f"{fault}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=1)
    try:
        if ranks.rank != fault.rank:
            faulty(company, fault)
        with company.together("a long op"):
            while True:
                company.check()
    except RankError as error:
        return str(error)
    finally:
        company.leave()


def interrupted(ranks: Ranks, fault: Fault) -> str:
    """Ctrl-C on a rank that waits in gloo for others who never speak."""
    company = Ranks(PrefixStore(f"{fault}", ranks.store), ranks.rank, ranks.size)

    def interrupt() -> None:
        while company._beats.waits is None:
            company.check()
        os.kill(os.getpid(), signal.SIGINT)

    try:
        if ranks.rank == fault.rank:
            threading.Thread(target=interrupt).start()
            faulty(company, fault)
        with company.together("a long op"):
            while True:
                company.check()
    except (RankError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()


def leaving_a_pid(ranks: Ranks, fault: Fault, folder: str) -> None:
    Path(folder, str(ranks.rank)).write_text(str(os.getpid()))
    faulty(ranks, fault)


Do = Callable[..., list[Any]]


@contextmanager
def pool(size: int = 4) -> Iterator[Do]:
    """Ranks that wait for jobs: processes take long to start."""
    context = get_context("spawn")
    asks, answers = (
        [context.Pipe(duplex=False) for _ in range(size)] for _ in range(2)
    )
    failures: list[BaseException] = []

    def work() -> None:
        try:
            launch(serve, size, [ear for ear, _ in asks], [say for _, say in answers])
        except BaseException as error:
            failures.append(error)
        finally:
            for _, mouth in answers:
                mouth.close()

    thread = threading.Thread(target=work)
    thread.start()

    def do(
        function: Callable[[Ranks, Any], Any], job: Any, among: int = size
    ) -> list[Any]:
        """What each of the ranks returns for a job."""
        for _, mouth in asks:
            mouth.send((function, job, among))
        try:
            return [ear.recv() for ear, _ in answers][:among]
        except EOFError:
            thread.join()
            raise failures[0] from None

    try:
        yield do
    finally:
        for _, mouth in asks:
            mouth.send(None)
        thread.join()
