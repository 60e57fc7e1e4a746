"""Name → generator, with what its paper says of it as executable formulas.

One list of rows feeds `make`, the command line, the documentation and the tests
that all schedules share, so a new row cannot escape any of them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.gen import gpipe, naive, one_f_one_b
from pipeproof.sched.ir import Schedule


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes and times for which a formula is asked.

    Attributes:
        p: devices.
        m: micro-batches.
        options: what the generator takes beside.
        forward: F, time of a device's whole share, as for I and W.
        input_grad: I.
        weight_grad: W.
        overlap: joint time of F and B where they overlap; default their sum.
    """

    p: int
    m: int
    options: Mapping[str, Any] = field(default_factory=dict)
    forward: Number = 1
    input_grad: Number = 1
    weight_grad: Number = 1
    overlap: Number | None = None

    @property
    def backward(self) -> Any:
        """B = I + W."""
        return self.input_grad + self.weight_grad

    @property
    def ideal(self) -> Any:
        """M (F + B): the time a device computes, if nothing overlaps."""
        return self.m * (self.forward + self.backward)


IdleOf = Literal["step", "span", "device"]
"""Which idle time a formula gives: of a device in the step, in the mean
(`makespan - ideal`); inside the longest span (`span - ideal`); or of the device
that idles most inside its own span."""


@dataclass(frozen=True, slots=True)
class Row:
    """A published schedule.

    The formulas are for equal stages and free links, without recomputation.

    Attributes:
        name: in the catalogue.
        generator: (devices, micro_batches, options…) → Schedule.
        summary: when to use it, in a line.
        source: paper, section, arXiv id.
        constraints: what the sizes must fulfil, in words; `none` if nothing.
        bubble: the idle time over what it is measured in, as people write it.
        peak: `peak_activations` of device d, likewise.
        idle: the formula of the idle time.
        peak_of: the formula of the peak on device d, in micro-batches of its share.
        idle_of: which idle time it is.
        holds: where both formulas are exact.
        bounds: where they are not, between what the idle time lies; None for no
            upper bound.
        allows: whether the generator takes these sizes; it raises if not.
    """

    name: str
    generator: Callable[..., Schedule]
    summary: str
    source: str
    constraints: str
    bubble: str
    peak: str
    idle: Callable[[Case], Number]
    peak_of: Callable[[Case, int], Number]
    idle_of: IdleOf = "step"
    holds: Callable[[Case], bool] = lambda case: True
    bounds: Callable[[Case], tuple[Number, Number | None]] = lambda case: (0, None)
    allows: Callable[[Case], bool] = lambda case: True

    @property
    def options(self) -> tuple[str, ...]:
        """What the generator takes beside the two sizes."""
        return tuple(inspect.signature(self.generator).parameters)[2:]

    def make(self, case: Case) -> Schedule:
        """The schedule of these sizes."""
        return self.generator(case.p, case.m, **case.options)

    def bubble_fraction(self, p: int, m: int) -> Number:
        """Idle / (idle + ideal) with F = I = W, of the idle time of `idle_of`."""
        case = Case(p, m)
        idle = self.idle(case)
        return ratio(idle, idle + case.ideal)

    def peak_activations(self, p: int, m: int, d: int) -> Number:
        """The peak on device d, with F = I = W."""
        return self.peak_of(Case(p, m), d)


def _fill_drain(case: Case) -> Number:
    return (case.p - 1) * (case.forward + case.backward)  # type: ignore[no-any-return]


CATALOG: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="naive",
            generator=naive,
            summary="the baseline: what a split without a pipeline costs",
            source="Huang et al. 2018, 1811.06965, fig. 2(b)",
            constraints="none",
            bubble="(p-1)/p",
            peak="1",
            idle=lambda case: (case.p - 1) * case.ideal,
            peak_of=lambda case, d: 1,
        ),
        Row(
            name="gpipe",
            generator=gpipe,
            summary="simplest; with recomputation, lightest on short pipelines",
            source="Huang et al. 2018, 1811.06965, 2.2-2.3",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="m",
            idle=_fill_drain,
            peak_of=lambda case, d: case.m,
        ),
        Row(
            name="1f1b",
            generator=one_f_one_b,
            summary="the default: GPipe's bubble, activations bounded by the pipeline",
            source="Narayanan et al. 2021, 2104.04473, 2.2.1",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="min(p-d, m)",
            idle=_fill_drain,
            peak_of=lambda case, d: min(case.p - d, case.m),
        ),
    )
}


def make(name: str, *, devices: int, micro_batches: int, **options: Any) -> Schedule:
    """A schedule of the catalogue by its name.

    Args:
        name: see `CATALOG`, or `pipeproof list`.
        devices: p.
        micro_batches: m, per step.
        options: what the generator takes beside; None means its default.

    Raises:
        ParameterError: an unknown name, an option the schedule does not have, or
            sizes it does not allow.
    """
    row = CATALOG.get(name)
    if row is None:
        close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise ParameterError(
            f"no schedule is called {name!r}: {hint} catalogue has {', '.join(CATALOG)}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(row.options)):
        has = ", ".join(row.options) or "no options"
        raise ParameterError(f"{name} does not take {', '.join(unknown)}: it has {has}")
    return row.generator(devices, micro_batches, **given)
