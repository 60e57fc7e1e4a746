"""`pipeproof prove`."""

from __future__ import annotations

from typing import Any

import click

from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import sizes
from pipeproof.cli.source import load
from pipeproof.sched import lower, prove


def certify(wanted: Wanted, policies: dict[str, Any], *, as_json: bool) -> None:
    """Print the certificate, or the refutation; exit with 1 if it is that."""
    schedule = load(wanted)
    if schedule.report.ok:
        verdict = prove(lower(schedule, **policies))
    else:
        verdict = prove(schedule)
    if as_json:
        emit_json({**sizes(schedule), **verdict.to_dict()})
    else:
        click.echo(str(verdict))
    if not verdict.ok:
        raise click.exceptions.Exit(1)
