"""`pipeproof run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from pipeproof.cli.model import ROWS, load_example
from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json, full, shown, write_file
from pipeproof.cli.predict import figures
from pipeproof.cli.proving import as_proved, in_passing, in_words
from pipeproof.cli.simulating import tell
from pipeproof.cli.source import load
from pipeproof.exec import Example, Pipeline, Ranks, keep_memory, launch
from pipeproof.exec.batch import split
from pipeproof.exec.homes import as_named
from pipeproof.sched import (
    Certificate,
    Kind,
    ParameterError,
    Refutation,
    Schedule,
    ScheduleError,
    Trace,
)
from pipeproof.sched.causes import SHARED_PROCESSOR
from pipeproof.sched.interop.chrome import write_chrome
from pipeproof.sched.lower import Messages
from pipeproof.sim import Measured, cost_of, links_of, read_cost, simulate


@dataclass(frozen=True)
class Training:
    """What to train and how; see the options of the command."""

    schedule: Schedule
    model: str
    batch: int | None
    device: str
    seed: int
    dtype: str
    steps: int
    lr: float
    messages: Messages
    data_parallel: int
    quiet: bool


@dataclass(frozen=True)
class Trained:
    """What came of it: of each step its loss and seconds, of the last a trace.

    And whether the program that ran was proved, or why that was not tried.
    """

    losses: list[float]
    seconds: list[float]
    trace: Trace
    proof: Certificate | Refutation | str


def train(
    wanted: Wanted,
    *,
    ranks: int | None,
    trace_path: str | None,
    cost_path: str | None,
    as_json: bool,
    steps: int,
    lr: float,
    **options: Any,
) -> None:
    """Train some steps with SGD, and print losses, times and the last trace."""
    if steps < 1:
        raise ParameterError(f"steps must be at least 1, got {steps}")
    if not 0 <= lr < math.inf:
        raise ParameterError(f"lr must be a finite number of at least 0, got {lr}")
    schedule = load(wanted)
    training = Training(schedule, steps=steps, lr=lr, quiet=as_json, **options)
    if by_torchrun():
        trained = _as_rank_of_torchrun(training, ranks)
    elif ranks is not None:
        check_ranks(ranks, schedule, training.data_parallel)
        (trained, *_) = launch(train_as_rank, ranks, training)
    else:
        trained = _train(training)
    if trained is not None:
        _report(trained, trace_path, cost_path, as_json=as_json)


def _as_rank_of_torchrun(training: Training, ranks: int | None) -> Trained | None:
    schedule, replicas = training.schedule, training.data_parallel
    return train_as_rank(rank_of_torchrun(ranks, schedule, replicas), training)


def by_torchrun() -> bool:
    """Whether this is one of torchrun's processes."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_of_torchrun(ranks: int | None, schedule: Schedule, replicas: int = 1) -> Ranks:
    """This process among those that torchrun started.

    Args:
        ranks: of `--ranks`, which is for those that were not.
        schedule: that they are to run.
        replicas: how many pipelines they are.

    Raises:
        ParameterError: another number than the devices of these.
    """
    if ranks is not None:
        raise ParameterError("--ranks starts ranks, and torchrun has done so already")
    dist.init_process_group("gloo")
    joined = Ranks.of(True)
    with joined.together("its beginning"):
        check_ranks(joined.size, schedule, replicas)
    return joined


def check_ranks(ranks: int, schedule: Schedule, replicas: int = 1) -> None:
    """Refuse another number of ranks than the pipelines have devices.

    Raises:
        ParameterError: it is, or there are no pipelines.
    """
    if replicas < 1:
        raise ParameterError(f"data_parallel must be at least 1, got {replicas}")
    if ranks != schedule.devices * replicas:
        several = f", in each of {replicas} pipelines" if replicas > 1 else ""
        raise ParameterError(
            f"{schedule.summary} needs {schedule.devices * replicas} ranks, one for "
            f"each device{several}, got {ranks}"
        )


def train_as_rank(ranks: Ranks, training: Training) -> Trained | None:
    """One rank's part; the first one tells how it went."""
    trained = _train(training, ranks)
    return trained if ranks.rank == 0 else None


def _train(training: Training, ranks: Ranks | None = None) -> Trained:
    keep_memory()
    steps, example = training.steps, _example(training, ranks)
    devices = devices_of(training.device)
    pipeline = Pipeline(
        example.stages,
        training.schedule,
        example.loss_fn,
        devices,
        messages=training.messages,
        ranks=ranks or False,
        data_parallel=training.data_parallel,
        optimizers=optimizers_of(example.stages, training.schedule, training.lr),
    )
    proof = in_passing(pipeline.program)
    if isinstance(proof, Refutation):
        raise ScheduleError(str(proof))
    parameters = [p for stage in example.stages for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=training.lr)  # unless STEPs have theirs
    torch.manual_seed(training.seed)
    quiet = training.quiet or (ranks is not None and ranks.rank > 0)
    losses, seconds = [], []
    for step in range(steps):
        started = perf_counter()
        loss = pipeline.step(example.inputs, example.targets, record=step == steps - 1)
        if pipeline.optimizers is None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        settle(devices)
        seconds.append(perf_counter() - started)
        if not quiet:
            took = f"{seconds[-1] * 1e3:,.1f} ms"
            click.echo(f"step {step + 1}/{steps}: loss {losses[-1]:.6f}, {took}")
    return Trained(losses, seconds, pipeline.trace, proof)


def optimizers_of(
    stages: Sequence[nn.Module], schedule: Schedule, lr: float
) -> list[Optimizer | None] | None:
    """SGD for each stage that learns, where the schedule has STEPs."""
    if not schedule.has(Kind.STEP):
        return None
    learning = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
    return [torch.optim.SGD(found, lr=lr) if found else None for found in learning]


def _example(training: Training, ranks: Ranks | None) -> Example:
    """The model, and the batch or this replica's part of it."""
    schedule, replicas = training.schedule, training.data_parallel
    rows = training.batch
    if rows is None and replicas > 1:
        rows = ROWS * schedule.all_micro_batches * replicas
    example = load_example(
        training.model, schedule, rows, training.dtype, training.seed
    )
    if ranks is None or replicas == 1:
        return example
    replica = ranks.rank // schedule.devices
    inputs = split("inputs", example.inputs, replicas)[replica][0]
    targets = split("targets", example.targets, replicas)[replica][0]
    return replace(example, inputs=inputs, targets=targets)


def _report(
    trained: Trained, trace_path: str | None, cost_path: str | None, *, as_json: bool
) -> None:
    trace, seconds = trained.trace, trained.seconds
    predicted = foretold(trace, cost_path)
    if trace_path is not None:
        write_file(trace_path, lambda file: write_chrome(trace, file, beside=predicted))
    if as_json:
        emit_json(
            {
                **figures(trace),
                "losses": [x if math.isfinite(x) else None for x in trained.losses],
                "step_seconds": seconds,
                "median_step_seconds": median(seconds),
                "predicted_makespan": full(predicted.makespan),
                "proved": as_proved(trained.proof),
            }
        )
        return
    click.echo(in_words(trained.proof))
    click.echo(f"median step time: {median(seconds) * 1e3:,.1f} ms")
    click.echo("The last step, in seconds:")
    tell(trace)
    source = f"of {cost_path}" if cost_path else "fitted to this step"
    click.echo(f"Predicted with the times {source}: {shown(predicted.makespan)}.")


def foretold(trace: Trace, cost_path: str | None) -> Trace:
    """What is predicted of a measured step.

    Args:
        trace: of it.
        cost_path: of what `pipeproof profile` measured; otherwise the step's own
            times are taken.
    """
    if cost_path is not None:
        known = read_cost(cost_path)
    else:
        known = Measured(cost_of([trace]), links_of([trace]))
    shared = SHARED_PROCESSOR in trace.notes
    return simulate(
        trace.program, known.cost, replace(known.cluster, shared_processor=shared)
    )


def devices_of(names: str) -> list[torch.device]:
    """The devices of `--device D[,D…]`.

    Raises:
        ParameterError: torch knows no such device, or it is not there.
    """
    return list(map(as_named, names.split(",")))


def settle(devices: list[torch.device]) -> None:
    """Wait until queued work is done, so that its time is measured too."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
