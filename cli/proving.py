"""`pipeproof prove`."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from pipeproof.cli.options import LOWERING, Wanted, flag
from pipeproof.cli.output import emit_json
from pipeproof.cli.predict import sizes
from pipeproof.cli.source import load_to_prove
from pipeproof.sched import (
    Certificate,
    ParameterError,
    Program,
    Refutation,
    Schedule,
    UnsupportedError,
    lower,
    prove,
)

MOST_IN_PASSING = 10_000
"""Ops that `check` and `run` prove without being asked: well below a second."""


def certify(wanted: Wanted, policies: dict[str, Any], *, as_json: bool) -> None:
    """Print the certificate, or the refutation; exit with 1 if it is that.

    Raises:
        ParameterError: a policy of lowering for a file that needs none.
    """
    subject = load_to_prove(wanted)
    if isinstance(subject, Program):
        _needs_no_lowering()
    elif subject.report.ok:
        subject = lower(subject, **policies)
    verdict = prove(subject)
    if as_json:
        emit_json({**sizes(verdict.schedule), **verdict.to_dict()})
    else:
        click.echo(str(verdict))
    if not verdict.ok:
        raise click.exceptions.Exit(1)


def in_passing(program: Program | Schedule) -> Certificate | Refutation | str:
    """The proof for a command that is about something else; or why there is none."""
    ops = len(program.schedule if isinstance(program, Program) else program)
    if ops > MOST_IN_PASSING:
        return (
            f"not proved: {ops:,} ops are more than {MOST_IN_PASSING:,}, the most that "
            "are proved in passing; `pipeproof prove` does"
        )
    try:
        return prove(program)
    except UnsupportedError as error:
        return f"not proved: {error}"


def in_words(verdict: Certificate | Refutation | str) -> str:
    """A line about it; a refutation spells out its findings."""
    if isinstance(verdict, Certificate):
        return (
            f"Its program {verdict.program[:16]} is proved; `pipeproof prove` prints "
            "the certificate."
        )
    return f"Its program is {verdict}." if isinstance(verdict, str) else str(verdict)


def as_proved(verdict: Certificate | Refutation | str) -> bool | None:
    """For JSON: whether it is proved, or null where that was not tried."""
    return None if isinstance(verdict, str) else verdict.ok


def _needs_no_lowering() -> None:
    context = click.get_current_context()
    for name in LOWERING:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise ParameterError(
                f"{flag(name)} says how to add communication, and the file has its "
                "own: leave it out, or give the CSV without communication"
            )
