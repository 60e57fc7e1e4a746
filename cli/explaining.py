"""`pipeproof explain`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import click

from pipeproof.cli.options import Conditions, Wanted
from pipeproof.cli.output import emit_json, emit_table, full, shown
from pipeproof.cli.predict import cluster_of, cost_of, predict, sizes
from pipeproof.cli.source import load
from pipeproof.sched import Trace
from pipeproof.sched.exact import Number, ratio
from pipeproof.sim import (
    Bounds,
    Jitter,
    Sensitivity,
    bounds,
    jitter,
    sensitivity,
    slack,
)

ROUNDING = Fraction(1, 2**40)


def explain_and_tell(
    wanted: Wanted,
    conditions: Conditions,
    gaps: int,
    *,
    what_if: bool,
    noise: dict[str, Any],
    as_json: bool,
) -> None:
    """Simulate a schedule, and print why it takes as long as it does.

    Args:
        wanted: the schedule.
        conditions: what simulating assumes.
        gaps: how many of the longest to print.
        what_if: whether to print what less time for something buys.
        noise: the arguments of `jitter` that were given; none for no jitter.
        as_json: print one object instead.
    """
    trace = predict(load(wanted), conditions)
    full(trace.makespan)  # refused here where it is beyond the range of a float
    program = trace.program
    cost, cluster = cost_of(conditions, program.schedule), cluster_of(conditions)
    bound = bounds(program, cost, cluster, max_activations=trace.peak_activations)
    # Of floats no slack is exactly 0.
    left = slack(trace, cluster)[program.computes]
    without_slack = int((left <= trace.makespan * ROUNDING).sum())
    gains = sensitivity(program, cost, cluster) if what_if else None
    runs = jitter(program, cost, cluster, **noise) if noise else None
    if as_json:
        report = _figures(trace, bound, gaps, without_slack)
        if gains is not None:
            report["sensitivity"] = _of_sensitivity(gains)
        if runs is not None:
            report["jitter"] = _of_jitter(runs)
        emit_json(report)
        return
    _tell_bound(trace, bound)
    _tell_idle(trace)
    _tell_gaps(trace, gaps)
    _tell_path(trace, without_slack)
    if gains is not None:
        _tell_sensitivity(gains)
    if runs is not None:
        _tell_jitter(runs)


def _percent(part: Number, whole: Number) -> str:
    return f"{full(ratio(part, whole)):.1%}"


def _tell_bound(trace: Trace, bound: Bounds) -> None:
    makespan = trace.makespan
    distance = bound.distance(makespan)
    above = f"{full(distance):.2%} above" if distance else "at"
    rows = [
        ("makespan", shown(makespan), f"{above} the lower bound"),
        ("lower bound", shown(bound.largest), f"by {bound.reason}"),
        ("chain", shown(bound.chain), "longest path of dependencies"),
        ("work", shown(max(bound.work)), "what a device must run, in any order"),
    ]
    if bound.memory is not None:
        what = "with no more activations alive than here, in any order"
        rows.append(("memory", shown(max(bound.memory)), what))
    if bound.shared:
        rows.append(("processor", shown(bound.shared), "all work, on one processor"))
    emit_table(
        f"{trace.program.schedule.summary}, {trace.source}",
        ("bound", "value", "what it is"),
        rows,
        right=("value",),
    )
    for note in trace.notes:
        click.echo(f"Note: {note}.")


def _tell_idle(trace: Trace) -> None:
    click.echo("\nIdle time by cause")
    for line in trace.gaps().summaries():
        click.echo(f"  {line}")


def _tell_gaps(trace: Trace, count: int) -> None:
    gaps = trace.gaps()
    longest = gaps.longest(count)
    if not longest:
        return
    click.echo(
        f"\nThe longest of {len(gaps):,} gaps" if count < len(gaps) else "\nGaps"
    )
    for number in longest:
        click.echo(f"  {gaps[number].explain(trace)}")


def _tell_path(trace: Trace, without_slack: int) -> None:
    found = trace.critical_parts.by_name(kinds=True)
    rows = [
        (name, shown(time), _percent(time, trace.makespan))
        for name, time in found.items()
    ]
    click.echo()
    emit_table(
        f"Critical path: {without_slack:,} of {len(trace.program.computes):,} ops "
        "have no slack",
        ("what runs", "time", "of makespan"),
        rows,
        right=("time", "of makespan"),
    )


def _tell_sensitivity(found: Sensitivity) -> None:
    rows = [
        (
            gain.name,
            shown(gain.critical),
            shown(gain.most),
            shown(gain.gain),
            f"{full(ratio(gain.gain, found.makespan)):.4%}",
        )
        for gain in found.gains
    ]
    click.echo()
    emit_table(
        f"Sensitivity: what {full(found.less):.0%} less time buys, each simulated",
        ("less time for", "on critical path", "at most", "gain", "of makespan"),
        rows,
        right=("on critical path", "at most", "gain", "of makespan"),
    )


def _tell_jitter(found: Jitter) -> None:
    makespans, idle = found.quantiles(), found.idle_quantiles()
    columns = [f"{100 * q:g} %" for q in makespans]
    rows = [("makespan", *map(shown, makespans.values()))]
    rows += [
        (f"idle of device {device}", *map(shown, quantiles.values()))
        for device, quantiles in enumerate(idle)
    ]
    mean = float(found.makespan.mean())
    title = f"Jitter: {found.distribution}, sigma {found.sigma:g}"
    if found.straggler_chance:
        title += (
            f", each device {found.straggler_slowdown:g} times as slow with a chance "
            f"of {found.straggler_chance:g}"
        )
    click.echo(
        f"\n{title}; {found.runs:,} runs, seed {found.seed}; makespan "
        f"{shown(found.usual)} without, {shown(mean)} in the mean"
    )
    emit_table(
        "Quantiles of runs",
        ("of", *columns),
        rows,
        right=columns,
    )


def _figures(
    trace: Trace, bound: Bounds, count: int, without_slack: int
) -> dict[str, Any]:
    gaps = trace.gaps()
    program = trace.program
    return {
        **sizes(program.schedule),
        "makespan": full(trace.makespan),
        "bound": {
            "largest": full(bound.largest),
            "reason": bound.reason,
            "distance": full(bound.distance(trace.makespan)),
            "chain": full(bound.chain),
            "work": list(map(full, bound.work)),
            "memory": None if bound.memory is None else list(map(full, bound.memory)),
        },
        "idle": [
            {
                "device": device,
                "total": full(sum(causes.values())),
                "by_cause": {c.name.lower(): full(t) for c, t in causes.items()},
                "by_blame": {name: full(time) for name, time in blame.items()},
            }
            for device, (causes, blame) in enumerate(zip(gaps.by_cause(), gaps.blame()))
        ],
        "gaps": [_of_gap(trace, number) for number in gaps.longest(count)],
        "critical_path": {
            "ops_without_slack": without_slack,
            "by_name": {
                name: full(time)
                for name, time in trace.critical_parts.by_name(kinds=True).items()
            },
            "path": [
                {
                    "what": program.label(index),
                    "device": int(program.device[index]),
                    "start": full(trace.start[index]),
                    "end": full(trace.end[index]),
                }
                for index in trace.critical_path()
            ],
        },
    }


def _of_gap(trace: Trace, number: int) -> dict[str, Any]:
    gap = trace.gaps()[number]
    label = trace.program.label
    return {
        "device": gap.device,
        "start": full(gap.start),
        "end": full(gap.end),
        "cause": gap.cause.name.lower(),
        "waiting": label(gap.waiting) if gap.waiting >= 0 else None,
        "waits_for": label(gap.waits_for) if gap.waits_for >= 0 else None,
        "text": gap.explain(trace),
    }


def _of_sensitivity(found: Sensitivity) -> dict[str, Any]:
    return {
        "less": full(found.less),
        "gains": [
            {
                "name": gain.name,
                "time": full(gain.time),
                "critical": full(gain.critical),
                "most": full(gain.most),
                "gain": full(gain.gain),
            }
            for gain in found.gains
        ],
    }


def _of_jitter(found: Jitter) -> dict[str, Any]:
    return {
        "distribution": found.distribution,
        "sigma": found.sigma,
        "straggler_chance": found.straggler_chance,
        "straggler_slowdown": found.straggler_slowdown,
        "runs": found.runs,
        "seed": found.seed,
        "usual": full(found.usual),
        "mean": float(found.makespan.mean()),
        "makespan": {f"{q:g}": time for q, time in found.quantiles().items()},
        "idle": [
            {f"{q:g}": time for q, time in quantiles.items()}
            for quantiles in found.idle_quantiles()
        ],
    }
