"""Whether devices and hosts have the memory for what a trace keeps alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number
from pipeproof.sched.findings import Finding, Report
from pipeproof.sched.hosts import HostPeak, host_peaks
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
    host_memory: Number | None = None,
    node_of: Sequence[int] | None = None,
) -> Report:
    """Hold each device's peak, and each host's, against a cap.

    Args:
        trace: predicted or measured.
        memory: bytes of each device, one number or one per device. Residents
            count; what lies on the host does not.
        activations: likewise the most `peak_activations`.
        host_memory: bytes that offloaded activations may take on a node's host.
        node_of: the node of each device; default one for all.

    Returns:
        A finding for each device, or host, above its cap: the op at which the peak
        is first reached; of a device also what it consists of, and whose it is.

    Raises:
        ParameterError: no cap, one that is no number of at least 0, not one per
            device, or a cap on bytes where none are known.
    """
    if memory is None and activations is None and host_memory is None:
        raise ParameterError(
            "nothing to hold against: give memory, activations or host_memory"
        )
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
    if host_memory is not None:
        (cap,) = _caps("host_memory", [host_memory], 1)
        nodes = [0] * devices if node_of is None else node_of
        findings += [
            _on_host(trace, most, cap)
            for most in host_peaks(trace, nodes)
            if most.total > cap
        ]
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


def _on_host(trace: Trace, most: HostPeak, cap: Number) -> Finding:
    schedule, program = trace.program.schedule, trace.program
    first = int(program.first_op[most.op])
    device, step = schedule.locate(first)
    return Finding(
        "host memory",
        device,
        step,
        schedule.ops[first],
        expected=f"at most {_show(cap)} bytes of activations on a node's host",
        found=f"{_show(most.total)} bytes at {program.label(most.op)} on the host of "
        f"node {most.node}",
        remedy="Offload fewer chunks, or sooner back from there, or allow "
        f"{_show(most.total)} bytes",
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
