"""`pipeproof check`."""

from __future__ import annotations

import click

from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import sizes
from pipeproof.cli.source import load
from pipeproof.sched import Finding, check


def judge(wanted: Wanted, *, as_json: bool) -> None:
    """Print what `check` finds; exit with 1 if that is anything."""
    report = check(load(wanted))
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
