"""`pipeproof check`."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import click

from pipeproof.cli.options import LOWERING, Conditions, Wanted, flag
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import cluster_of, cost_of, lowered, predict, sizes
from pipeproof.cli.proving import as_proved, in_passing, in_words
from pipeproof.cli.source import load
from pipeproof.cli.values import Number
from pipeproof.sched import Kind, ParameterError, Program, Schedule, check, fits
from pipeproof.sched.streams import StreamModel

OF_PROGRAMS = ("streams", "buffering", *LOWERING)
"""Conditions under which a program is judged for deadlocks, whatever its costs."""


def judge(
    wanted: Wanted,
    conditions: Conditions,
    memory: Number | None,
    activations: Number | None,
    *,
    as_json: bool,
) -> None:
    """Print what `check`, `fits` and `prove` find; exit with 1 if that is anything.

    Raises:
        ParameterError: costs, but no cap that they matter to.
    """
    schedule = load(wanted)
    given = conditions.given
    report = check(schedule)
    judged: Program | Schedule = schedule
    if report.ok and any(name in given for name in OF_PROGRAMS):
        judged = program = lowered(schedule, conditions)
        report = check(
            program,
            streams=cast(StreamModel | None, conditions.streams),
            buffering=conditions.buffering,
        )
    cluster, host_memory = cluster_of(conditions), None
    if conditions.cluster is not None and cost_of(conditions, schedule).knows_bytes:
        memory = cluster.memory if memory is None else memory
        host_memory = cluster.host_memory if schedule.has(Kind.OFFLOAD) else None
    if memory is None and activations is None and host_memory is None:
        if costs := [name for name in given if name not in OF_PROGRAMS]:
            raise ParameterError(
                f"{flag(costs[0])} matters only to what is alive at once: give "
                "--memory or --max-activations too"
            )
    elif report.ok:
        trace = predict(schedule, conditions)
        found = fits(
            trace,
            memory=memory,
            activations=activations,
            host_memory=host_memory,
            node_of=[cluster.node(device) for device in range(schedule.devices)],
        )
        report = replace(found, verdict=f"{report.verdict}; it {found.verdict}")
    proof = in_passing(judged) if report.ok else None
    proved = None if proof is None else as_proved(proof)
    if as_json:
        emit_json(
            {
                **sizes(report.schedule),
                "digest": report.schedule.digest,
                "ok": report.ok,
                "proved": proved,
                "findings": [finding.to_dict() for finding in report.findings],
            }
        )
    else:
        click.echo(str(report))
        if proof is not None:
            click.echo(in_words(proof))
    if not report.ok or proved is False:
        raise click.exceptions.Exit(1)
