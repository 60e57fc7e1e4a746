"""NAME|FILE → Schedule."""

from __future__ import annotations

import os
import sys

from pipeproof.cli.options import FLAGS, Features, Wanted
from pipeproof.sched import (
    CATALOG,
    Program,
    Schedule,
    catalog,
    recompute,
    with_steps,
)
from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.interop.json_form import parse_json
from pipeproof.sched.interop.torch_csv import TorchCsv, read_torch_csv
from pipeproof.sched.interop.torch_program import torch_program
from pipeproof.sched.reading import text_of
from pipeproof.sched.text import MAX_TEXT_BYTES

MAX_CELLS = 10**8
"""Devices × micro-batches that the command line generates."""


def load(wanted: Wanted) -> Schedule:
    """The schedule that a command is about.

    Raises:
        ParameterError: neither a name nor a file, sizes missing for the one or
            given for the other, or refused by the generator.
        ParseError: a file in none of the forms.
    """
    if wanted.source in CATALOG:
        return _generate(wanted)
    if not _exists(wanted.source):
        raise ParameterError(
            f"{wanted.source!r} is neither a schedule of the catalogue nor a file: "
            f"{catalog.known_instead(wanted.source)}"
        )
    _own_sizes(wanted)
    read = _read(wanted.source, agreeing=True)
    schedule = read.schedule if isinstance(read, TorchCsv) else read
    return _transformed(schedule, wanted)


def load_to_prove(wanted: Wanted) -> Schedule | Program:
    """The same, but of a CSV with communication the program that it says.

    Raises:
        ParameterError: as `load`; or R for a file that has its communication already.
        ParseError: as `load`, but that transfers need not pair up.
    """
    if wanted.source not in CATALOG and _exists(wanted.source):
        _own_sizes(wanted)
        read = _read(wanted.source, agreeing=False)
        if not isinstance(read, TorchCsv):
            return _transformed(read, wanted)
        if not read.has_communication or not read.schedule.report.ok:
            return _transformed(read.schedule, wanted)
        if wanted.features.remat is not None or wanted.steps:
            flag = "--with-steps" if wanted.steps else "--remat"
            raise ParameterError(
                f"{flag} changes what is computed, and the file has its communication "
                "already: give the CSV without"
            )
        return torch_program(read)
    return load(wanted)


def make(name: str, devices: int, micro_batches: int, features: Features) -> Schedule:
    """A schedule of the catalogue.

    Raises:
        ParameterError: as `catalog.make`, or more than can sensibly be generated.
    """
    if devices * micro_batches > MAX_CELLS:
        raise ParameterError(
            f"{devices:,} devices × {micro_batches:,} micro-batches exceed "
            f"{MAX_CELLS:,}, the most that the command line generates"
        )
    options = features.of_generator()
    if row := CATALOG.get(name):
        flags = [FLAGS.get(option, option) for option in row.options]
        has = ", ".join(flags) or "no options"
        for option, value in options.items():
            if value is not None and option not in row.options:
                raise ParameterError(
                    f"{name} does not take {FLAGS[option]}: it has {has}"
                )
    schedule = catalog.make(
        name, devices=devices, micro_batches=micro_batches, **options
    )
    return _rematerialised(schedule, features)


def _generate(wanted: Wanted) -> Schedule:
    if wanted.devices is None or wanted.micro_batches is None:
        missing = [
            flag
            for flag, size in (("-p", wanted.devices), ("-m", wanted.micro_batches))
            if size is None
        ]
        raise ParameterError(
            f"{wanted.source} needs {' and '.join(missing)}: for example "
            f"{wanted.source} -p 4 -m 8"
        )
    schedule = make(
        wanted.source, wanted.devices, wanted.micro_batches, wanted.features
    )
    return with_steps(schedule) if wanted.steps else schedule


def _exists(source: str) -> bool:
    return source == "-" or os.path.exists(source)


def _own_sizes(wanted: Wanted) -> None:
    """Refuse sizes and options of generators for a file."""
    given = {"-p": wanted.devices, "-m": wanted.micro_batches}
    options = wanted.features.of_generator()
    given |= {FLAGS[name]: value for name, value in options.items()}
    if surplus := [flag for flag, value in given.items() if value is not None]:
        raise ParameterError(
            f"a file has its own sizes: leave out {', '.join(surplus)}, or name a "
            f"schedule of the catalogue"
        )


def _transformed(schedule: Schedule, wanted: Wanted) -> Schedule:
    schedule = _rematerialised(schedule, wanted.features)
    return with_steps(schedule) if wanted.steps else schedule


def _rematerialised(schedule: Schedule, features: Features) -> Schedule:
    if features.remat is None:
        return schedule
    return recompute(schedule, features.remat)  # type: ignore[arg-type]


def _read(source: str, *, agreeing: bool) -> Schedule | TorchCsv:
    where = "standard input" if source == "-" else source
    hint = "generate so long a schedule instead of reading it"
    if source == "-":
        text = text_of(sys.stdin.buffer, where, MAX_TEXT_BYTES, hint)
    else:
        with open(source, "rb") as file:
            text = text_of(file, where, MAX_TEXT_BYTES, hint)
    try:
        is_csv = source.lower().endswith(".csv")
        return _parse(text, is_csv=is_csv, agreeing=agreeing)
    except ParseError as error:
        raise ParseError(f"{where}: {error}") from None


def _parse(text: str, *, is_csv: bool, agreeing: bool) -> Schedule | TorchCsv:
    """Read whichever form it is: none opens as another does."""
    opening = text.lstrip()[:1]
    if is_csv or (opening and opening in "0123456789(,"):
        return read_torch_csv(text, agreeing=agreeing)
    return parse_json(text) if opening == "{" else Schedule.parse(text)
