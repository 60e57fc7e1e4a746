"""Live bytes and live activations over time, by class, from a trace's buffers.

A buffer is born when the first instruction that writes it starts and dies when
the one that frees it ends. At equal times, births and deaths go in the
program's order, so what one op frees is gone before the next op's are born.

What a buffer counts as can change while it lives::

    a stage's input     | arrives ....... F starts ................ freed |
                        | boundary        activations, or stored_inputs   |
    what W will need    | F starts ...... I ends .................. freed |
                        | activations     weight_grad_stash               |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, plain
from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.peaks import peaks_by_buffer, peaks_by_op
from pipeproof.sched.program import Program
from pipeproof.sched.weights import Weights

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

Index = NDArray[np.int64]

HOST = "host"
RESIDENT = ("weights", "gradients", "optimizer")
"""Classes that a device holds all the time."""
PASSING = (
    "activations",
    "stored_inputs",
    "weight_grad_stash",
    "boundary",
    "workspace",
    HOST,
    "offloaded",
)
"""Classes that come and go. `boundary` is what is on its way between stages:
outputs and gradients, and inputs that no forward has taken up yet. `host` lies
on the host, and counts in no device's total; `offloaded` is another device's, and
counts where it lies."""

_CLASS = {
    BufferKind.ACTIVATION: "activations",
    BufferKind.WEIGHT_STASH: "weight_grad_stash",
    BufferKind.INPUT: "activations",
    BufferKind.STORED_INPUT: "stored_inputs",
    BufferKind.OUTPUT: "boundary",
    BufferKind.OUTPUT_GRAD: "boundary",
    BufferKind.INPUT_GRAD: "boundary",
    BufferKind.GRADIENT: "boundary",  # in name only: it is resident, and left out
    BufferKind.TIED: "boundary",  # likewise
    BufferKind.HOST: HOST,
    BufferKind.OFFLOADED: "offloaded",
}
_CLASS_OF_KIND = np.array(
    [PASSING.index(_CLASS[kind]) for kind in BufferKind], dtype=np.int8
)


@dataclass(frozen=True)
class Curve:
    """How much is alive, over time.

    Attributes:
        time: of each change, ascending.
        by_class: for each class, what is alive from that time on.
    """

    time: NDArray[Any]
    by_class: Mapping[str, NDArray[Any]]

    @cached_property
    def total(self) -> NDArray[Any]:
        """All classes together, but for what lies on the host."""
        columns = [line for name, line in self.by_class.items() if name != HOST]
        return sum(columns[1:], start=columns[0])

    @property
    def peak(self) -> Number:
        """The most alive at once."""
        return plain(max(self.total.tolist()))

    def at_peak(self) -> dict[str, Number]:
        """Each class when the total first is at its peak."""
        where = int(np.argmax(self.total))
        return {name: plain(line[where]) for name, line in self.by_class.items()}


@dataclass(frozen=True, slots=True)
class Held:
    """What one micro-batch of one stage takes.

    Attributes:
        stage, micro_batch: which; slices are taken together.
        bytes: of all its buffers, in the unit of the weights.
    """

    stage: int
    micro_batch: int
    bytes: Number


@dataclass(frozen=True)
class Peak:
    """The most that is alive at once on a device, and what it is.

    Attributes:
        device: which.
        time: when it is first reached, in the trace's unit of time.
        total: all classes but `host`.
        by_class: each class then.
        op: the compute instruction that runs then, or ran last; -1 for none.
        held: which micro-batches of which stages hold it, by stage and
            micro-batch, without resident bytes and workspace.
    """

    device: int
    time: Number
    total: Number
    by_class: Mapping[str, Number]
    op: int
    held: tuple[Held, ...]


def lifetimes(program: Program) -> tuple[Index, Index]:
    """For each buffer its first writer and its freer; -1 if nothing frees it."""
    born = np.full(len(program.buffers), len(program), dtype=np.int64)
    # Owners ascend: the first one is the last to be put down.
    born[program.writes.values[::-1]] = program.writes.owner[::-1]
    died = np.full(len(program.buffers), -1, dtype=np.int64)
    died[program.frees.values] = program.frees.owner
    return born, died


@dataclass(frozen=True)
class _Items:
    """What comes and goes: buffers, and the workspace of instructions.

    A moment is 2i for the start of instruction i and 2i + 1 for its end; -1 is
    never.

    Attributes:
        buffer: its number, or -1 for workspace.
        device: where it lies.
        weight: what it counts.
        before: what it counts before it turns.
        born, died: moments.
        turns: the moment from which on it counts as `later`, not as `first`.
        first, later: classes, as places in `PASSING`.
    """

    buffer: Index
    device: NDArray[np.int32]
    weight: NDArray[Any]
    before: NDArray[Any]
    born: Index
    died: Index
    turns: Index
    first: NDArray[np.int8]
    later: NDArray[np.int8]

    @staticmethod
    def of(
        program: Program,
        weight: NDArray[Any],
        workspace: NDArray[Any] | None,
        arriving: NDArray[Any] | None,
    ) -> _Items:
        """A GRADIENT is left out: gradients outlive the step, and are resident."""
        kind = program.buffers[:, 0]
        counted = (kind != BufferKind.GRADIENT) & (weight != 0).astype(np.bool_)
        buffer = np.flatnonzero(counted)
        born, died = lifetimes(program)
        turns, first = _turns(program, born)
        died = np.where(died >= 0, 2 * died + 1, -1)
        columns = [
            buffer,
            program.buffers[buffer, 1],
            weight[buffer],
            (weight if arriving is None else arriving)[buffer],
            2 * born[buffer],
            died[buffer],
            turns[buffer],
            first[buffer],
            _CLASS_OF_KIND[kind[buffer]],
        ]
        if workspace is not None:
            busy = np.flatnonzero(workspace)
            never = np.full(len(busy), -1)
            place = np.full(len(busy), PASSING.index("workspace"), dtype=np.int8)
            size = workspace[busy]
            more = [never, program.device[busy], size, size, 2 * busy]
            more += [2 * busy + 1, never, place, place]
            columns = [np.concatenate(pair) for pair in zip(columns, more)]
        return _Items(*columns)

    def take(self, which: Index) -> _Items:
        """Some of them."""
        return _Items(*(column[which] for column in vars(self).values()))


def _turns(program: Program, born: Index) -> tuple[Index, NDArray[np.int8]]:
    """For each buffer the moment when its class changes, and its class before."""
    kind = program.buffers[:, 0]
    first = _CLASS_OF_KIND[kind]
    turns = np.full(len(kind), -1, dtype=np.int64)
    arrived = np.isin(program.action[born], (Action.RECV, Action.LOCAL))
    arrived &= (kind == BufferKind.INPUT) | (kind == BufferKind.STORED_INPUT)
    reader = np.full(len(kind), len(program), dtype=np.int64)
    reader[program.reads.values[::-1]] = program.reads.owner[::-1]  # the first
    turns[arrived] = 2 * reader[arrived]
    first[arrived] = PASSING.index("boundary")
    stash = kind == BufferKind.WEIGHT_STASH
    if stash.any():
        writer = np.full(len(kind), -1, dtype=np.int64)
        writer[program.writes.values] = program.writes.owner  # the last
        stash &= writer > born
        turns[stash] = 2 * writer[stash] + 1
        first[stash] = PASSING.index("activations")
    return turns, first


@dataclass(frozen=True)
class _Events:
    """Changes in order of time.

    Attributes:
        time: of each.
        item: what changes.
        step: 1 for a birth, -1 for a death, 0 for a change of class.
        of_class: the class that grows or shrinks, as a place in `PASSING`.
        change: by how much.
    """

    time: NDArray[Any]
    item: Index
    step: NDArray[np.int8]
    of_class: NDArray[np.int8]
    change: NDArray[Any]


class Ledger:
    """Every birth and death of a trace's buffers, by device.

    Args:
        trace: when instructions ran.
        weight: per buffer, what it counts.
        resident: what each device holds all the time, by class.
        workspace: per instruction, what is there only while it runs.
        arriving: per buffer, what it counts until a forward takes it up.
    """

    def __init__(
        self,
        trace: Trace,
        weight: NDArray[Any] | Weights,
        resident: Mapping[str, list[Number]] | None = None,
        workspace: NDArray[Any] | None = None,
        arriving: NDArray[Any] | None = None,
    ) -> None:
        self._trace = trace
        self._given, self._workspace, self._arriving = weight, workspace, arriving
        self._resident = resident or {}
        self._devices = trace.program.schedule.devices

    @cached_property
    def _weight(self) -> NDArray[Any]:
        if isinstance(self._given, Weights):
            return self._given.column(self._trace.program)
        return self._given

    @cached_property
    def _items(self) -> _Items:
        program = self._trace.program
        return _Items.of(program, self._weight, self._workspace, self._arriving)

    @cached_property
    def _of_device(self) -> list[Index]:
        """The items of each device.

        Each device's events are put in order on their own, when they are asked
        for: that is faster than all at once, and takes less memory.
        """
        device = self._items.device
        order = np.argsort(device, kind="stable")
        counts = np.bincount(device, minlength=self._devices)
        return np.split(order, np.cumsum(counts)[:-1])

    def curve(self, device: int | None = None) -> Curve:
        """What is alive over time, on one device or on all together."""
        items = self._items if device is None else self._on(device)
        return self._curve(self._events(items), device)

    def _curve(self, events: _Events, device: int | None) -> Curve:
        zero = np.zeros(1, dtype=events.change.dtype)
        lines: dict[str, NDArray[Any]] = {}
        for name, held in self._resident.items():
            constant = sum(held) if device is None else held[device]
            lines[name] = np.full(len(events.time) + 1, constant)
        for number, name in enumerate(PASSING):
            steps = np.where(events.of_class == number, events.change, 0)
            lines[name] = np.cumsum(np.concatenate([zero, steps]))
        start = np.zeros(1, dtype=events.time.dtype)
        times = np.concatenate([start, events.time])
        return Curve(self._trace.timetable.in_units(times), lines)

    def peaks(self) -> list[Number]:
        """The most alive at once on each device, without what lies on the host."""
        result: list[Number] = []
        swept = self._swept()
        for device in range(self._devices):
            base = sum(held[device] for held in self._resident.values())
            if swept is not None and (most := swept[device]) is not None:
                result.append(plain(base + most))
                continue
            items = self._on(device)
            items = items.take(np.flatnonzero(items.later != PASSING.index(HOST)))
            change = self._events(items).change
            result.append(plain(base + max(np.cumsum(change).max(initial=0), 0)))
        return result

    def _swept(self) -> list[Number | None] | None:
        """The peaks without sorting events, where buffers alone count."""
        if self._workspace is not None or self._arriving is not None:
            return None
        program, times = self._trace.program, self._trace.timetable
        if isinstance(self._given, Weights):
            peaks = peaks_by_op(program, self._given, times.start, times.end)
            if peaks is not None:
                return peaks
        return peaks_by_buffer(program, self._weight, times.start, times.end)

    def peak(self, device: int) -> Peak:
        """The most alive at once on one device, and what it is."""
        items = self._on(device)
        events = self._events(items)
        curve = self._curve(events, device)
        place = int(np.argmax(curve.total))
        alive = np.zeros(len(items.born), dtype=np.int8)
        np.add.at(alive, events.item[:place], events.step[:place])
        here = (alive > 0) & (items.later != PASSING.index(HOST)) & (items.buffer >= 0)
        time = plain(curve.time[place])
        return Peak(
            device,
            time,
            plain(curve.total[place]),
            {name: plain(line[place]) for name, line in curve.by_class.items()},
            self._running(device, time),
            self._held(items.take(np.flatnonzero(here))),
        )

    def _running(self, device: int, time: Any) -> int:
        program = self._trace.program
        mine = program.by_stream[device]  # compute streams come first, by device
        mine = mine[program.action[mine] == Action.COMPUTE]
        if not len(mine):
            return -1
        begun = int(np.searchsorted(self._trace.start[mine], time, side="right"))
        return int(mine[max(begun - 1, 0)])

    def _held(self, items: _Items) -> tuple[Held, ...]:
        rows = self._trace.program.buffers[items.buffer][:, 2:4]
        place, which = np.unique(rows, axis=0, return_inverse=True)
        total = np.zeros(len(place), dtype=items.weight.dtype)
        np.add.at(total, which.ravel(), items.weight)
        pairs = zip(place.tolist(), total.tolist())
        return tuple(Held(stage, m, plain(size)) for (stage, m), size in pairs)

    def _on(self, device: int) -> _Items:
        return self._items.take(self._of_device[device])

    def _events(self, items: _Items) -> _Events:
        """Births, deaths and changes of class."""
        turn = np.flatnonzero(items.turns >= 0)
        dies = np.flatnonzero(items.died >= 0)
        births = np.arange(len(items.born))
        turning = items.turns[turn]
        weight, first = items.weight, items.first
        at_birth = np.where(items.turns >= 0, items.before, items.weight)
        # Turns first: what an op takes up has turned when its own buffers are born.
        item = np.concatenate([turn, turn, births, dies])
        counts = 2 * len(turn), len(births), len(dies)
        step = np.repeat(np.array([0, 1, -1], dtype=np.int8), counts)
        moment = np.concatenate([turning, turning, items.born, items.died[dies]])
        of_class = np.concatenate(
            [first[turn], items.later[turn], first, items.later[dies]]
        )
        change = np.concatenate(
            [-at_birth[turn], weight[turn], at_birth, -weight[dies]]
        )
        time = self._time(moment)
        # Stable: what turns leaves its class before it enters the other.
        order = np.lexsort((moment, _sortable(time)))
        columns: tuple[NDArray[Any], ...] = (time, item, step, of_class, change)
        return _Events(*(column[order] for column in columns))

    def _time(self, moment: Index) -> NDArray[Any]:
        instruction, is_end = moment >> 1, (moment & 1).astype(np.bool_)
        times = self._trace.timetable
        time: NDArray[Any] = np.where(
            is_end, times.end[instruction], times.start[instruction]
        )
        return time


def _sortable(time: NDArray[Any]) -> NDArray[Any]:
    """Fractions as their ranks, since numpy sorts no objects by two keys."""
    if time.dtype != object:
        return time
    ranks = {value: rank for rank, value in enumerate(sorted(set(time.tolist())))}
    return np.array([ranks[value] for value in time.tolist()], dtype=np.int64)
