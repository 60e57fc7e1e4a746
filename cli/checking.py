"""`pipeproof check`."""

from __future__ import annotations

from dataclasses import replace

import click

from pipeproof.cli.options import Conditions, Number, Wanted, flag
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import cluster_of, cost_of, predict, sizes
from pipeproof.cli.source import load
from pipeproof.sched import Finding, ParameterError, check, fits


def judge(
    wanted: Wanted,
    conditions: Conditions,
    memory: Number | None,
    activations: Number | None,
    *,
    as_json: bool,
) -> None:
    """Print what `check` and `fits` find; exit with 1 if that is anything.

    Raises:
        ParameterError: costs, but no cap that they matter to.
    """
    schedule = load(wanted)
    report = check(schedule)
    if memory is None and conditions.cluster is not None:
        knows_bytes = cost_of(conditions, schedule).knows_bytes
        memory = cluster_of(conditions).memory if knows_bytes else None
    if memory is None and activations is None:
        if given := conditions.given:
            raise ParameterError(
                f"{flag(given[0])} matters only to what is alive at once: give "
                "--memory or --max-activations too"
            )
    elif report.ok:
        trace = predict(schedule, conditions)
        found = fits(trace, memory=memory, activations=activations)
        report = replace(found, verdict=f"{report.verdict}; it {found.verdict}")
    if as_json:
        emit_json(
            {
                **sizes(report.schedule),
                "digest": report.schedule.digest,
                "ok": report.ok,
                "findings": list(map(_spelled_out, report.findings)),
            }
        )
    else:
        click.echo(str(report))
    if not report.ok:
        raise click.exceptions.Exit(1)


def _spelled_out(finding: Finding) -> dict[str, object]:
    return {
        "rule": finding.rule,
        "device": finding.device,
        "step": finding.step,
        "op": None if finding.op is None else str(finding.op),
        "expected": finding.expected,
        "found": finding.found,
        "remedy": finding.remedy,
    }
