"""`pipeproof simulate`."""

from __future__ import annotations

from typing import Any

import click

from pipeproof.cli.memory import as_dict, peaks_of, tell_peaks
from pipeproof.cli.options import Conditions, Wanted
from pipeproof.cli.output import emit_json, emit_table, shown, shown_all, write_file
from pipeproof.cli.predict import cluster_of, cost_of, figures, predict
from pipeproof.cli.source import load
from pipeproof.cli.transformer import as_json_of, in_words, model_of
from pipeproof.sched import Trace
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.gaps import Cause
from pipeproof.sched.interop.chrome import UNITS, write_chrome
from pipeproof.sim import lower_bound
from pipeproof.sim.transformer import Transformer

ROUNDING = 1e-9
"""Of floats, so small a distance from the lower bound is none."""


def predict_and_tell(
    wanted: Wanted,
    conditions: Conditions,
    trace_path: str | None,
    *,
    as_json: bool,
) -> None:
    """Simulate a schedule and print its metrics."""
    schedule = load(wanted)
    trace = predict(schedule, conditions)
    model = model_of(conditions, schedule)
    if trace_path is not None:
        write_file(
            trace_path,
            lambda file: write_chrome(trace, file, microseconds=UNITS[conditions.unit]),
        )
    if as_json:
        emit_json(figures(trace) | described(trace, model))
        return
    cost, cluster = cost_of(conditions, schedule), cluster_of(conditions)
    tell(trace, lower_bound(trace.program, cost, cluster))
    if peaks := peaks_of(trace):
        click.echo()
        tell_peaks(trace, peaks)
    if model is not None:
        click.echo(in_words(model, conditions))


def described(trace: Trace, model: Transformer | None) -> dict[str, Any]:
    """What `--json` has beside the figures, where bytes are known."""
    result: dict[str, Any] = {}
    if peaks := peaks_of(trace):
        result["memory"] = [as_dict(trace, peak) for peak in peaks]
    if model is not None:
        result["model"] = as_json_of(model)
    return result


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
        rows.append(
            ("peak_bytes", shown(max(peaks)), "most on any device, residents included")
        )
    if bound is not None:
        above = ratio(trace.makespan - bound, bound)
        distance = f"{float(above):.2%} above" if above > ROUNDING else "at"
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
    gaps = trace.gaps()
    waits = [i for i in range(len(gaps)) if gaps.cause[i] != Cause.DRAIN]
    longest = max(waits, key=gaps.duration.tolist().__getitem__, default=None)
    if longest is None:
        return "No device idles before its last op."
    return f"Longest wait: {gaps[longest].explain(trace)}."
