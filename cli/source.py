"""NAME|FILE → Schedule."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

from pipeproof.cli.options import FLAGS, Features, Wanted
from pipeproof.sched import CATALOG, Schedule, catalog, recompute
from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.interop.json_form import parse_json
from pipeproof.sched.interop.torch_csv import parse_torch_csv
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
    if wanted.source != "-" and not os.path.exists(wanted.source):
        raise ParameterError(
            f"{wanted.source!r} is neither a schedule of the catalogue nor a file: "
            f"{catalog.known_instead(wanted.source)}"
        )
    given = {"-p": wanted.devices, "-m": wanted.micro_batches}
    options = wanted.features.of_generator()
    given |= {FLAGS[name]: value for name, value in options.items()}
    if surplus := [flag for flag, value in given.items() if value is not None]:
        raise ParameterError(
            f"a file has its own sizes: leave out {', '.join(surplus)}, or name a "
            f"schedule of the catalogue"
        )
    return _rematerialised(_read(wanted.source), wanted.features)


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
    return make(wanted.source, wanted.devices, wanted.micro_batches, wanted.features)


def _rematerialised(schedule: Schedule, features: Features) -> Schedule:
    if features.remat is None:
        return schedule
    return recompute(schedule, features.remat)  # type: ignore[arg-type]


def _read(source: str) -> Schedule:
    where = "standard input" if source == "-" else source
    if source == "-":
        data = _bounded(sys.stdin.buffer, where)
    else:
        size = os.stat(source).st_size
        if size > MAX_TEXT_BYTES:
            raise _too_large(where, f"{size:,} bytes")
        with open(source, "rb") as file:
            data = _bounded(file, where)
    try:
        text = data.decode()
        return _parse(text, is_csv=source.lower().endswith(".csv"))
    except UnicodeDecodeError as error:
        raise ParseError(
            f"{where}: expected text in UTF-8, found byte "
            f"0x{data[error.start]:02x} at {error.start:,}"
        ) from None
    except ParseError as error:
        raise ParseError(f"{where}: {error}") from None


def _parse(text: str, *, is_csv: bool) -> Schedule:
    """Read whichever form it is: none opens as another does."""
    opening = text.lstrip()[:1]
    if is_csv or (opening and opening in "0123456789(,"):
        return parse_torch_csv(text)
    return parse_json(text) if opening == "{" else Schedule.parse(text)


def _bounded(file: BinaryIO, where: str) -> bytes:
    """All of it; a pipe or a device tells no size beforehand."""
    data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise _too_large(where, "more")
    return data


def _too_large(where: str, found: str) -> ParseError:
    return ParseError(
        f"{where}: expected at most {MAX_TEXT_BYTES:,} bytes, found {found}: generate "
        "so long a schedule instead of reading it"
    )
