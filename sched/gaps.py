"""Every idle time of every device, what it waits for, and who is to blame.

A device idles before an op that cannot start yet, and behind its last op until
the step ends. Each gap has one cause, the last condition its op met; and parts,
which say what ran meanwhile and held it up, back to the gap's start.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.causes import Causes, Why
from pipeproof.sched.exact import Number, plain
from pipeproof.sched.instructions import Action, MessageKind
from pipeproof.sched.parts import Index, Parts, Times, name_of, totals
from pipeproof.sched.program import Program

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


class Cause(IntEnum):
    """Why a device idles."""

    FILL = 0
    """Nothing to do yet: it has not run its first op."""
    ACTIVATION = 1
    """The activation that its op needs has not arrived."""
    GRADIENT = 2
    """The gradient that it needs has not."""
    PARTNER = 3
    """Nor has a tensor whose send had to wait until its receive was posted."""
    SLOT = 4
    """Nor one whose send had to wait for room in the buffer of its link."""
    SEND = 5
    """A send of the device's own blocks it."""
    RELOAD = 6
    """Activations are not back from the host."""
    REDUCE = 7
    """A reduction is not done."""
    PROCESSOR = 8
    """The processor that it shares runs another device's op."""
    LATE = 9
    """Nothing is missing, and yet the op comes late."""
    DRAIN = 10
    """No more work: it has run its last op."""


WORDS = {
    Cause.FILL: "fill",
    Cause.ACTIVATION: "waits for activations",
    Cause.GRADIENT: "waits for gradients",
    Cause.PARTNER: "waits for sends that wait for their receives",
    Cause.SLOT: "waits for sends that wait for room",
    Cause.SEND: "blocked by its own sends",
    Cause.RELOAD: "waits for reloads",
    Cause.REDUCE: "waits for reductions",
    Cause.PROCESSOR: "waits for the shared processor",
    Cause.LATE: "late, though nothing is missing",
    Cause.DRAIN: "drain",
}

_MESSAGES = (Cause.ACTIVATION, Cause.GRADIENT, Cause.PARTNER, Cause.SLOT)


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which a device idles.

    Attributes:
        device: which.
        start, end: in the trace's unit of time.
        cause: why.
        waiting: the instruction that runs next; -1 where none does.
        waits_for: the op that it waits for: of a message the one that wrote it;
            -1 where nothing is missing.
        message: the message it waits for, or that blocks it; -1 for none.
        left: when that message began to leave; else the end of the gap.
    """

    device: int
    start: Number
    end: Number
    cause: Cause
    waiting: int
    waits_for: int
    message: int
    left: Number

    @property
    def duration(self) -> Number:
        """How long it lasts."""
        return plain(self.end - self.start)

    def explain(self, trace: Trace) -> str:
        """In a sentence: what waits, for what, and until when."""
        return _explain(self, trace)


@dataclass(frozen=True, eq=False)
class Gaps(Sequence[Gap]):
    """Gaps in columns, by device and time; a `Gap` is a view.

    Attributes:
        trace: whose they are.
        device, waiting, waits_for, message: int64, as in `Gap`.
        cause: int8, values of `Cause`.
        start, end, left: in the trace's unit of time.
    """

    trace: Trace
    device: Index
    start: Times
    end: Times
    cause: NDArray[np.int8]
    waiting: Index
    waits_for: Index
    message: Index
    left: Times

    @classmethod
    def of(cls, trace: Trace) -> Gaps:
        """All gaps of a trace; time and memory linear in its instructions."""
        return _found(trace, trace.causes)

    def __len__(self) -> int:
        return len(self.device)

    @overload
    def __getitem__(self, index: int) -> Gap: ...
    @overload
    def __getitem__(self, index: slice) -> Gaps: ...
    def __getitem__(self, index: int | slice) -> Gap | Gaps:
        if isinstance(index, slice):
            return self._some(index)
        return Gap(
            int(self.device[index]),
            plain(self.start[index]),
            plain(self.end[index]),
            Cause(int(self.cause[index])),
            int(self.waiting[index]),
            int(self.waits_for[index]),
            int(self.message[index]),
            plain(self.left[index]),
        )

    def __iter__(self) -> Iterator[Gap]:
        return (self[index] for index in range(len(self)))

    def _some(self, which: Any) -> Gaps:
        columns = [getattr(self, spec.name)[which] for spec in fields(self)[1:]]
        return Gaps(self.trace, *columns)

    def on(self, device: int) -> Gaps:
        """Those of one device, in order of time."""
        low, high = np.searchsorted(self.device, [device, device + 1])
        return self[int(low) : int(high)]

    @property
    def duration(self) -> Times:
        """Of each."""
        return self.end - self.start

    def longest(self, count: int) -> list[int]:
        """Which are the longest, the longest first; at equal length the first."""
        durations = self.duration.tolist()
        return heapq.nsmallest(count, range(len(self)), lambda i: (-durations[i], i))

    def by_cause(self) -> list[dict[Cause, Number]]:
        """For each device its idle time, by cause."""
        found = totals(self.device * len(Cause) + self.cause, self.duration)
        devices = self.trace.program.schedule.devices
        result: list[dict[Cause, Number]] = [{} for _ in range(devices)]
        for code, total in found.items():
            device, cause = divmod(code, len(Cause))
            result[device][Cause(cause)] = total
        return result

    @cached_property
    def parts(self) -> Parts:
        """What ran in each gap and held up its end; `of` is the gap's number.

        The parts of a gap fill it exactly.
        """
        causes = self.trace.causes
        waiting = self.waiting
        first = np.where(waiting >= 0, causes.of[waiting], 0)
        last = causes.last if len(causes.of) else -1
        drains = waiting < 0
        first[drains], after = last, np.where(drains, last, waiting)
        return causes.walk(first, after, self.end, self.start)

    def blame(self) -> list[dict[str, Number]]:
        """For each device its idle time, by what ran meanwhile and held it up.

        Names as in `Parts.by_name`; the sum is the device's idle time.
        """
        parts = self.parts
        names, which = parts.names()
        device = self.device[parts.of]
        found = totals(device * max(1, len(names)) + which, parts.duration)
        devices = self.trace.program.schedule.devices
        result: list[dict[str, Number]] = [{} for _ in range(devices)]
        for code, total in sorted(found.items(), key=lambda item: -item[1]):
            mine, name = divmod(code, len(names))
            result[mine][names[name]] = total
        return result

    def summaries(self) -> list[str]:
        """A line for each device: `device 0: 41.2 idle: 30 fill, 11.2 waits for …`."""
        names, of_producer = name_of(self.trace, np.maximum(self.waits_for, 0))
        named = np.where(np.isin(self.cause, _NAMED) & (self.waits_for >= 0), 1, 0)
        code: Any = self.device * len(Cause) + self.cause
        code = code * (len(names) + 1) + named * (of_producer + 1)
        found = totals(code, self.duration)
        lines: list[list[tuple[Number, str]]] = [
            [] for _ in range(self.trace.program.schedule.devices)
        ]
        for key, total in found.items():
            rest, producer = divmod(key, len(names) + 1)
            device, cause = divmod(rest, len(Cause))
            words = WORDS[Cause(cause)]
            words += f" of {names[producer - 1]}" if producer else ""
            lines[device].append((total, words))
        return [_summary(device, line) for device, line in enumerate(lines)]


_NAMED = (Cause.ACTIVATION, Cause.GRADIENT)


def _summary(device: int, line: list[tuple[Number, str]]) -> str:
    idle: Any = sum(total for total, _ in line)
    if not line:
        return f"device {device}: never idle"
    parts = sorted(line, key=lambda part: -part[0])
    text = ", ".join(f"{show(total)} {words}" for total, words in parts)
    return f"device {device}: {show(idle)} idle: {text}"


def _found(trace: Trace, causes: Causes) -> Gaps:
    program = trace.program
    columns = [_of_device(trace, device) for device in range(len(program.by_stream))]
    columns = columns[: program.schedule.devices]
    sizes = [len(column[0]) for column in columns]
    device = np.repeat(np.arange(len(columns), dtype=np.int64), sizes)
    start, end, waiting = (np.concatenate(column) for column in zip(*columns))
    first = np.concatenate([np.arange(len(c[0])) == 0 for c in columns])
    first &= (start == 0).astype(np.bool_)
    long = (end > start).astype(np.bool_)
    device, start, end, waiting, first = (
        column[long] for column in (device, start, end, waiting, first)
    )
    cause, waits_for, message = _why(causes, start, waiting)
    cause[first & (cause != Cause.LATE) & (waiting >= 0)] = Cause.FILL
    left = end.copy()
    sent = message >= 0
    left[sent] = trace.start[program.send_of[message[sent]]]
    return Gaps(trace, device, start, end, cause, waiting, waits_for, message, left)


def _of_device(trace: Trace, device: int) -> tuple[Times, Times, Index]:
    """Between a device's ops: from, to, and the op behind; -1 for the step's end."""
    program = trace.program
    mine = program.by_stream[device]  # compute streams come first, by device
    mine = mine[program.action[mine] == Action.COMPUTE]
    zero = np.zeros(1, dtype=trace.end.dtype)
    over = np.array([trace.makespan], dtype=trace.end.dtype)
    return (
        np.concatenate([zero, trace.end[mine]]),
        np.concatenate([trace.start[mine], over]),
        np.append(mine, -1),
    )


def _why(
    causes: Causes, start: Times, waiting: Index
) -> tuple[NDArray[np.int8], Index, Index]:
    """Cause, producer and message of gaps that start then, before these ops."""
    program = causes.trace.program
    last = _behind_hand_overs(causes, causes.of[waiting], start)
    ends = np.where(last >= 0, causes.trace.end[last], start)
    missing = (ends > start).astype(np.bool_) & (last >= 0)
    cause = np.full(len(start), Cause.LATE, dtype=np.int8)
    waits_for = np.where(missing, last, -1)
    action = np.where(missing, program.action[last], -1)
    message = np.where(missing, program.message[last], -1).astype(np.int64)
    for what, named in (
        (Action.SEND, Cause.SEND),
        (Action.COPY, Cause.RELOAD),
        (Action.REDUCE, Cause.REDUCE),
        (Action.TIE, Cause.REDUCE),
        (Action.COMPUTE, Cause.PROCESSOR),
    ):
        cause[action == what] = named
    held = np.flatnonzero(action == Action.RECV)
    activation = program.messages[message[held], 0] == MessageKind.ACTIVATION
    cause[held] = np.where(activation, Cause.ACTIVATION, Cause.GRADIENT)
    sends = program.send_of[message[held]]
    cause[held[causes.why[sends] == Why.PARTNER]] = Cause.PARTNER
    cause[held[causes.why[sends] == Why.SLOT]] = Cause.SLOT
    sent = np.flatnonzero(message >= 0)
    waits_for[sent] = writer(program)[message[sent]]
    drains = waiting < 0
    cause[drains], message[drains] = Cause.DRAIN, -1
    waits_for[drains] = causes.last if len(causes.of) else -1
    return cause, waits_for, message


def _behind_hand_overs(causes: Causes, last: Index, start: Times) -> Index:
    """What held up the hand-overs on the device that these ops stand behind."""
    program, end = causes.trace.program, causes.trace.end
    while True:
        before = causes.of[last]
        behind = (last >= 0) & (program.action[last] == Action.LOCAL) & (before >= 0)
        behind &= (end[before] > start).astype(np.bool_)
        if not behind.any():
            return last
        last = np.where(behind, before, last)


def writer(program: Program) -> Index:
    """The op that writes each message: what its SEND waits for."""
    waits, sends = program.waits_for, program.send_of
    producers: Index = waits.values[waits.offsets[sends]].astype(np.int64)
    return producers


def show(time: Any) -> str:
    """A time for people."""
    return f"{float(time):.6g}"


def _explain(gap: Gap, trace: Trace) -> str:
    program = trace.program
    device, idle = f"device {gap.device}", f"(idle {show(gap.duration)})"
    end = show(gap.end)
    if gap.cause == Cause.DRAIN:
        last = gap.waits_for
        return (
            f"{device} has no more work: the step ends with {program.label(last)} on "
            f"device {program.device[last]} at {end} {idle}"
        )
    waiting = program.label(gap.waiting)
    if gap.cause == Cause.LATE:
        text = f"{device} runs {waiting} late, at {end}, though nothing is missing"
        return f"{text} {idle}"
    producer = program.label(gap.waits_for)
    verb = "has nothing to do before" if gap.cause == Cause.FILL else "waits for"
    if gap.message >= 0:
        return f"{device} {verb} {_of_message(gap, trace, producer)}"
    text = {
        Action.COPY: f"{producer}: its activations are back at",
        Action.REDUCE: f"{producer}, which ends at",
        Action.TIE: f"{producer}, which ends at",
        Action.COMPUTE: f"{producer} on the processor they share, which ends at",
    }[Action(int(program.action[gap.waits_for]))]
    over = show(trace.end[gap.waits_for])
    return f"{device} {verb} {text} {over} {idle}"


def _of_message(gap: Gap, trace: Trace, producer: str) -> str:
    program, causes = trace.program, trace.causes
    message = program.message_at(gap.message)
    kind = message.kind.name.lower()
    figures = [f"idle {show(gap.duration)}"]
    if gap.cause == Cause.SEND:
        over = trace.end[message.send]
        text = f"its own send of {producer}'s {kind}, which ends at {show(over)}"
    else:
        over = trace.end[message.recv]
        text = f"{producer}: its {kind} arrives at {show(over)}"
        if over > gap.left:
            figures.append(f"transit {show(over - gap.left)}")
    ready = trace.end[gap.waits_for]
    if gap.left > ready:
        grouped = len(program.groups) and program.group[message.send] >= 0
        held = {
            Why.NEEDS: " with the group it is posted in" if grouped else "",
            Why.PARTNER: f" until device {message.target} receives it",
            Why.SLOT: " until its link has room",
            Why.STREAM: " behind others of its link",
            Why.TURN: " behind others of its device",
        }.get(Why(int(causes.why[message.send])), "")
        figures.append(f"held back {show(gap.left - ready)}{held}")
    if gap.end > over:
        figures.append(f"late {show(gap.end - over)}")
    return f"{text} ({', '.join(figures)})"
