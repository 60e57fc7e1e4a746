"""`pipeproof profile`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from pipeproof.cli.model import load_example
from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json, emit_table, shown, write_file
from pipeproof.cli.running import (
    by_torchrun,
    check_ranks,
    devices_of,
    optimizers_of,
    rank_of_torchrun,
    settle,
)
from pipeproof.cli.source import load
from pipeproof.cli.together import peak_of_process, peaks_of
from pipeproof.exec import (
    ActivationMeter,
    Example,
    Pipeline,
    Ranks,
    keep_memory,
    launch,
)
from pipeproof.exec.homes import holders, torch_devices
from pipeproof.exec.profile import Profile, StageBytes, profile
from pipeproof.exec.tensors import placed
from pipeproof.sched import Kind, Program, Schedule, Trace, lower
from pipeproof.sim import Cost, Link, Measured, cost_of, links_of, simulate, write_cost
from pipeproof.sim.fit import FIELDS


@dataclass(frozen=True)
class Wish:
    """What to measure; see the options of the command."""

    schedule: Schedule
    model: str
    batch: int | None
    device: str
    seed: int
    dtype: str
    rounds: int


@dataclass(frozen=True)
class Found:
    """What one process has found.

    Attributes:
        measured: times in seconds, and bytes.
        steps: seconds of each fresh step, of the slowest rank.
        peaks: bytes of live activations in it, of each device; of all together
            in one process.
        shared: whether one processor runs all devices.
        returned: of each stage, the bytes of its output that it keeps.
    """

    measured: Measured
    steps: list[float]
    peaks: list[int]
    shared: bool
    returned: list[int]


def measure(
    wanted: Wanted,
    *,
    ranks: int | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Profile, write the cost file, and print it beside a fresh run."""
    schedule = load(wanted)
    wish = Wish(schedule, **options)
    found: Found | None
    if by_torchrun():
        found = as_rank(rank_of_torchrun(ranks, schedule), wish)
    elif ranks is not None:
        check_ranks(ranks, schedule)
        (found, *_) = launch(as_rank, ranks, wish)
    else:
        found = _found(wish, None)
    if found is None:
        return
    if output is not None:
        measured = found.measured
        write_file(output, lambda file: write_cost(measured, file))
    _report(schedule, found, as_json=as_json)


def as_rank(ranks: Ranks, wish: Wish) -> Found | None:
    """One rank's part; the first one tells."""
    found = _found(wish, ranks)
    return found if ranks.rank == 0 else None


def _found(wish: Wish, ranks: Ranks | None) -> Found:
    keep_memory()
    schedule = wish.schedule
    example = load_example(wish.model, schedule, wish.batch, wish.dtype, wish.seed)
    devices = devices_of(wish.device)
    homes = torch_devices(devices, schedule)
    first, last = (homes[holders(schedule, n)[0]] for n in (0, schedule.stages - 1))
    inputs, targets = placed(example.inputs, first), placed(example.targets, last)
    example = replace(example, inputs=inputs, targets=targets)
    optimizers = optimizers_of(example.stages, schedule, lr=0.0)
    taken = profile(
        example.stages,
        schedule,
        example.loss_fn,
        example.inputs,
        example.targets,
        devices=devices,
        ranks=ranks,
        rounds=wish.rounds,
        optimizers=optimizers,
    )
    text = f"{schedule.summary}, --model {wish.model}, torch {torch.__version__}"
    pipeline = Pipeline(
        example.stages,
        schedule,
        example.loss_fn,
        devices,
        ranks=ranks or False,
        optimizers=optimizers,
    )
    steps, peak = fresh(pipeline, example, wish.rounds, devices)
    said = [(steps, peak)] if ranks is None else ranks.exchange([steps, peak], "steps")
    return Found(
        measured_from(taken, text),
        [max(of_rank) for of_rank in zip(*(steps for steps, _ in said))],
        [peak for _, peak in said],
        ranks is None and len(devices) == 1,
        [stage.returned for stage in taken.stages],
    )


def fresh(
    pipeline: Pipeline, example: Example, rounds: int, devices: list[torch.device]
) -> tuple[list[float], int]:
    """Seconds of steps that nothing watches, and one's peak of live activations."""
    steps = []
    parameters = [p for stage in example.stages for p in stage.parameters()]
    for _ in range(rounds + 1):
        settle(devices)
        began = perf_counter()
        pipeline.step(example.inputs, example.targets)
        settle(devices)
        steps.append(perf_counter() - began)
        for parameter in parameters:
            parameter.grad = None
    with ActivationMeter(example.stages) as meter:
        for value in (example.inputs, example.targets):
            meter.ignore(*(value if isinstance(value, tuple) else (value,)))
        pipeline.step(example.inputs, example.targets)
    return steps[1:], meter.peak


def measured_from(taken: Profile, text: str) -> Measured:
    """A profile as a cost, in seconds."""
    cost = replace(cost_of(taken.traces), **bytes_of(taken.stages))
    links = links_of(taken.traces, taken.link_rates, cost)
    return Measured(cost, links, taken.outside_s, text)


def bytes_of(stages: tuple[StageBytes, ...]) -> dict[str, list[float]]:
    """As attributes of a Cost."""
    over = sorted((n, *skip) for n, stage in enumerate(stages) for skip in stage.skips)
    beside = [stage.activations - stage.input for stage in stages]
    for _, target, size in over:
        beside[target] -= size
    skips: dict[str, list[float]] = (
        {"skip_bytes": [size for _, _, size in over]} if over else {}
    )
    return skips | {
        "activation_bytes": [stage.activations for stage in stages],
        "weight_grad_memory": [
            stage.left / kept if kept else 1 for stage, kept in zip(stages, beside)
        ],
        "input_bytes": [stage.input for stage in stages],
        "boundary_bytes": [stage.output for stage in stages],
        "weight_bytes": [stage.weights for stage in stages],
        "gradient_bytes": [stage.gradients for stage in stages],
    }


def predicted(program: Program, found: Measured, *, shared: bool) -> Trace:
    """The step, with these costs."""
    cluster = replace(found.cluster, shared_processor=shared)
    return simulate(program, found.cost, cluster)


def _report(schedule: Schedule, found: Found, *, as_json: bool) -> None:
    program = lower(schedule, receives="late" if found.shared else "early")
    trace = predicted(program, found.measured, shared=found.shared)
    step = float(trace.makespan) + found.measured.step_outside
    if found.shared:
        cost = found.measured.cost
        peaks = [peak_of_process(program, cost, found.returned)]
    else:
        peaks = peaks_of(trace, shared=False)
    if as_json:
        emit_json(
            {
                "schedule": schedule.name,
                "stages": _as_json(found.measured.cost, schedule),
                "links": [
                    {
                        "source": s,
                        "target": t,
                        "latency": link.latency,
                        "bandwidth": link.bandwidth,
                    }
                    for (s, t), link in found.measured.links.items()
                ],
                "step_outside": found.measured.step_outside,
                "predicted_step": step,
                "measured_step": median(found.steps),
                "predicted_peak_bytes": peaks,
                "measured_peak_bytes": found.peaks,
            }
        )
        return
    _tell(found.measured, schedule)
    rows = [
        ("step, ms", shown(step * 1e3), shown(median(found.steps) * 1e3)),
        *(
            (f"activations, bytes{where}", f"{ours:,}", f"{theirs:,}")
            for where, ours, theirs in zip(
                [""] if found.shared else [f", device {d}" for d in range(len(peaks))],
                peaks,
                found.peaks,
            )
        ),
    ]
    emit_table(
        f"A fresh run of {schedule.summary}",
        ("most at once, or", "predicted", "measured"),
        rows,
        right=("predicted", "measured"),
    )


def times_of(schedule: Schedule) -> dict[Kind, str]:
    """The kinds whose time is measured, and what a Cost calls it.

    That of a STEP, which is SGD's, only where there are some.
    """
    left_out = set() if schedule.has(Kind.STEP) else {Kind.STEP}
    return {kind: name for kind, name in FIELDS.items() if kind not in left_out}


def _as_json(cost: Cost, schedule: Schedule) -> list[dict[str, Any]]:
    names = [*times_of(schedule).values(), *bytes_of(())]
    return [
        {name: _of(cost, name, stage) for name in names}
        for stage in range(schedule.stages)
    ]


def _of(cost: Cost, name: str, stage: int) -> Any:
    value = getattr(cost, name)
    return value[stage] if isinstance(value, tuple) else value


def _tell(measured: Measured, schedule: Schedule) -> None:
    rows = [
        (
            str(stage),
            *(
                "" if (time := _of(measured.cost, name, stage)) is None
                else shown(time * 1e3)
                for name in times_of(schedule).values()
            ),
            *(
                f"{_of(measured.cost, name, stage):,}"
                for name in ("activation_bytes", "boundary_bytes", "weight_bytes")
            ),
        )
        for stage in range(schedule.stages)
    ]  # fmt: skip
    heads = [f"{kind.name}, ms" for kind in times_of(schedule)]
    heads += ["activations", "output", "weights"]
    emit_table(f"Measured: {measured.measured}", ("stage", *heads), rows, right=heads)
    for (source, target), link in sorted(measured.links.items()):
        click.echo(f"link {source} → {target}: {_in_words(link)}")
    click.echo(f"outside of instructions: {measured.step_outside * 1e6:,.0f} µs a step")


def _in_words(link: Link) -> str:
    latency = f"{float(link.latency) * 1e6:,.0f} µs a message"
    if link.bandwidth is None:
        return latency
    return f"{latency}, {float(link.bandwidth) / 1e9:,.2f} GB/s"
