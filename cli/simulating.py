"""`pipeproof simulate`."""

from __future__ import annotations

import click

from pipeproof.cli.options import Conditions, Wanted
from pipeproof.cli.output import emit_json, emit_table, shown, shown_all, write_file
from pipeproof.cli.predict import cluster_of, cost_of, figures, predict
from pipeproof.cli.source import load
from pipeproof.sched import Trace
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.interop.chrome import UNITS, write_chrome
from pipeproof.sim import lower_bound


def predict_and_tell(
    wanted: Wanted,
    conditions: Conditions,
    trace_path: str | None,
    unit: str,
    *,
    as_json: bool,
) -> None:
    """Simulate a schedule and print its metrics."""
    trace = predict(load(wanted), conditions)
    if trace_path is not None:
        write_file(
            trace_path,
            lambda file: write_chrome(trace, file, microseconds=UNITS[unit]),
        )
    if as_json:
        emit_json(figures(trace))
        return
    bound = lower_bound(trace.program, cost_of(conditions), cluster_of(conditions))
    tell(trace, bound)


def tell(trace: Trace, bound: Number | None = None) -> None:
    """Print a trace's metrics, each by its own name, and what limits it."""
    rows = [
        ("makespan", shown(trace.makespan), "first start to last end"),
        ("ideal", shown(trace.ideal), "busy time of a device, in the mean"),
        (
            "bubble_fraction",
            shown(trace.bubble_fraction),
            "idle / (devices × makespan)",
        ),
        ("bubble_ratio", shown(trace.bubble_ratio), "idle per device / ideal"),
        ("span", shown(trace.span), "longest of a device's first start to last end"),
        ("span_bubble", shown(trace.span_bubble), "1 − ideal / span"),
        (
            "peak_activations",
            shown_all(trace.peak_activations),
            "by device, in micro-batches of its share",
        ),
    ]
    if (peaks := trace.peak_bytes) is not None:
        rows.append(("peak_bytes", shown_all(peaks), "by device, residents included"))
    if bound is not None:
        above = ratio(trace.makespan - bound, bound)
        distance = f"{float(above):.2%} above" if above else "at"
        rows.append(
            ("lower bound", shown(bound), f"of any order; makespan is {distance} it")
        )
    emit_table(
        f"{trace.program.schedule.summary}, {trace.source}",
        ("metric", "value", "what it is"),
        rows,
        right=("value",),
    )
    for note in trace.notes:
        click.echo(f"Note: {note}.")
    click.echo(limit(trace))


def limit(trace: Trace) -> str:
    """What limits the step, in a sentence: the longest idle time explained."""
    devices = range(trace.program.schedule.devices)
    longest = max(
        (gap for device in devices for gap in trace.gaps(device)),
        key=lambda gap: gap.end - gap.start,
        default=None,
    )
    if longest is None:
        return "No device idles before its last op."
    return f"Longest wait: {longest.explain(trace)}."
