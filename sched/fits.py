"""Whether every device has the memory for what a trace keeps alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number
from pipeproof.sched.findings import Finding, Report
from pipeproof.sched.memory import Ledger, Peak

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

PerDevice = Number | Sequence[Number]

NAMED = 4
"""Micro-batches that a finding names before it only counts them."""


def fits(
    trace: Trace,
    *,
    memory: PerDevice | None = None,
    activations: PerDevice | None = None,
) -> Report:
    """Hold each device's peak against a cap.

    Args:
        trace: predicted or measured.
        memory: bytes of each device, one number or one per device. Residents
            count; what lies on the host does not.
        activations: likewise the most `peak_activations`.

    Returns:
        A finding for each device above its cap: the op at which the peak is first
        reached, what it consists of, and whose it is.

    Raises:
        ParameterError: no cap, one that is no number of at least 0, not one per
            device, or a cap on bytes where none are known.
    """
    if memory is None and activations is None:
        raise ParameterError("nothing to hold against: give memory or activations")
    devices = trace.program.schedule.devices
    findings: list[Finding] = []
    if memory is not None:
        caps = _caps("memory", memory, devices)
        trace.sizes.known_bytes()
        for device, peak in enumerate(trace.peak_bytes or ()):
            if peak > caps[device]:
                most = trace.peak(device)
                findings.append(_finding(trace, most, caps[device], "bytes"))
    if activations is not None:
        caps = _caps("activations", activations, devices)
        ledger = Ledger(trace, trace.sizes.activations)
        for device, peak in enumerate(ledger.peaks()):
            if peak > caps[device]:
                most = ledger.peak(device)
                findings.append(
                    _finding(trace, most, caps[device], "micro-batch activations")
                )
    return Report(trace.program.schedule, tuple(findings), "fits")


def _caps(name: str, given: PerDevice, devices: int) -> Sequence[Number]:
    caps = given if isinstance(given, Sequence) else [given] * devices
    if len(caps) != devices:
        raise ParameterError(
            f"{name} has {len(caps)} numbers for {devices} devices: give one number, "
            "or one per device"
        )
    for cap in caps:
        if not is_number(cap) or not cap >= 0:
            raise ParameterError(
                f"{name} must be a number of at least 0, or one per device, got {cap!r}"
            )
    return caps


def _finding(trace: Trace, peak: Peak, cap: Number, unit: str) -> Finding:
    schedule, program = trace.program.schedule, trace.program
    step = op = None
    at = "at the start"
    if peak.op >= 0:
        first = int(program.first_op[peak.op])
        _, step = schedule.locate(first)
        op = schedule.ops[first]
        at = f"at {program.label(peak.op)}"
    return Finding(
        "memory",
        peak.device,
        step,
        op,
        expected=f"at most {_show(cap)} {unit} at once",
        found=f"{_show(peak.total)} {unit} {at}: {_made_of(peak)}",
        remedy="Keep less (recompute, offload, smaller micro-batches, or a schedule "
        f"with fewer of them under way), or allow {_show(peak.total)} {unit}",
    )


def _made_of(peak: Peak) -> str:
    parts = [
        f"{name} {_show(size)}"
        for name, size in peak.by_class.items()
        if size and name != "host"
    ]
    if not peak.held:
        return ", ".join(parts)
    names = [f"{one.stage}:{one.micro_batch}" for one in peak.held[:NAMED]]
    more = " …" if len(peak.held) > NAMED else ""
    return (
        f"{', '.join(parts)}; {len(peak.held)} (stage:micro-batch) hold it, "
        f"{' '.join(names)}{more}"
    )


def _show(number: Number) -> str:
    if isinstance(number, int):
        return f"{number:,}"
    return f"{float(number):,.6g}"
