"""What a Cost says of bytes, spread over a program's buffers and devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import BufferKind, Program, Schedule
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, column, plain
from pipeproof.sched.ir import BACKWARD_KINDS
from pipeproof.sched.memory import RESIDENT
from pipeproof.sched.weights import Sizes, Weights
from pipeproof.sim.per_stage import Table, divide

if TYPE_CHECKING:
    from pipeproof.sim.cost import Cost


def sizes_of(cost: Cost, program: Program) -> Sizes:
    """See `Cost.sizes`."""
    schedule = program.schedule
    # A weight is a look-up, for Fractions are slow. Where the backward is split it
    # is the part that I frees; where activations are recomputed, what R rebuilds.
    parts = cost.per_stage(
        "weight_grad_memory", cost.weight_grad_memory, schedule, per_share=False
    )
    keep = [number for row in parts for number in row]

    def weigh(whole: Table, again: Table) -> dict[BufferKind, NDArray[Any]]:
        """What is kept, or rebuilt."""
        both = [n for row in [*whole, *again] for n in row]
        stash = [plain(n * part) for n, part in zip(both, keep * 2)]
        rest = [plain(n - part) for n, part in zip(both, stash)]
        held, left, freed = (column(ns) for ns in (both, stash, rest))
        return {
            BufferKind.ACTIVATION: np.concatenate([held, freed]),
            BufferKind.WEIGHT_STASH: np.tile(left, 2),
        }

    over = cost.per_skip(schedule)
    cost.per_tie(schedule)  # of what `timing` makes; wrong ones are refused here too

    def spread(table: Table) -> NDArray[Any]:
        """The same, whatever there is beside it."""
        return np.tile(_flat(table), 4)

    shares = cost.per_stage("activations", 1, schedule, per_share=True)
    full = _over(shares, schedule.slices)
    activations = Weights(weigh(full, full))
    if not cost.knows_bytes:
        return Sizes(activations)
    held = _held(cost, schedule, over)
    by_skip = column(over) if any(over) else None
    of_input, output = spread(held.input), spread(held.output)
    before = [[0, *row[:-1]] for row in held.output]
    by_kind = weigh(held.kept, held.rebuilt) | {
        BufferKind.INPUT: of_input,
        BufferKind.STORED_INPUT: spread(held.stored),
        BufferKind.OUTPUT: output,
        BufferKind.OUTPUT_GRAD: output,
        BufferKind.INPUT_GRAD: spread(before),
    }
    arriving = None
    if cost.stored_bytes is not None:
        arrived = by_kind | {BufferKind.STORED_INPUT: of_input}
        arriving = Weights(arrived, by_skip).column(program)
    return Sizes(
        activations,
        Weights(by_kind, by_skip).column(program),
        _resident(cost, schedule),
        _workspace(cost, program),
        arriving,
    )


def _workspace(cost: Cost, program: Program) -> NDArray[Any] | None:
    """Per instruction, what its backward needs only while it runs."""
    if cost.workspace_bytes is None:
        return None
    schedule, ops = program.schedule, program.schedule.ops
    needs = _flat(_bytes(cost, "workspace_bytes", schedule, per_share=False))
    backward = np.flatnonzero(np.isin(ops.kind, BACKWARD_KINDS))
    node = schedule.node_of_op
    instruction = np.full(len(schedule), -1, dtype=np.int64)
    instruction[node[program.first_op[program.computes]]] = program.computes
    pipe = schedule.pipe_of[ops.micro_batch[backward]].astype(np.int64)
    result = np.zeros(len(program), dtype=needs.dtype)
    np.add.at(
        result,
        instruction[node[backward]],
        needs[pipe * schedule.stages + ops.stage[backward]],
    )
    return result


def _held(cost: Cost, schedule: Schedule, over: list[Number]) -> _Held:
    """What a stage's buffers weigh, by (pipe, stage), from what each skip brings."""
    output = _bytes(cost, "boundary_bytes", schedule, per_share=False)
    inputs: Table = [[0, *row[:-1]] for row in output]
    if cost.input_bytes is not None:
        inputs = _bytes(cost, "input_bytes", schedule, per_share=False)
    arrived = [_with_skips(row, schedule, over) for row in inputs]
    stored, full = arrived, arrived
    if cost.stored_bytes is not None:
        stored = _bytes(cost, "stored_bytes", schedule, per_share=True)
        _refuse_less(stored, arrived, "stored_bytes that include it", "an input")
    if cost.activation_bytes is not None:
        full = _bytes(cost, "activation_bytes", schedule, per_share=True)
        _refuse_less(full, arrived, "activation_bytes that include it", "an input")
    kept = _minus(full, arrived)
    if cost.rebuilt_bytes is not None:
        rebuilt = _bytes(cost, "rebuilt_bytes", schedule, per_share=True)
    elif cost.activation_bytes is None:
        rebuilt = kept
    else:
        _refuse_less(full, stored, "activation_bytes to rebuild", "a store")
        rebuilt = _minus(full, stored)
    beside = _minus(stored, _minus(arrived, inputs))
    return _Held(inputs, output, kept, beside, rebuilt)


def _with_skips(
    inputs: list[Number], schedule: Schedule, over: list[Number]
) -> list[Number]:
    """What arrives at each stage."""
    arrived = list(inputs)
    for (_, target), number in zip(schedule.skips, over):
        arrived[target] = plain(arrived[target] + number)
    return arrived


def _bytes(cost: Cost, name: str, schedule: Schedule, *, per_share: bool) -> Table:
    value = getattr(cost, name)
    table = cost.per_stage(
        name, 0 if value is None else value, schedule, per_share=per_share
    )
    if name in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
        return table
    return _over(table, schedule.slices)


def _resident(cost: Cost, schedule: Schedule) -> dict[str, list[Number]]:
    result: dict[str, list[Number]] = {}
    names = ("weight_bytes", "gradient_bytes", "optimizer_bytes")
    for name, called in zip(names, RESIDENT):
        held: list[Number] = [0] * schedule.devices
        table = _bytes(cost, name, schedule, per_share=True)
        for row, devices in zip(table, schedule.placement.pipes):
            for number, device in zip(row, devices):
                held[device] = plain(held[device] + number)
        result[called] = held
    return result


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of a stage for one micro-batch (or slice), by (pipe, stage).

    Attributes:
        input, output: the boundary tensors.
        kept: what a forward keeps beside its input.
        stored: all that it keeps where an R follows, without what skips bring.
        rebuilt: what that R adds.
    """

    input: Table
    output: Table
    kept: Table
    stored: Table
    rebuilt: Table


def _minus(ones: Table, others: Table) -> Table:
    return [[plain(a - b) for a, b in zip(*rows)] for rows in zip(ones, others)]


def _refuse_less(whole: Table, part: Table, what: str, name: str) -> None:
    for rows in zip(whole, part):
        for stage, (all_of_it, of_part) in enumerate(zip(*rows)):
            if of_part > all_of_it:
                raise ParameterError(
                    f"stage {stage}: {name} of {of_part} bytes exceeds the "
                    f"{all_of_it} {what}"
                )


def _over(table: Table, by: int) -> Table:
    return [[divide(number, by) for number in row] for row in table]


def _flat(table: Table) -> NDArray[Any]:
    """A table (pipe × stages) as one column."""
    return column([plain(number) for row in table for number in row])
