"""What each op costs: time, and bytes.

Times may be in any unit, and all come out in that unit. Ints and Fractions give
exact results, floats give floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Kind, Program, Schedule, Trace
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.weights import Sizes
from pipeproof.sim.per_stage import Table, divide
from pipeproof.sim.pricing import priced

PerStage = Number | Sequence[Number]


@dataclass(frozen=True, slots=True)
class Cost:
    """Time and bytes of a device's work on one micro-batch.

    A number is that of a device's whole share of the model: a stage on a device
    with V stages (of one pipe) takes 1/V of it. A sequence has one number per
    stage. With slices, each takes its part of the micro-batch's.

    Attributes:
        forward: time of F.
        input_grad: time of I.
        weight_grad: time of W.
        backward: time of B; default input_grad + weight_grad.
        recompute: time of R; default forward.
        step: time of STEP; default 0.
        overlap: joint time of a group F&B (or F&I&W), by F's stage; default
            the sum of its ops, as for every other group.
        weight_grad_memory: the part of the activations, beside the stage's input,
            that I leaves for W; from 0 to 1. One number, or one per stage.
        weight_bytes, gradient_bytes, optimizer_bytes: held all the time.
        activation_bytes: all that a forward keeps for its backward, the stage's
            input included, and what skip connections bring.
        boundary_bytes: a stage's output tensor, and the gradient of it. Not
            divided by V: a boundary is as wide wherever the cut is.
        input_bytes: a stage's input tensor; default the boundary_bytes of the
            stage before, and 0 for the first stage, whose input is a view of the
            batch.
        skip_bytes: what goes over a skip connection, and the gradient of it: one
            number, or one for each of the schedule's skips, in their order. Not
            divided by V.
        tied_bytes: the gradient of what stages share, which their devices sum at the
            end of a step: one number, or one for each of the schedule's ties, in
            their order. Not divided by V. It lies where gradients do.
        stored_bytes: all that a forward keeps where an R rebuilds the rest, the
            stage's input and what skips bring included; default these.
        rebuilt_bytes: what that R adds; default all of the activations that are
            not stored.
        workspace_bytes: what a backward (B or I) needs only while it runs. Not
            divided by V.

    No bytes at all means that they are not known; given some, the others are 0.

    Raises:
        ParameterError: a number that is negative or not finite, a
            weight_grad_memory above 1, or an input larger than the activations
            or the stored bytes that include it.
    """

    forward: PerStage = 1
    input_grad: PerStage = 1
    weight_grad: PerStage = 1
    backward: PerStage | None = None
    recompute: PerStage | None = None
    step: PerStage = 0
    overlap: PerStage | None = None
    weight_grad_memory: PerStage = 1
    weight_bytes: PerStage | None = None
    gradient_bytes: PerStage | None = None
    optimizer_bytes: PerStage | None = None
    activation_bytes: PerStage | None = None
    boundary_bytes: PerStage | None = None
    input_bytes: PerStage | None = None
    skip_bytes: PerStage | None = None
    tied_bytes: PerStage | None = None
    stored_bytes: PerStage | None = None
    rebuilt_bytes: PerStage | None = None
    workspace_bytes: PerStage | None = None

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            if isinstance(value, (np.ndarray, np.generic)):
                value = value.tolist()
            per_stage = isinstance(value, Sequence) and not isinstance(value, str)
            given = tuple(value) if per_stage else (value,)
            for number in given:
                if not is_number(number) or not 0 <= number < math.inf:
                    raise ParameterError(
                        f"{spec.name} must be a finite number of at least 0, or one "
                        f"per stage, got {number!r}"
                    )
            # A caller's list could change behind our back.
            object.__setattr__(self, spec.name, given if per_stage else value)
        part = self.weight_grad_memory
        most = max(part, default=0) if isinstance(part, Sequence) else part
        if most > 1:
            raise ParameterError(
                f"weight_grad_memory is a part of the activations, from 0 to 1, got "
                f"{most}"
            )

    @staticmethod
    def from_trace(trace: Trace) -> Cost:
        """The times per stage that explain a measured trace; no bytes.

        `pipeproof.sim.fit` does it, and also tells what they leave unexplained.

        Raises:
            ParameterError: as `fit`.
        """
        from pipeproof.sim.fit import fit

        return fit(trace).cost

    @property
    def knows_bytes(self) -> bool:
        """Whether any bytes were given."""
        return any(
            getattr(self, spec.name) is not None
            for spec in fields(self)
            if spec.name.endswith("_bytes")
        )

    def durations(self, program: Program) -> list[Number]:
        """The duration of each compute instruction, in the order of the program.

        Raises:
            ParameterError: a sequence whose length is not the number of stages.
        """
        numbers, which = self.priced(program)
        return [numbers[i] for i in which.tolist()]

    def priced(self, program: Program) -> tuple[list[Number], NDArray[Any]]:
        """The durations that compute instructions have, and which of them each has.

        Raises:
            ParameterError: as `durations`.
        """
        schedule = program.schedule
        overlap: Table | None = None
        if self.overlap is not None:
            value = self.overlap
            overlap = self.per_stage("overlap", value, schedule, per_share=True)
        return priced(program, self._times(schedule), overlap)

    def _times(self, schedule: Schedule) -> dict[Kind, Table]:
        """(pipe, stage) → time, for every kind."""

        def of(name: str, value: PerStage) -> Table:
            table = self.per_stage(name, value, schedule, per_share=True)
            return [[divide(number, schedule.slices) for number in r] for r in table]

        forward = of("forward", self.forward)
        input_grad = of("input_grad", self.input_grad)
        weight_grad = of("weight_grad", self.weight_grad)
        if self.backward is None:
            backward = _sums(input_grad, weight_grad)
        else:
            backward = of("backward", self.backward)
        again = forward if self.recompute is None else of("recompute", self.recompute)
        step = self.per_stage("step", self.step, schedule, per_share=True)
        free: Table = [[0] * schedule.stages for _ in forward]
        times = dict.fromkeys(Kind, free)
        times |= {Kind.F: forward, Kind.B: backward, Kind.R: again}
        times[Kind.STEP] = step  # once a step, of all slices together
        return times | {Kind.I: input_grad, Kind.W: weight_grad}

    def per_stage(
        self, name: str, value: PerStage, schedule: Schedule, *, per_share: bool
    ) -> Table:
        """(pipe, stage) → number.

        Args:
            name: of the value, for messages.
            value: one number, or one per stage.
            schedule: whose stages.
            per_share: whether one number is that of a device's share.

        Raises:
            ParameterError: as `durations`.
        """
        if not isinstance(value, int | float | Fraction):
            if len(value) != schedule.stages:
                raise ParameterError(
                    f"{name} has {len(value)} numbers for {schedule.stages} stages: "
                    "give one number, or one per stage"
                )
            return [[plain(n) for n in value] for _ in schedule.placement.pipes]
        number = plain(value)
        if not per_share:
            return [[number] * schedule.stages for _ in schedule.placement.pipes]
        shares = schedule.placement.shares()
        part = {n: divide(number, n) for n in set().union(*shares)}
        return [[part[n] for n in pipe] for pipe in shares]

    def per_skip(self, schedule: Schedule) -> list[Number]:
        """Bytes that go over each skip connection, for a slice.

        Raises:
            ParameterError: a sequence whose length is not the number of skips, or a
                number where the schedule has none.
        """
        each = _each("skip_bytes", self.skip_bytes, schedule, "skip", schedule.skips)
        return [divide(number, schedule.slices) for number in each]

    def per_tie(self, schedule: Schedule) -> list[Number]:
        """Bytes of the gradient of what each tie's stages share.

        Raises:
            ParameterError: as `per_skip`.
        """
        return _each("tied_bytes", self.tied_bytes, schedule, "tie", schedule.ties)

    def sizes(self, program: Program) -> Sizes:
        """What each buffer of a program weighs.

        Raises:
            ParameterError: as `durations`, or an input larger than the
                activations that include it.
        """
        from pipeproof.sim.weighing import sizes_of

        return sizes_of(self, program)


def _each(
    name: str,
    value: PerStage | None,
    schedule: Schedule,
    what: str,
    there: Sequence[tuple[int, ...]],
) -> list[Number]:
    """One number for each skip or tie of a schedule."""
    if isinstance(value, Sequence):
        if len(value) != len(there):
            raise ParameterError(
                f"{name} has {len(value)} numbers for {len(there)} {what}s: give one "
                f"number, or one per {what} of the schedule"
            )
        return list(map(plain, value))
    if value is not None and not there:
        raise ParameterError(
            f"{name} is {value}, and {schedule.summary} has no {what}s: leave it out, "
            f"or give the schedule {what}s (with_{what}s, or `{what}s:` in its file)"
        )
    return [plain(0 if value is None else value)] * len(there)


def _sums(one: Table, other: Table) -> Table:
    """Place by place, each different pair of objects once."""
    known: dict[tuple[int, int], Number] = {}

    def add(a: Any, b: Any) -> Number:
        pair = id(a), id(b)
        if pair not in known:
            known[pair] = plain(a + b)
        return known[pair]

    return [list(map(add, *rows)) for rows in zip(one, other)]
