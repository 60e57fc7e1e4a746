"""What the options of a simulation mean to `sim`."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from functools import cache
from typing import Any

from pipeproof.cli.options import LOWERING, Conditions
from pipeproof.cli.output import full
from pipeproof.cli.progress import bar, watched
from pipeproof.cli.shape import Described
from pipeproof.sched import ParameterError, Program, Schedule, Trace, lower
from pipeproof.sim import (
    PRESETS,
    Cluster,
    Cost,
    Measured,
    preset,
    read_cost,
    simulate,
)

LONG = 200_000
"""Ops from which on a simulation takes seconds, and shows how far it is."""

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
OF_LINKS = ("link_latency", "link_bandwidth", "host_bandwidth")


def cost_of(conditions: Conditions, schedule: Schedule | None = None) -> Cost:
    """The Cost that was asked for; what was not, as it is by default.

    Args:
        conditions: the options.
        schedule: whose stages share the layers, where they describe a transformer.

    Raises:
        ParameterError: as `model_of`, or costs that do not fit the schedule.
    """
    if isinstance(conditions, Described) and conditions.shape is not None:
        if conditions.cost is not None:
            raise ParameterError(
                "--cost says what stages take, and so does a model's shape: give one"
            )
        from pipeproof.cli.transformer import cost_of_transformer

        assert schedule is not None  # only a sweep has none, and no such conditions
        unit = PER_SECOND[conditions.unit]
        return cost_of_transformer(conditions, schedule, unit)
    given = _given(conditions, Cost)
    if conditions.cost is None:
        return Cost(**given)
    return replace(measured_of(conditions.cost, conditions.unit).cost, **given)


@cache
def measured_of(path: str, unit: str) -> Measured:
    """A cost file, in a unit of the command line."""
    return read_cost(path).in_units(PER_SECOND[unit])


def cluster_of(conditions: Conditions) -> Cluster:
    """Likewise the Cluster, in the unit of time of the command line.

    Raises:
        ParameterError: no such cluster, or its links are said twice.
        ParseError: a file that does not describe one.
    """
    given = _given(conditions, Cluster)
    if conditions.cost is not None:
        links = measured_of(conditions.cost, conditions.unit).links
        given = {"links": links} | given
    if conditions.cluster is None:
        return Cluster(**given)
    if twice := [name for name in OF_LINKS if name in given]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in twice)
        raise ParameterError(
            f"--cluster {conditions.cluster} says what its links are: leave out "
            f"{flags}, or the cluster"
        )
    cluster = _named(conditions.cluster).in_units(PER_SECOND[conditions.unit])
    return replace(cluster, **given)


@cache
def _named(name: str) -> Cluster:
    if name in PRESETS:
        return preset(name)
    if not os.path.exists(name):
        raise ParameterError(
            f"{name!r} is neither a cluster ({', '.join(PRESETS)}) nor a file"
        )
    return Cluster.load(name)


def _given(conditions: Conditions, target: type[Any]) -> dict[str, Any]:
    names = {spec.name for spec in fields(target)}
    return {
        spec.name: value
        for spec in fields(conditions)
        if spec.name in names and (value := getattr(conditions, spec.name)) is not None
    }


def lowered(schedule: Schedule, conditions: Conditions) -> Program:
    """Its program, by the policies that the options name."""
    policies: dict[str, Any] = {name: getattr(conditions, name) for name in LOWERING}
    return lower(schedule, **policies)


def predict(schedule: Schedule, conditions: Conditions) -> Trace:
    """Lower and simulate, as the options say."""
    cost, cluster = cost_of(conditions, schedule), cluster_of(conditions)
    program = lowered(schedule, conditions)
    if len(schedule) < LONG or not watched():
        return simulate(program, cost, cluster)
    with bar("simulating") as move:
        return simulate(program, cost, cluster, progress=move)


def figures(trace: Trace) -> dict[str, Any]:
    """Sizes and metrics, as every `--json` names them."""
    schedule = trace.program.schedule
    peak_bytes = trace.peak_bytes
    return {
        **sizes(schedule),
        "makespan": full(trace.makespan),
        "span": full(trace.span),
        "ideal": full(trace.ideal),
        "bubble_fraction": full(trace.bubble_fraction),
        "bubble_ratio": full(trace.bubble_ratio),
        "span_bubble": full(trace.span_bubble),
        "peak_activations": list(map(full, trace.peak_activations)),
        "peak_bytes": None if peak_bytes is None else list(map(full, peak_bytes)),
    }


def sizes(schedule: Schedule) -> dict[str, Any]:
    """What a schedule is called and how large it is."""
    return {
        "schedule": schedule.name,
        "devices": schedule.devices,
        "stages": schedule.stages,
        "micro_batches": schedule.micro_batches,
        "chunks": max(map(max, schedule.placement.shares())),
        "ops": len(schedule),
    }
