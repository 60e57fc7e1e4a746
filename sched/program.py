"""The program: what each device does on each of its streams.

A schedule says in which order a device computes. A program says all that
follows from it: messages, streams, buffers, and what waits for what. The
simulator times it and the executor runs it, so what is timed is what is run.
PROGRAM.md beside this file draws one.

Instructions are kept in one global order in which each comes after all it waits
for; a stream's own order is the order of its instructions in that list. Like a
schedule's ops they are columns of integers, and an `Instruction` is a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import (
    Action,
    Buffer,
    BufferKind,
    Instruction,
    Message,
    MessageKind,
    Stream,
)
from pipeproof.sched.ir import Schedule
from pipeproof.sched.lists import Column, Lists


class Storage(Protocol):
    """A program's messages and buffers, and who touches which.

    Much of a program, and nothing that decides in which order it runs: `lower` works
    it out when it is asked for.
    """

    by_op: ClassVar[bool]
    """Whether ops touch what `pipeproof.sched.touches` says of their kind, and so as
    `lower` has it."""

    @property
    def message_count(self) -> int:
        """How many messages there are."""

    @property
    def messages(self) -> Column:
        """int32 of shape (messages, 10), columns as in `Message`."""

    @property
    def buffers(self) -> Column:
        """int32 of shape (buffers, 6), columns as in `Buffer`."""

    @property
    def buffer_skips(self) -> Column:
        """int32 per buffer, which of the schedule's skips its content goes over, or -1.

        Empty where it has none.
        """

    @property
    def reads(self) -> Lists:
        """The buffers that each instruction reads."""

    @property
    def writes(self) -> Lists:
        """Those that it writes."""

    @property
    def frees(self) -> Lists:
        """Those that it frees."""


@dataclass(frozen=True)
class Stored:
    """A `Storage` that is there, of a program made by hand."""

    messages: Column
    buffers: Column
    reads: Lists
    writes: Lists
    frees: Lists
    buffer_skips: Column = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    by_op: ClassVar[bool] = False

    @property
    def message_count(self) -> int:
        """How many messages there are."""
        return len(self.messages)


@dataclass(frozen=True, eq=False)
class Program:
    """Every device's streams, in columns.

    Attributes:
        schedule: what it was lowered from.
        streams: in the order in which every rank creates them.
        stream, action: int32, int8 per instruction.
        first_op, op_count: int32 and, where that suffices, int8: the instruction's ops
            in `schedule.ops`; 0 of them for instructions about messages and ties.
        message: int32 per instruction, -1 for none.
        waits_for: instructions on other streams that must be done before.
        storage: its messages and buffers.
        groups: the SENDs and RECVs of one device that are posted as one: they start
            together, once each of them could, and what waits for one waits for all.
    """

    schedule: Schedule
    streams: tuple[Stream, ...]
    stream: Column
    action: NDArray[np.int8]
    first_op: Column
    op_count: NDArray[np.signedinteger[Any]]
    message: Column
    waits_for: Lists
    storage: Storage
    groups: Lists = field(default_factory=lambda: Lists.of([]))

    def __len__(self) -> int:
        """Number of instructions."""
        return len(self.stream)

    def __getitem__(self, index: int) -> Instruction:
        if not -len(self) <= index < len(self):
            raise IndexError(f"instruction {index} of {len(self)}")
        index %= len(self)
        first, message = int(self.first_op[index]), int(self.message[index])
        return Instruction(
            index,
            self.streams[self.stream[index]],
            Action(int(self.action[index])),
            tuple(self.schedule.ops[first : first + int(self.op_count[index])]),
            None if message < 0 else self.message_at(message),
            tuple(self.posted_with(index)),
            tuple(self.waits_for[index]),
            tuple(map(self.buffer_at, self.reads[index])),
            tuple(map(self.buffer_at, self.writes[index])),
            tuple(map(self.buffer_at, self.frees[index])),
        )

    def __iter__(self) -> Iterator[Instruction]:
        return (self[index] for index in range(len(self)))

    def message_at(self, index: int) -> Message:
        """One message, spelled out."""
        kind, *rest = self.messages[index].tolist()
        return Message(index, MessageKind(kind), *rest)

    def buffer_at(self, index: int) -> Buffer:
        """One buffer, spelled out."""
        kind, *rest = self.buffers[index].tolist()
        buffer, skips = Buffer(index, BufferKind(kind), *rest), self.buffer_skips
        if kind == BufferKind.TIED and 0 <= buffer.stage < len(self.schedule.ties):
            return replace(buffer, tie=self.schedule.ties[buffer.stage])
        if not len(skips) or skips[index] < 0:
            return buffer
        return replace(buffer, skip=self.schedule.skips[int(skips[index])])

    @property
    def message_count(self) -> int:
        """How many messages there are."""
        return self.storage.message_count

    @property
    def messages(self) -> Column:
        """int32 of shape (messages, 10), columns as in `Message`."""
        return self.storage.messages

    @property
    def buffers(self) -> Column:
        """int32 of shape (buffers, 6), columns as in `Buffer`."""
        return self.storage.buffers

    @property
    def buffer_skips(self) -> Column:
        """As in `Storage`."""
        return self.storage.buffer_skips

    @property
    def reads(self) -> Lists:
        """The buffers that each instruction reads."""
        return self.storage.reads

    @property
    def writes(self) -> Lists:
        """Those that it writes."""
        return self.storage.writes

    @property
    def frees(self) -> Lists:
        """Those that it frees."""
        return self.storage.frees

    @property
    def send_of(self) -> Column:
        """The SEND of each message."""
        return self.messages[:, 8]

    @property
    def recv_of(self) -> Column:
        """The RECV of each message."""
        return self.messages[:, 9]

    @cached_property
    def device(self) -> Column:
        """The device of each instruction."""
        return np.array([s.device for s in self.streams], dtype=np.int32)[self.stream]

    def device_of(self, index: int) -> int:
        """The device of one instruction."""
        return self.streams[int(self.stream[index])].device

    @cached_property
    def group(self) -> Column:
        """The group of each instruction; -1 where it has none."""
        number = np.full(len(self), -1, dtype=np.int32)
        number[self.groups.values] = self.groups.owner
        return number

    def posted_with(self, index: int) -> list[int]:
        """The other instructions of its group."""
        if not len(self.groups) or (number := int(self.group[index])) < 0:
            return []
        return [other for other in self.groups[number] if other != index]

    @cached_property
    def op_kind(self) -> NDArray[np.int8]:
        """Kind of the first op of each instruction; -1 where it has none."""
        kinds = np.full(len(self), -1, dtype=np.int8)
        has_op = self.first_op >= 0
        kinds[has_op] = self.schedule.ops.kind[self.first_op[has_op]]
        return kinds

    @cached_property
    def computes(self) -> NDArray[np.int64]:
        """The COMPUTE instructions."""
        return np.flatnonzero(self.action == Action.COMPUTE)

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """The REDUCEs and TIEs, which start on all their devices at once."""
        return np.flatnonzero(self.action >= Action.REDUCE)

    @cached_property
    def by_stream(self) -> Sequence[NDArray[np.int64]]:
        """Each stream's instructions, in order."""
        order = np.argsort(self.stream, kind="stable")
        counts = np.bincount(self.stream, minlength=len(self.streams))
        return np.split(order, np.cumsum(counts)[:-1])

    def label(self, index: int, *, short: bool = False) -> str:
        """The op (or group) or the message an instruction is about."""
        if not self.op_count[index]:
            return self[index].label
        first = int(self.first_op[index])
        ops = self.schedule.ops[first : first + int(self.op_count[index])]
        return "&".join(op.short if short else str(op) for op in ops)

    def describe(self) -> str:
        """Every stream and instruction in words, for reading and for tests."""
        lines: list[str] = []
        for number, stream in enumerate(self.streams):
            lines.append(f"device {stream.device}, {stream}:")
            for index in self.by_stream[number].tolist():
                lines.append(f"  {self._line(self[index])}")
        return "\n".join(lines)

    def _line(self, instruction: Instruction) -> str:
        text = f"{instruction.index:>3} {instruction.label}"
        if instruction.posted_with:
            text += f" with {', '.join(map(str, instruction.posted_with))}"
        if instruction.waits_for:
            text += f" after {', '.join(map(str, instruction.waits_for))}"
        for verb, buffers in (
            ("reads", instruction.reads),
            ("writes", instruction.writes),
            ("frees", instruction.frees),
        ):
            if buffers:
                text += f"; {verb} {', '.join(map(str, buffers))}"
        return text
