"""`pipeproof export`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

from pipeproof.cli.options import Conditions, Wanted
from pipeproof.cli.output import emit_json, write_file
from pipeproof.cli.predict import predict, sizes
from pipeproof.cli.source import load
from pipeproof.sched import ParameterError, Schedule


def write(
    wanted: Wanted,
    conditions: Conditions,
    form: str,
    output: str,
    *,
    as_json: bool,
) -> None:
    """Write a schedule in another form."""
    if as_json and output == "-":
        raise ParameterError(
            "--json reports on the file that is written: give it a name with -o"
        )
    schedule = load(wanted)
    write_file(output, _writer(schedule, conditions, form))
    if as_json:
        emit_json(
            {
                **sizes(schedule),
                "digest": schedule.digest,
                "to": form,
                "path": output,
                "bytes": os.stat(output).st_size,
            }
        )


def _writer(
    schedule: Schedule, conditions: Conditions, form: str
) -> Callable[[TextIO], object]:
    """What is to be done with the open file; all that can be refused is done."""
    if form == "text":
        text = schedule.format()
        return lambda file: file.write(text)
    if form == "json":
        from pipeproof.sched.interop.json_form import format_json

        text = format_json(schedule)
        return lambda file: file.write(text)
    if form.startswith("torch-csv"):
        from pipeproof.sched.interop.torch_writer import format_torch_csv

        text = format_torch_csv(schedule, communication=form == "torch-csv-comms")
        return lambda file: file.write(text)
    trace = predict(schedule, conditions)
    if form == "chrome":
        from pipeproof.sched.interop.chrome import UNITS, write_chrome

        microseconds = UNITS[conditions.unit]
        return lambda file: write_chrome(trace, file, microseconds=microseconds)
    if form == "svg":
        from pipeproof.sched.interop.svg import draw_svg

        drawn = draw_svg(trace)
    else:
        from pipeproof.sched.interop.html import draw_html

        drawn = draw_html(trace)
    return lambda file: file.write(drawn)
