"""What the instructions of a program are about: streams, messages and buffers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pipeproof.sched.ir import Op, Skip, Tie
from pipeproof.sched.ties import named


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
