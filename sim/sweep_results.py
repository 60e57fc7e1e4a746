"""What a sweep answers: the figures of each point, or why there are none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeproof.sched import Trace
from pipeproof.sched.exact import rounded
from pipeproof.sim.sweep_points import Point

Status = Literal["simulated", "refused", "broken"]
"""`refused`: the schedule does not allow these sizes or options, or the cost does
not fit it; `broken`: `check` has findings, or the simulation deadlocks."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a simulation came to; times in the cost's unit.

    A table holds floats: what was exact is rounded, once, to the nearest.

    Attributes:
        stages: S.
        chunks: V, the most stages of one pipe on a device.
        slices: Q.
        ops: of all devices.
        makespan, span, ideal, bubble_fraction, bubble_ratio, span_bubble: as
            `Trace` defines them.
        peak_activations: by device, in micro-batches of its share.
        peak_bytes: by device; None where the cost gives no bytes.
    """

    stages: int
    chunks: int
    slices: int
    ops: int
    makespan: float
    span: float
    ideal: float
    bubble_fraction: float
    bubble_ratio: float
    span_bubble: float
    peak_activations: tuple[float, ...]
    peak_bytes: tuple[float, ...] | None

    @classmethod
    def of(cls, trace: Trace) -> Figures:
        """The figures of a trace.

        Raises:
            ParameterError: one is beyond the range of a float.
        """
        schedule = trace.program.schedule
        peak_bytes = trace.peak_bytes
        return cls(
            stages=schedule.stages,
            chunks=max(map(max, schedule.placement.shares())),
            slices=schedule.slices,
            ops=len(schedule),
            makespan=rounded(trace.makespan),
            span=rounded(trace.span),
            ideal=rounded(trace.ideal),
            bubble_fraction=rounded(trace.bubble_fraction),
            bubble_ratio=rounded(trace.bubble_ratio),
            span_bubble=rounded(trace.span_bubble),
            peak_activations=tuple(map(rounded, trace.peak_activations)),
            peak_bytes=None if peak_bytes is None else tuple(map(rounded, peak_bytes)),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """A point and its answer.

    Attributes:
        point: what was asked.
        status: how it went.
        figures: None unless it was simulated.
        reason: why it was not, on one line.
    """

    point: Point
    status: Status
    figures: Figures | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """One flat row: a DataFrame takes a list of these.

        The point, the figures by their names (None where there are none), and
        the largest of each peak.
        """
        record: dict[str, Any] = {**self.point.described(), "status": self.status}
        for spec in fields(Figures):
            record[spec.name] = figure = getattr(self.figures, spec.name, None)
            if spec.name.startswith("peak_"):
                record[f"max_{spec.name}"] = None if figure is None else max(figure)
        return {**record, "reason": self.reason}


def columns(results: Iterable[Result]) -> dict[str, list[Any]]:
    """The records by column, as `pandas.DataFrame` and `pyarrow.table` take them."""
    records = [result.record() for result in results]
    return {name: [r[name] for r in records] for name in records[0]} if records else {}
