"""Messages between ranks, in the program's order.

    rank 0                                   rank 1
    send 0:0 ── isend ─▶ ╔═══════════════╗ ◀─ irecv ── recv 0:0   posted early
    0F1                  ║ 0 → 1, a      ║                         1F… elsewhere
    send 0:1 ── isend ─▶ ║ communicator  ║                take ──▶ waits, gives it
                         ╚═══════════════╝

Each ordered pair of devices that exchange anything has a communicator of its own,
so that the two directions of a link, and different links, never wait for each
other, and the k-th send of a pair meets its k-th receive. All are made before the
first step, in the order of `program.streams`, which is the same on all ranks.

A receive must know shapes and types before the tensor comes. In the first step of
a signature (row counts, shapes and types of the batch, and what else decides
them) each message has a header; in later ones both sides know what it said. A
sender that finds another form than it announced says so instead of sending.

Each receive has memory of its own. Autograd may keep a view of what arrived as a
gradient, so writing to the same place again could change it. A receive is posted
only when its slot is free, so there is never more in flight than slots.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Backend

from pipeproof.exec.errors import ModelError
from pipeproof.exec.tensors import flat
from pipeproof.sched.program import Message

NEVER = timedelta(days=365)
"""Deadlines are the ranks', who know why they wait; a communicator has none."""
FIRST_BYTES = 1024
"""Size of a text's first tensor; a longer text is followed by the rest."""
DTYPES = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


class Pending:
    """A tensor under way.

    Attributes:
        threaded: whether a thread finishes it, or whoever needs it.
        ended: when it was sent or was there, by `perf_counter`.
        error: why it never will be.
    """

    def __init__(self, tensor: Tensor, peer: int, *, threaded: bool) -> None:
        self.work: Any = None
        self.tensor: Tensor | None = tensor
        self.peer = peer
        self.threaded = threaded
        self.ended = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()

    def finish(self) -> None:
        """Wait for it, without a deadline, and tell those who wait for this."""
        try:
            # NCCL's waits hold up the host if they are given a deadline.
            self.work.wait(NEVER) if self.threaded else self.work.wait()
        except RuntimeError as error:
            self.error = error
        self.work = None
        self.ended = perf_counter()
        self.done.set()

    def fail(self, error: Exception) -> None:
        """It never began."""
        self.error = error
        self.done.set()


class Wire:
    """One direction of one communicator: first in, first out.

    gloo's waits can be neither polled nor interrupted, so a thread of the wire does
    them; who needs a tensor waits for that thread, and can give up. NCCL's only
    order the device's stream and return, so they are done where the tensor is used.

    Args:
        group: the communicator.
        place: of the other end in it.
        peer: its rank.
        threaded: whether waits block, as gloo's do.
        tag: tells wires of one communicator apart, which only gloo can do.
    """

    def __init__(
        self, group: Backend, place: int, peer: int, threaded: bool, tag: int = 0
    ) -> None:
        self._group, self._place, self._peer = group, place, peer
        self._threaded, self._tag = threaded, tag
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, tensor: Tensor) -> Pending:
        """Start to send a contiguous tensor; it is held until it is sent."""
        return self._started(self._group.send, tensor)  # type: ignore[attr-defined]

    def receive(self, tensor: Tensor) -> Pending:
        """Start to fill a contiguous tensor."""
        return self._started(self._group.recv, tensor)  # type: ignore[attr-defined]

    def close(self, timeout_s: float) -> None:
        """Have the thread end, once all is done that was begun."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _started(self, function: Any, tensor: Tensor) -> Pending:
        pending = Pending(tensor, self._peer, threaded=self._threaded)
        try:
            pending.work = function([tensor], self._place, self._tag)
        except RuntimeError as error:  # the link is broken already
            pending.fail(error)
            return pending
        if not self._threaded:
            return pending
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,))
            self._thread.daemon = True
            self._thread.start()
        self._queue.put(pending)
        return pending


def _serve(queue: SimpleQueue[Pending | None]) -> None:
    while (pending := queue.get()) is not None:
        pending.finish()
        del pending


Wait = Callable[[Pending, str], None]
"""Returns once it is done; raises if it never will be. The text says for what."""


class TextWire:
    """Short texts over two wires, one for each direction.

    Args:
        out, into: the wires.
        wait: as `Ranks.wait`.
    """

    def __init__(self, out: Wire, into: Wire, wait: Wait) -> None:
        self._out, self._into, self._wait = out, into, wait

    def send(self, text: str) -> list[Pending]:
        """Start to send."""
        data = text.encode()
        data = len(data).to_bytes(8, "little") + data
        first = bytearray(data[:FIRST_BYTES].ljust(FIRST_BYTES, b"\0"))
        sent = [self._out.send(torch.frombuffer(first, dtype=torch.uint8))]
        if rest := bytearray(data[FIRST_BYTES:]):
            sent.append(self._out.send(torch.frombuffer(rest, dtype=torch.uint8)))
        return sent

    def receive(self, what: str) -> str:
        """Wait for the next one."""
        data = self._read(FIRST_BYTES, what)
        length, data = int.from_bytes(data[:8], "little"), data[8:]
        if length > len(data):
            data += self._read(length - len(data), what)
        return data[:length].decode()

    def _read(self, size: int, what: str) -> bytes:
        buffer = torch.empty(size, dtype=torch.uint8)
        self._wait(self._into.receive(buffer), what)
        return bytes(buffer.numpy())


@dataclass(frozen=True)
class Part:
    """What a receiver must know of a tensor.

    Attributes:
        shape, stride: it arrives with the strides it was sent with, because
            kernels, and so the last bits of results, may depend on them.
        dtype: its name.
        wants_grad: whether it is to be a leaf that requires a gradient.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    wants_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Of a tensor as `dense` gives it."""
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            str(tensor.dtype),
            tensor.requires_grad,
        )

    def __str__(self) -> str:
        return f"{list(self.shape)} of {self.dtype.removeprefix('torch.')}"


@dataclass(frozen=True)
class Form:
    """What a receiver must know of a value.

    Attributes:
        parts: its tensors.
        structure: what holds them, as JSON.
        plain: whether it holds bools, numbers or texts, which come with each
            message: they may differ in every one.
    """

    parts: tuple[Part, ...]
    structure: str
    plain: bool

    @classmethod
    def of(cls, value: Any, tensors: Sequence[Tensor]) -> Form:
        """Of a value whose tensors, as `dense` gives them, are these."""
        parts = tuple(map(Part.of, tensors))
        if isinstance(value, Tensor):
            return cls(parts, _TENSOR, plain=False)
        plain = any(
            leaf is not None and not isinstance(leaf, Tensor) for leaf in flat(value)
        )
        return cls(parts, json.dumps(_structure(value)), plain)

    def to_text(self) -> str:
        """As JSON."""
        parts = [[p.shape, p.stride, p.dtype, p.wants_grad] for p in self.parts]
        return json.dumps([self.structure, self.plain, parts])

    @classmethod
    def parse(cls, text: str) -> Form:
        """The inverse of `to_text`."""
        structure, plain, parts = json.loads(text)
        return cls(
            tuple(
                Part(tuple(shape), tuple(stride), dtype, wants_grad)
                for shape, stride, dtype, wants_grad in parts
            ),
            structure,
            plain,
        )

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        """The value, with these tensors in it."""
        if self.structure == _TENSOR:
            return next(tensors)
        return _filled(json.loads(self.structure), tensors)

    def __str__(self) -> str:
        parts = ", ".join(map(str, self.parts)) or "no tensor"
        return parts if self.structure == _TENSOR else f"{parts} in {self.structure}"


def _structure(value: Any) -> Any:
    """As lists, whose first entry says what they are."""
    kind = type(value)
    if isinstance(value, Tensor):
        return ["tensor"]
    if kind is dict:
        return ["dict", *([key, _structure(part)] for key, part in value.items())]
    if kind is tuple or kind is list:
        return [kind.__name__, *map(_structure, value)]
    return ["plain", value]


def _filled(structure: Any, tensors: Iterator[Tensor]) -> Any:
    kind, *parts = structure
    match kind:
        case "tensor":
            return next(tensors)
        case "dict":
            return {key: _filled(part, tensors) for key, part in parts}
        case "tuple":
            return tuple(_filled(part, tensors) for part in parts)
        case "list":
            return [_filled(part, tensors) for part in parts]
    return parts[0]


_TENSOR = json.dumps(["tensor"])


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it has gaps, overlaps or is not materialised."""
    plain = tensor.resolve_conj().resolve_neg()
    like = torch.empty_like(plain, device="meta", memory_format=torch.preserve_format)
    if like.stride() == plain.stride():
        return plain
    copy = torch.empty_like(plain, memory_format=torch.preserve_format)
    copy.copy_(plain.detach())
    return copy.requires_grad_(tensor.requires_grad)


def as_bytes(tensor: Tensor) -> Tensor:
    """A dense tensor's memory, as one contiguous row of bytes."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)


class Across:
    """Between the ranks: one rank's sends and receives in one pipeline.

    Args:
        out: the wire to each other device that this one sends to.
        into: the wire from each.
        headers: texts to and from each.
        device: where this rank's tensors lie.
        wait: as `Ranks.wait`.

    Attributes:
        recorded: whether the step's `times` are wanted.
    """

    def __init__(
        self,
        out: dict[int, Wire],
        into: dict[int, Wire],
        headers: Mapping[int, TextWire],
        device: torch.device,
        wait: Wait,
    ) -> None:
        self._out, self._into, self._headers = out, into, headers
        self._device, self._wait = device, wait
        self._forms: dict[int, Form] = {}
        self._announced = False
        self._begun: dict[int, tuple[int, float, list[Pending]]] = {}
        self._kept: list[tuple[int, float, list[Pending]]] = []
        self.recorded = False
        self._moving: dict[int, list[Pending]] = {}
        self._unknown: dict[int, deque[Message]] = {peer: deque() for peer in into}

    def begin(self, *, announced: bool) -> None:
        """Get ready for a step.

        Args:
            announced: messages have the forms they had in the step before;
                otherwise each comes with a header.
        """
        self._announced = announced
        if not announced:
            self._forms.clear()

    def send(self, message: Message, value: Any) -> None:
        """Start to send a value; its memory is held until it is sent."""
        tensors = [dense(leaf) for leaf in flat(value) if isinstance(leaf, Tensor)]
        form = Form.of(value, tensors)
        began = perf_counter()
        if self._announced:
            self._as_announced(message, form)
        moving = []
        if not self._announced or form.plain:
            self._forms[message.index] = form
            moving += self._headers[message.target].send(form.to_text())
        wire = self._out[message.target]
        moving += [wire.send(as_bytes(t)) for t in tensors if t.numel()]
        self._begun[message.index] = message.send, began, moving

    def _as_announced(self, message: Message, form: Form) -> None:
        before = self._forms[message.index]
        if form != before and not (form.plain and before.plain):
            raise ModelError(
                f"{message} is {form}, and was {before} in the step before, for a "
                "batch of the same shapes: what crosses between ranks may depend on "
                "the shapes of the batch, not on its values"
            )

    def post(self, message: Message) -> None:
        """Start to receive, if it is known what, and that of all before it."""
        if self._known(message) and not self._unknown[message.source]:
            self._receive(message)
        else:
            self._unknown[message.source].append(message)

    def take(self, message: Message) -> Any:
        """Wait for a value: tensors that are leaves where they want a gradient."""
        # Links are first in, first out: what comes before must be received before.
        while message.index not in self._moving:
            earlier = self._unknown[message.source].popleft()
            if not self._known(earlier):
                text = self._headers[message.source].receive(f"the header of {earlier}")
                self._forms[earlier.index] = Form.parse(text)
            self._receive(earlier)
        arriving = iter(self._moving[message.index])
        form = self._forms[message.index]
        return form.filled(
            self._arrived(part, message, arriving) for part in form.parts
        )

    def _known(self, message: Message) -> bool:
        """Whether its form is that of the step before, and no header comes."""
        return self._announced and not self._forms[message.index].plain

    def finish(self, message: Message) -> None:
        """Wait until a value is sent."""
        for pending in self._begun[message.index][2]:
            self._wait(pending, f"{message} to be taken")

    def _receive(self, message: Message) -> None:
        began = perf_counter()
        wire = self._into[message.source]
        moving = []
        for part in self._forms[message.index].parts:
            if 0 not in part.shape:
                size = DTYPES[part.dtype].itemsize
                for length in part.shape:
                    size *= length
                buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                moving.append(wire.receive(buffer))
        self._moving[message.index] = moving
        self._begun[message.index] = message.recv, began, moving

    def _arrived(
        self, part: Part, message: Message, arriving: Iterator[Pending]
    ) -> Tensor:
        dtype = DTYPES[part.dtype]
        if 0 in part.shape:
            empty = torch.empty_strided(
                part.shape, part.stride, dtype=dtype, device=self._device
            )
            return empty.requires_grad_(part.wants_grad)
        pending = next(arriving)
        self._wait(pending, str(message))
        buffer, pending.tensor = pending.tensor, None
        assert buffer is not None
        whole = buffer.view(dtype).as_strided(part.shape, part.stride)
        return whole.requires_grad_(part.wants_grad)

    def forget(self) -> None:
        """Let go of everything of a step; what is not sent yet the wires hold."""
        self._kept = list(self._begun.values()) if self.recorded else []
        self._moving.clear()
        self._begun.clear()
        for waiting in self._unknown.values():
            waiting.clear()

    def times(self) -> list[tuple[int, float, float]]:
        """When sends and receives of the last recorded step began and ended here.

        Returns:
            Of each its instruction, and `perf_counter` at both ends.
        """
        result = []
        for index, began, moving in self._kept:
            for pending in moving:
                self._wait(pending, "what was sent to be taken")
            result.append((index, began, max([began, *(p.ended for p in moving)])))
        self._kept = []
        return result
