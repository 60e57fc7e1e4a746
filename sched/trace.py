"""Timed instructions: predicted by `sim` or measured by `exec`, in one type.

Every picture, metric and export takes a Trace, so that holding a prediction
against a measurement is one comparison.

Times are exact (int or Fraction) where the costs were, and floats otherwise.
They count from 0, the start of the step, in the unit of the Cost they were
predicted from; measured ones are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np

from pipeproof.sched import metrics
from pipeproof.sched.causes import Causes
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, column, mean, plain, ratio
from pipeproof.sched.gaps import Gaps
from pipeproof.sched.grid import draw
from pipeproof.sched.memory import Curve, Ledger, Peak
from pipeproof.sched.parts import Parts, Times, unscaled
from pipeproof.sched.program import Program
from pipeproof.sched.weights import Sizes


@dataclass(frozen=True, eq=False)
class Timetable:
    """When each instruction started and ended.

    Attributes:
        start, end: per instruction, in parts of the trace's unit of time: Fractions
            of it so are whole numbers, which numpy compares and adds. No sum of
            durations overflows their type.
        parts: how many make a unit.
    """

    start: Times
    end: Times
    parts: int = 1

    def in_units(self, times: Times) -> Times:
        """Sums of such times in the unit itself."""
        if times.dtype == np.int32:
            times = times.astype(np.int64)  # sums of these may be larger
        if self.parts == 1:
            return times if times.dtype != object else column(times.tolist())
        return unscaled(times, self.parts)

    def unit(self, time: Any) -> Number:
        """One of them."""
        time = plain(time)
        return time if self.parts == 1 else plain(Fraction(time) / self.parts)


@dataclass(frozen=True, eq=False)
class Trace:
    """When each instruction of a program started and ended.

    Attributes:
        program: what ran.
        timetable: when; `start` and `end` say it in the unit of time.
        source: predicted or measured.
        sizes: what each buffer weighs.
        notes: what a reader must know, such as a processor shared by devices.
    """

    program: Program
    timetable: Timetable
    source: Literal["predicted", "measured"]
    sizes: Sizes
    notes: tuple[str, ...] = ()

    @cached_property
    def start(self) -> Times:
        """Of each instruction, in the trace's unit of time."""
        return self.timetable.in_units(self.timetable.start)

    @cached_property
    def end(self) -> Times:
        """Of each instruction, in the trace's unit of time."""
        return self.timetable.in_units(self.timetable.end)

    @cached_property
    def makespan(self) -> Number:
        """From the start of the step to the end of its last instruction."""
        return metrics.makespan(self)

    @cached_property
    def busy(self) -> list[Number]:
        """Time each device computes; joint durations counted as they are."""
        return metrics.busy(self)

    @property
    def ideal(self) -> Number:
        """Time a device computes, in the mean over devices."""
        return mean(self.busy)

    @property
    def bubble_fraction(self) -> Number:
        """Idle device-time / (devices × makespan); 0 for an empty step."""
        return ratio(self.makespan - self.ideal, self.makespan)

    @property
    def bubble_ratio(self) -> Number:
        """Idle time per device / ideal time per device."""
        return ratio(self.makespan - self.ideal, self.ideal)

    @cached_property
    def spans(self) -> list[Number]:
        """Each device's time from its first op's start to its last op's end."""
        return metrics.spans(self)

    @property
    def span(self) -> Number:
        """The longest of `spans`: the cost of the zero-bubble papers."""
        return max(self.spans)

    @property
    def span_bubble(self) -> Number:
        """1 - ideal / span: forgives the skew between devices (2401.10241)."""
        return ratio(self.span - self.ideal, self.span)

    @cached_property
    def peak_activations(self) -> list[Number]:
        """Most activations alive at once on each device.

        In micro-batches of the device's share of the model; a stored input that
        waits for recompute counts 0.
        """
        return Ledger(self, self.sizes.activations).peaks()

    @cached_property
    def peak_bytes(self) -> list[Number] | None:
        """Most bytes alive at once on each device, resident ones included.

        None where the costs give no bytes.
        """
        return None if self.sizes.bytes is None else self._bytes.peaks()

    @cached_property
    def _bytes(self) -> Ledger:
        sizes = self.sizes
        return Ledger(
            self,
            sizes.known_bytes(),
            sizes.resident,
            sizes.workspace,
            sizes.arriving,
        )

    def memory(self, device: int | None = None) -> Curve:
        """Bytes alive over time, by class, on one device or on all together.

        Raises:
            ParameterError: the costs give no bytes, or there is no such device.
        """
        if device is not None:
            self._there(device)
        return self._bytes.curve(device)

    def peak(self, device: int) -> Peak:
        """The most bytes alive on a device at once: when, by class, and whose.

        Raises:
            ParameterError: as `memory`.
        """
        self._there(device)
        return self._bytes.peak(device)

    def link_bytes(self) -> dict[tuple[int, int], Number]:
        """Bytes sent over each ordered pair of devices.

        Raises:
            ParameterError: the costs give no bytes.
        """
        return metrics.link_bytes(self)

    @cached_property
    def causes(self) -> Causes:
        """The last condition that each instruction met."""
        return Causes(self)

    def critical_path(self) -> list[int]:
        """Instructions from the start of the step to its end, one behind the other.

        Each could not end earlier because of the one before it.
        """
        return self.causes.path()

    @property
    def critical_parts(self) -> Parts:
        """The makespan cut into what ran on the critical path, from its end back."""
        return self.causes.critical

    @cached_property
    def _gaps(self) -> Gaps:
        return Gaps.of(self)

    def gaps(self, device: int | None = None) -> Gaps:
        """Idle times of a device, or of all, and what each waited for.

        Those before its ops, and the one behind its last op until the step ends:
        busy time and gaps add up to the makespan.

        Raises:
            ParameterError: there is no such device.
        """
        if device is None:
            return self._gaps
        self._there(device)
        return self._gaps.on(device)

    def _there(self, device: int) -> None:
        devices = self.program.schedule.devices
        if not 0 <= device < devices:
            raise ParameterError(f"devices are 0 … {devices - 1}, got {device}")

    def grid(self, tick: Number | None = None) -> str:
        """One line a device, one column a tick.

        Args:
            tick: width of a column in time; default the greatest common divisor
                of exact times, the shortest op of others.
        """
        return draw(self, tick)
