"""A row of the catalogue: a published schedule, with what its paper says of it.

The formulas are functions, and so is where they hold, so that tests can try them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeproof.sched.exact import Number, ratio
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
    def times(self) -> tuple[Any, Any, Any]:
        """F, I, W."""
        return self.forward, self.input_grad, self.weight_grad

    @property
    def joint(self) -> Any:
        """F&B, as long as both where nothing is said."""
        return self.forward + self.backward if self.overlap is None else self.overlap

    @property
    def equal_times(self) -> bool:
        """F = I = W."""
        return bool(self.forward == self.input_grad == self.weight_grad)

    @property
    def fill_drain(self) -> Any:
        """(P-1)(F+B): what filling and draining a pipeline of whole shares idles."""
        return (self.p - 1) * (self.forward + self.backward)

    @property
    def ideal(self) -> Any:
        """M (F + B): the time a device computes, if nothing overlaps."""
        return self.m * (self.forward + self.backward)


Bounds = tuple[Number, Number | None]
"""Between what an idle time lies; None for no upper bound."""


def at_most_fill_drain(case: Case) -> Bounds:
    """GPipe's idle time at most."""
    return 0, case.fill_drain


IdleOf = Literal["step", "span", "most"]
"""Which idle time a formula gives: of a device in the step, in the mean
(`makespan - ideal`); inside the longest span (`span - ideal`); or of the device that
idles most in the step."""


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
        figure: the sizes and times at which it is drawn unless others are wanted:
            those of the publication's own figure, where it has one.
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
    bounds: Callable[[Case], Bounds] = lambda case: (0, None)
    allows: Callable[[Case], bool] = lambda case: True
    figure: Case = Case(4, 8)

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
