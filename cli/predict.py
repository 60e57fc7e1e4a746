"""What the options of a simulation mean to `sim`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipeproof.cli.options import Conditions
from pipeproof.cli.output import full
from pipeproof.cli.progress import bar, watched
from pipeproof.sched import Schedule, Trace, lower
from pipeproof.sim import Cluster, Cost, simulate

LONG = 200_000
"""Ops from which on a simulation takes seconds, and shows how far it is."""


def cost_of(conditions: Conditions) -> Cost:
    """The Cost that was asked for; what was not, as it is by default."""
    return Cost(**_given(conditions, Cost))


def cluster_of(conditions: Conditions) -> Cluster:
    """Likewise the Cluster."""
    return Cluster(**_given(conditions, Cluster))


def _given(conditions: Conditions, target: type[Any]) -> dict[str, Any]:
    names = {spec.name for spec in fields(target)}
    return {
        spec.name: value
        for spec in fields(conditions)
        if spec.name in names and (value := getattr(conditions, spec.name)) is not None
    }


def predict(schedule: Schedule, conditions: Conditions) -> Trace:
    """Lower and simulate, as the options say."""
    cost, cluster = cost_of(conditions), cluster_of(conditions)
    program = lower(
        schedule,
        transfers=conditions.transfers,  # type: ignore[arg-type]
        receives=conditions.receives,  # type: ignore[arg-type]
    )
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
