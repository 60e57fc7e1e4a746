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
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.ir import Op, Schedule, Skip, Tie
from pipeproof.sched.ties import named

Column = NDArray[np.int32]


class Action(IntEnum):
    """What an instruction does; the sums over devices come last."""

    COMPUTE = 0
    """Run an op, or an overlap group of them, on the compute stream."""
    SEND = 1
    """Hand a buffer to the link to another device."""
    RECV = 2
    """Have the k-th message of a link arrive in a buffer."""
    LOCAL = 3
    """Hand a tensor over between two stages of one device."""
    COPY = 4
    """Move a buffer to the host or another device's memory, or back from there."""
    REDUCE = 5
    """Sum gradients over the devices that hold replicas of a stage."""
    TIE = 6
    """Sum the gradients of what stages share over these stages and their devices."""


class StreamKind(IntEnum):
    """What a stream carries."""

    COMPUTE = 0
    SEND = 1
    RECV = 2
    TO_HOST = 3
    FROM_HOST = 4
    REDUCE = 5
    TO_DEVICE = 6
    FROM_DEVICE = 7


@dataclass(frozen=True, slots=True)
class Stream:
    """An ordered list of instructions of one device.

    Attributes:
        device: whose it is.
        kind: what it carries.
        peer: the device at the other end of its link, if it has one.
    """

    device: int
    kind: StreamKind
    peer: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case StreamKind.SEND:
                return f"send to {self.peer}"
            case StreamKind.RECV:
                return f"receive from {self.peer}"
            case StreamKind.TO_DEVICE | StreamKind.FROM_DEVICE:
                return f"{self._words} {self.peer}"
            case _:
                return self._words

    @property
    def _words(self) -> str:
        return self.kind.name.lower().replace("_", " ")

    @property
    def link(self) -> tuple[int, int] | None:
        """Source and target of the link that it carries data over, if it does."""
        if self.peer is None:
            return None
        if self.kind in (StreamKind.SEND, StreamKind.TO_DEVICE):
            return self.device, self.peer
        return self.peer, self.device


class BufferKind(IntEnum):
    """What a buffer holds, and so what it counts as."""

    ACTIVATION = 0
    """What forward (or recompute) leaves for B or I, beside the stage's input."""
    WEIGHT_STASH = 1
    """The part of it that must outlive I, because W needs it."""
    INPUT = 2
    """A stage's input: the boundary tensor that arrived, or what came over a skip
    connection."""
    STORED_INPUT = 3
    """The same where a recompute will need it; 0 in `peak_activations`."""
    OUTPUT = 4
    """A stage's output, until it is handed on."""
    OUTPUT_GRAD = 5
    """The gradient of a stage's output, as it arrived."""
    INPUT_GRAD = 6
    """The gradient of a stage's input, until it is handed on."""
    GRADIENT = 7
    """A stage's accumulated parameter gradient; lives on after the step."""
    HOST = 8
    """A copy on the host."""
    OFFLOADED = 9
    """A copy of another device's, in this one's memory."""
    TIED = 10
    """What a TIE summed; lives on after the step, in the place of a gradient."""


class MessageKind(IntEnum):
    """Which way through the model a message goes."""

    ACTIVATION = 0
    GRADIENT = 1


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor's place: born when its first writer starts, gone when freed.

    Attributes:
        index: its number in the program.
        kind: what it holds.
        device: where it lies; for a HOST, whose it is.
        stage, micro_batch, slice: what it belongs to; micro_batch is -1 for a
            GRADIENT or a TIED, which belongs to all. For a TIED, `stage` is the
            number of its tie.
        takes_over: the buffer whose slot it fills, once that one is freed, or -1.
        skip: the stages at both ends of the skip connection that its content goes
            over, if it goes over one.
        tie: the stages whose gradients a TIED sums.
    """

    index: int
    kind: BufferKind
    device: int
    stage: int
    micro_batch: int
    slice: int
    takes_over: int
    skip: Skip | None = None
    tie: Tie | None = None

    def __str__(self) -> str:
        name = self.kind.name.lower()
        if self.tie is not None:
            return f"{name} {named(self.tie)}"
        if self.micro_batch < 0:
            return f"{name} {self.stage}"
        place = f"{self.stage}" if self.skip is None else "{}→{}".format(*self.skip)
        part = f".{self.slice}" if self.slice else ""
        guest = self.kind == BufferKind.OFFLOADED
        where = f" on device {self.device}" if guest else ""
        return f"{name} {place}:{self.micro_batch}{part}{where}"


@dataclass(frozen=True, slots=True)
class Message:
    """A tensor under way between two stages on different devices.

    Attributes:
        index: its number in the program.
        kind: activation or gradient.
        source_stage, target_stage: the stages that write and read it.
        port: which of several tensors between these stages.
        micro_batch, slice: what it belongs to.
        source, target: devices.
        send, recv: its two instructions.
    """

    index: int
    kind: MessageKind
    source_stage: int
    target_stage: int
    port: int
    micro_batch: int
    slice: int
    source: int
    target: int
    send: int
    recv: int

    def __str__(self) -> str:
        part = f".{self.slice}" if self.slice else ""
        return (
            f"{self.kind.name.lower()} {self.source_stage}→{self.target_stage}"
            f":{self.micro_batch}{part}"
        )


@dataclass(frozen=True)
class Lists:
    """For each instruction (or group of them) a short list of integers.

    Attributes:
        offsets: int32 or int64, length instructions + 1.
        values: list i is `values[offsets[i]:offsets[i + 1]]`.
    """

    offsets: NDArray[Any]
    values: NDArray[Any]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Lists:
        """The same, from Python lists."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(offsets, np.array([v for row in rows for v in row], dtype=np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        low, high = self.offsets[index], self.offsets[index + 1]
        values: list[int] = self.values[low:high].tolist()
        return values

    def to_lists(self) -> list[list[int]]:
        """All of them, as Python lists."""
        values, offsets = self.values.tolist(), self.offsets.tolist()
        empty: list[int] = []  # shared: most lists are, and a million cost time
        return [
            values[low:high] if high > low else empty for low, high in pairwise(offsets)
        ]

    @cached_property
    def owner(self) -> NDArray[Any]:
        """For each of `values`, the instruction whose list it is in."""
        every = np.arange(len(self.offsets) - 1, dtype=np.int32)
        return np.repeat(every, np.diff(self.offsets))


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


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with everything it touches spelled out."""

    index: int
    stream: Stream
    action: Action
    ops: tuple[Op, ...]
    message: Message | None
    posted_with: tuple[int, ...]
    waits_for: tuple[int, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    frees: tuple[Buffer, ...]

    @property
    def label(self) -> str:
        """The op or the message it is about."""
        if self.ops:
            return "&".join(map(str, self.ops))
        if self.action == Action.TIE:
            return f"tie {' '.join(named(b.tie) for b in self.writes if b.tie)}"
        return f"{self.action.name.lower()} {self.message or self.reads[0]}"


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


def table(rows: int, columns: int) -> Column:
    """A table of int32, to be filled, whose columns lie one behind the other."""
    return np.empty((rows, columns), dtype=np.int32, order="F")
