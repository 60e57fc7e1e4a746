"""Memory by class: how it is told, and how a cap on it is read."""

from __future__ import annotations

from typing import Any

from pipeproof.cli.output import emit_table, full
from pipeproof.sched import Trace
from pipeproof.sched.exact import Number
from pipeproof.sched.memory import HOST, Peak

SHOWN = 16
"""Devices that a table has at most: of more, the fullest."""

UNITS = ("bytes", "kB", "MB", "GB")


def peaks_of(trace: Trace) -> list[Peak]:
    """Each device's peak; none where no bytes are known."""
    if trace.sizes.bytes is None:
        return []
    return [trace.peak(d) for d in range(trace.program.schedule.devices)]


def as_dict(trace: Trace, peak: Peak) -> dict[str, Any]:
    """A device's peak as `--json` has it."""
    return {
        "device": peak.device,
        "peak": full(peak.total),
        "time": full(peak.time),
        "op": None if peak.op < 0 else trace.program.label(peak.op),
        "by_class": {name: full(size) for name, size in peak.by_class.items()},
        "held": [
            {
                "stage": one.stage,
                "micro_batch": one.micro_batch,
                "bytes": full(one.bytes),
            }
            for one in peak.held
        ],
    }


def tell_peaks(trace: Trace, peaks: list[Peak]) -> None:
    """Print what each device holds at its peak; classes of no bytes are left out."""
    fullest = sorted(peaks, key=lambda peak: (-peak.total, peak.device))[:SHOWN]
    shown = sorted(fullest, key=lambda peak: peak.device)
    classes = [
        name
        for name in shown[0].by_class
        if name != HOST and any(peak.by_class[name] for peak in shown)
    ]
    scale = _scale(fullest[0].total)
    rows = [
        (
            str(peak.device),
            *(_scaled(peak.by_class[name], scale) for name in classes),
            _scaled(peak.total, scale),
            "" if peak.op < 0 else trace.program.label(peak.op),
            str(len(peak.held)),
        )
        for peak in shown
    ]
    which = (
        "each device's peak"
        if len(shown) == len(peaks)
        else (f"the peaks of the {len(shown)} fullest of {len(peaks):,} devices")
    )
    emit_table(
        f"{UNITS[scale]} at {which}",
        (
            "device",
            *(name.replace("_", " ") for name in classes),
            "all",
            "at",
            "held by",
        ),
        rows,
        right=(
            "device",
            *(name.replace("_", " ") for name in classes),
            "all",
            "held by",
        ),
    )


def _scale(largest: Number) -> int:
    scale = 0
    while scale < len(UNITS) - 1 and largest >= 10 * 1000 ** (scale + 1):
        scale += 1
    return scale


def _scaled(size: Number, scale: int) -> str:
    if not scale:
        return f"{full(size):,}"
    return f"{float(size) / 1000**scale:,.3f}"
