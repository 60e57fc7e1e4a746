"""`pipeproof prove`."""

from __future__ import annotations

from typing import cast

import click

from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import sizes
from pipeproof.cli.source import load
from pipeproof.sched import lower, prove
from pipeproof.sched.lower import Receives, Transfers


def certify(wanted: Wanted, transfers: str, receives: str, *, as_json: bool) -> None:
    """Print the certificate, or the refutation; exit with 1 if it is that."""
    schedule = load(wanted)
    if schedule.report.ok:
        verdict = prove(
            lower(
                schedule,
                transfers=cast(Transfers, transfers),
                receives=cast(Receives, receives),
            )
        )
    else:
        verdict = prove(schedule)
    if as_json:
        emit_json({**sizes(schedule), **verdict.to_dict()})
    else:
        click.echo(str(verdict))
    if not verdict.ok:
        raise click.exceptions.Exit(1)
