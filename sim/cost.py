"""What each op costs: time, and bytes.

Times may be in any unit, and all come out in that unit. Ints and Fractions give
exact results, floats give floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import BufferKind, Kind, Program, Schedule
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, column, is_number, plain
from pipeproof.sched.memory import Sizes

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
        overlap: joint time of a group F&B (or F&I&W), by F's stage; default
            the sum of its ops, as for every other group.
        weight_grad_memory: the part of the activations, beside the stage's input,
            that I leaves for W; from 0 to 1.
        weight_bytes, gradient_bytes, optimizer_bytes: held all the time.
        activation_bytes: all that a forward keeps for its backward, the stage's
            input included.
        boundary_bytes: a stage's output tensor, and the gradient of it. Not
            divided by V: a boundary is as wide wherever the cut is.
        input_bytes: a stage's input tensor; default the boundary_bytes of the
            stage before, and 0 for the first stage, whose input is a view of the
            batch.

    No bytes at all means that they are not known; given some, the others are 0.

    Raises:
        ParameterError: a number that is negative or not finite, a
            weight_grad_memory above 1, or an input larger than the activations
            that include it.
    """

    forward: PerStage = 1
    input_grad: PerStage = 1
    weight_grad: PerStage = 1
    backward: PerStage | None = None
    recompute: PerStage | None = None
    overlap: PerStage | None = None
    weight_grad_memory: Number = 1
    weight_bytes: PerStage | None = None
    gradient_bytes: PerStage | None = None
    optimizer_bytes: PerStage | None = None
    activation_bytes: PerStage | None = None
    boundary_bytes: PerStage | None = None
    input_bytes: PerStage | None = None

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            if isinstance(value, (np.ndarray, np.generic)):
                value = value.tolist()
            per_stage = isinstance(value, Sequence) and not isinstance(value, str)
            per_stage = per_stage and spec.name != "weight_grad_memory"
            given = tuple(value) if per_stage else (value,)
            for number in given:
                if not is_number(number) or not math.isfinite(number) or number < 0:
                    raise ParameterError(
                        f"{spec.name} must be a finite number of at least 0, or one "
                        f"per stage, got {number!r}"
                    )
            # A caller's list could change behind our back.
            object.__setattr__(self, spec.name, given if per_stage else value)
        if self.weight_grad_memory > 1:
            raise ParameterError(
                f"weight_grad_memory is a part of the activations, from 0 to 1, got "
                f"{self.weight_grad_memory}"
            )

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
        schedule = program.schedule
        times = self._times(schedule)
        ops = schedule.ops
        # A table (kind, pipe, stage) → time, then one look-up per op.
        pipes, stages = len(schedule.placement.pipes), schedule.stages
        table = [times[Kind(k)] for k in range(len(Kind))]
        flat = [number for by_pipe in table for row in by_pipe for number in row]
        pipe = schedule.pipe_of[np.where(ops.kind < Kind.REDUCE, ops.micro_batch, 0)]
        place = (ops.kind.astype(np.int64) * pipes + pipe) * stages + ops.stage
        first = program.first_op[program.computes]
        result = [flat[i] for i in place[first].tolist()]
        groups = np.flatnonzero(program.op_count[program.computes] > 1)
        for where in groups.tolist():
            start = int(first[where])
            members = range(
                start, start + int(program.op_count[program.computes[where]])
            )
            result[where] = self._joint(
                schedule, members, [flat[place[i]] for i in members]
            )
        return result

    def _joint(self, schedule: Schedule, members: range, times: list[Any]) -> Number:
        kinds = sorted(int(schedule.ops.kind[i]) for i in members)
        pair = kinds in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W])
        if self.overlap is None or not pair:
            return plain(sum(times))
        forward = next(i for i in members if schedule.ops.kind[i] == Kind.F)
        pipe = int(schedule.pipe_of[schedule.ops.micro_batch[forward]])
        shares = self._per_stage("overlap", self.overlap, schedule, per_share=True)
        return divide(shares[pipe][int(schedule.ops.stage[forward])], schedule.slices)

    def _times(self, schedule: Schedule) -> dict[Kind, list[list[Number]]]:
        """(pipe, stage) → time, for every kind."""

        def of(name: str, value: PerStage) -> list[list[Number]]:
            table = self._per_stage(name, value, schedule, per_share=True)
            return [[divide(number, schedule.slices) for number in r] for r in table]

        forward = of("forward", self.forward)
        input_grad = of("input_grad", self.input_grad)
        weight_grad = of("weight_grad", self.weight_grad)
        if self.backward is None:
            both = zip(input_grad, weight_grad)
            backward = [[plain(i + w) for i, w in zip(*rows)] for rows in both]
        else:
            backward = of("backward", self.backward)
        again = forward if self.recompute is None else of("recompute", self.recompute)
        free: list[list[Number]] = [[0] * schedule.stages for _ in forward]
        times = dict.fromkeys(Kind, free)
        times |= {Kind.F: forward, Kind.B: backward, Kind.R: again}
        return times | {Kind.I: input_grad, Kind.W: weight_grad}

    def _per_stage(
        self, name: str, value: PerStage, schedule: Schedule, *, per_share: bool
    ) -> list[list[Number]]:
        """(pipe, stage) → number."""
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
        return [
            [divide(number, share) for share in shares]
            for shares in schedule.placement.shares()
        ]

    def sizes(self, program: Program) -> Sizes:
        """What each buffer of a program weighs.

        Raises:
            ParameterError: as `durations`, or an input larger than the
                activations that include it.
        """
        schedule = program.schedule
        kind, _, stage, micro_batch, _, _ = program.buffers.T
        pipe = schedule.pipe_of[np.maximum(micro_batch, 0)]
        place = pipe.astype(np.int64) * schedule.stages + stage
        split = np.zeros(len(kind), dtype=np.bool_)
        stashed = kind == BufferKind.WEIGHT_STASH
        if stashed.any():
            # An activation beside a stash for W is the part that I frees.
            key = program.buffers[:, 2:5].astype(np.int64) @ _strides(schedule)
            split = np.isin(key, key[stashed]) & (kind == BufferKind.ACTIVATION)

        def weigh(full: list[list[Number]]) -> dict[int, NDArray[Any]]:
            keep = self.weight_grad_memory
            whole = _flat(full)
            return {
                BufferKind.ACTIVATION: np.where(
                    split, _flat(full, lambda n: n * (1 - keep))[place], whole[place]
                ),
                BufferKind.WEIGHT_STASH: _flat(full, lambda n: n * keep)[place],
            }

        shares = self._per_stage("activations", 1, schedule, per_share=True)
        activations = _choose(kind, weigh(_over(shares, schedule.slices)))
        _weigh_copies(program, activations)
        if not self.knows_bytes:
            return Sizes(activations)
        boundary, inputs, net = self._boundaries(schedule)
        of_input = _flat(inputs)[place]
        gradient_of_output = _flat(boundary)[place]
        before = [[0, *row[:-1]] for row in boundary]
        by_kind = weigh(net) | {
            BufferKind.INPUT: of_input,
            BufferKind.STORED_INPUT: of_input,
            BufferKind.OUTPUT: gradient_of_output,
            BufferKind.OUTPUT_GRAD: gradient_of_output,
            BufferKind.INPUT_GRAD: _flat(before)[place],
        }
        weights = _choose(kind, by_kind)
        _weigh_copies(program, weights)
        return Sizes(activations, weights, self._resident(schedule))

    def _boundaries(
        self, schedule: Schedule
    ) -> tuple[list[list[Number]], list[list[Number]], list[list[Number]]]:
        """Output, input, and activations beside the input, of each stage."""
        boundary = self._bytes("boundary_bytes", schedule, per_share=False)
        if self.input_bytes is None:
            inputs: list[list[Number]] = [[0, *row[:-1]] for row in boundary]
        else:
            inputs = self._bytes("input_bytes", schedule, per_share=False)
        if self.activation_bytes is None:
            return boundary, inputs, [[0] * schedule.stages for _ in inputs]
        full = self._bytes("activation_bytes", schedule, per_share=True)
        for rows in zip(full, inputs):
            for stage, (all_of_it, of_input) in enumerate(zip(*rows)):
                if of_input > all_of_it:
                    raise ParameterError(
                        f"stage {stage}: an input of {of_input} bytes exceeds the "
                        f"{all_of_it} activation_bytes that include it"
                    )
        net = [[plain(a - b) for a, b in zip(*rows)] for rows in zip(full, inputs)]
        return boundary, inputs, net

    def _bytes(
        self, name: str, schedule: Schedule, *, per_share: bool
    ) -> list[list[Number]]:
        value = getattr(self, name)
        table = self._per_stage(
            name, 0 if value is None else value, schedule, per_share=per_share
        )
        if name in ("boundary_bytes", "input_bytes", "activation_bytes"):
            return _over(table, schedule.slices)
        return table

    def _resident(self, schedule: Schedule) -> dict[str, list[Number]]:
        result: dict[str, list[Number]] = {}
        for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
            held: list[Number] = [0] * schedule.devices
            table = self._bytes(name, schedule, per_share=True)
            for row, devices in zip(table, schedule.placement.pipes):
                for number, device in zip(row, devices):
                    held[device] = plain(held[device] + number)
            result[name.removesuffix("_bytes")] = held
        return result


def divide(number: Number, by: int) -> Number:
    """Number / by, exact where the number is."""
    if by == 1:
        return number
    return plain(Fraction(number, by) if isinstance(number, int) else number / by)


def _over(table: list[list[Number]], by: int) -> list[list[Number]]:
    return [[divide(number, by) for number in row] for row in table]


def _flat(
    table: list[list[Number]], change: Callable[[Any], Any] = lambda number: number
) -> NDArray[Any]:
    """A table (pipe × stages) as one column."""
    return column([plain(change(number)) for row in table for number in row])


def _choose(kind: NDArray[Any], by_kind: dict[int, NDArray[Any]]) -> NDArray[Any]:
    dtype = np.result_type(*by_kind.values())
    result = np.zeros(len(kind), dtype=dtype)
    for member, values in by_kind.items():
        where = kind == member
        result[where] = values[where]
    return result


def _weigh_copies(program: Program, weights: NDArray[Any]) -> None:
    """Give what is offloaded the weight that it had before."""
    # An OFFLOAD frees buffers and writes their copies elsewhere, in one order.
    copying = np.flatnonzero(program.op_kind == Kind.OFFLOAD)
    copies = program.writes.values[np.isin(program.writes.owner, copying)]
    freed = program.frees.values[np.isin(program.frees.owner, copying)]
    weights[copies] = weights[freed]


def _strides(schedule: Schedule) -> NDArray[np.int64]:
    """Weights that number (stage, micro-batch, slice) uniquely."""
    stages, slices = schedule.stages, schedule.slices
    return np.array([1, stages * slices, stages], dtype=np.int64)
