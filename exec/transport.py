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

What is sent is held until it has gone. It is known to have gone once its target,
having taken it, has sent something that arrived here; nobody need wait for it. Where
more than a little is held like that, the oldest has a thread that waits for it.

Where times are wanted, somebody must see when a tensor is there. An op that waits for
it does, and at no cost. What comes while ops run only a thread can see; but an op that
waited for that thread would wait for two changes of threads in place of one. So the
thread looks for what did not keep its op waiting in the step before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.errors import ModelError
from pipeproof.exec.forms import Form, Part, as_bytes
from pipeproof.exec.moving import readers
from pipeproof.exec.wires import Incoming, Outgoing, Pending, TextWire, Wait
from pipeproof.sched import Action, Program
from pipeproof.sched.instructions import Message

WAITED_S = 1e-4
"""From when on an op was kept waiting, and has seen when it ended."""
HELD = 1 << 20
"""Bytes sent to a peer that may be held until something comes back from there."""
Begun = tuple[int, float, list[Pending] | None]
"""An instruction, when it began, and whose end is its own, if that is looked for."""
Arriving = list[tuple[Part, Tensor, Pending | None]]
"""Of each tensor of a value: what it is, itself, and its transfer."""


class Across:
    """Between the ranks: one rank's sends and receives in one pipeline.

    Args:
        program: what the ranks run.
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
        program: Program,
        out: dict[int, Outgoing],
        into: dict[int, Incoming],
        headers: Mapping[int, TextWire],
        device: torch.device,
        wait: Wait,
    ) -> None:
        self._out, self._into, self._headers = out, into, headers
        self._device, self._wait = device, wait
        self._on_cpu = device.type == "cpu"
        self._taken_before = taken_before(program)
        self._awaited = _awaited(program)
        self._going: dict[int, list[Pending]] = {}
        self._forms: dict[int, Form] = {}
        self._announced = False
        self._ask: Callable[[], bool] | None = None
        self.recorded = False
        self._begun: dict[int, Begun] = {}
        self._kept: list[Begun] = []
        self._moving: dict[int, Arriving] = {}
        self._kept_waiting: set[int] = set()  # in the step before
        self._unknown: dict[int, deque[Message]] = {peer: deque() for peer in into}
        self._sent: dict[int, deque[tuple[int, int, Pending]]] = {
            peer: deque() for peer in {*out, *into}
        }
        self._held = dict.fromkeys(self._sent, 0)

    def begin(self, announced: Callable[[], bool]) -> None:
        """Get ready for a step.

        Args:
            announced: asked before the first message, whether all have the forms
                they had in the step before; otherwise each comes with a header.
        """
        self._ask = announced

    def agree(self) -> None:
        """Ask, if that has not been done."""
        if self._ask is not None:
            ask, self._ask = self._ask, None
            self._announced = ask()
            if not self._announced:
                self._forms.clear()

    def send(self, message: Message, value: Any) -> None:
        """Start to send a value; its memory is held until it is sent."""
        if self._ask is not None:
            self.agree()
        began = perf_counter() if self.recorded else 0.0
        form = self._forms.get(message.index)
        tensors = None if form is None else form.fitting(value)
        if form is None or tensors is None:
            form, tensors = self._announce(message, value, form)
        wire, moving = self._out[message.target], []
        awaited = message.index in self._awaited
        for part, tensor in zip(form.parts, tensors):
            if not part.empty:
                row = self._row(part, tensor)
                moving.append(wire.send(row, followed=awaited and self.recorded))
        if awaited:
            self._going[message.index] = moving
        else:
            self._hold(message, moving)
        if self.recorded:
            seen = moving if awaited else None
            self._begun[message.index] = message.send, began, seen

    def _hold(self, message: Message, moving: list[Pending]) -> None:
        """Hold what was sent, the oldest no longer than a thread finds it gone."""
        peer = message.target
        sent, held = self._sent[peer], self._held[peer]
        for pending in moving:
            if pending.tensor is not None:  # it has not gone already
                size = pending.tensor.nbytes
                sent.append((message.send, size, pending))
                held += size
        while held > HELD and sent[0][2].entrust():
            held -= sent.popleft()[1]
        self._held[peer] = held

    def _announce(
        self, message: Message, value: Any, before: Form | None
    ) -> tuple[Form, list[Tensor]]:
        """The form of a value, of which a header tells; its tensors, each dense."""
        form, tensors = Form.of(value)
        if before is not None and form != before and not (form.plain and before.plain):
            raise ModelError(
                f"{message} is {form}, and was {before} in the step before, for a "
                "batch of the same shapes: what crosses between ranks may depend on "
                "the shapes of the batch, not on its values"
            )
        if before is None or form.plain:
            self._forms[message.index] = form
            self._headers[message.target].send(form.to_text())
        return form, tensors

    def _row(self, part: Part, tensor: Tensor) -> Tensor:
        """A dense tensor's memory as a communicator takes it: gloo minds no type."""
        return tensor if part.contiguous and self._on_cpu else as_bytes(tensor)

    def post(self, message: Message) -> None:
        """Start to receive, if it is known what, and that of all before it."""
        if self._ask is not None:
            self.agree()
        if self._known(message) and not self._unknown[message.source]:
            self._receive(message)
        else:
            self._unknown[message.source].append(message)

    def _known(self, message: Message) -> bool:
        """Whether its form is that of the step before, and no header comes."""
        return self._announced and not self._forms[message.index].plain

    def _receive(self, message: Message) -> None:
        began = perf_counter() if self.recorded else 0.0
        followed = self.recorded and message.index not in self._kept_waiting
        wire, arriving = self._into[message.source], []
        for part in self._forms[message.index].parts:
            tensor = torch.empty_strided(
                part.shape, part.stride, dtype=part.dtype, device=self._device
            )
            pending = None
            if not part.empty:
                row = self._row(part, tensor)
                pending = wire.receive(row, followed=followed)
            arriving.append((part, tensor, pending))
        self._moving[message.index] = arriving
        if self.recorded:
            moving = [pending for _, _, pending in arriving if pending is not None]
            self._begun[message.index] = message.recv, began, moving

    def take(self, message: Message) -> Any:
        """Wait for a value: tensors that are leaves where they want a gradient."""
        # Links are first in, first out: what comes before must be received before.
        while message.index not in self._moving:
            earlier = self._unknown[message.source].popleft()
            if not self._known(earlier):
                text = self._headers[message.source].receive(f"the header of {earlier}")
                self._forms[earlier.index] = Form.parse(text)
            self._receive(earlier)
        index = message.index
        arriving = self._moving.pop(index)
        asked, came = perf_counter(), 0.0
        tensors = []
        for part, tensor, pending in arriving:
            if pending is not None:
                self._wait(pending, message)
                came = perf_counter()
            if part.wants_grad:
                tensor.requires_grad_()
            tensors.append(tensor)
        if came:
            self._settle(message.source, self._taken_before[index])
            if came - asked > WAITED_S:
                self._kept_waiting.add(index)
            else:
                self._kept_waiting.discard(index)
        return self._forms[index].filled(tensors)

    def finish(self, message: Message) -> None:
        """Wait until a value is sent."""
        for pending in self._going.pop(message.index):
            self._wait(pending, f"{message} to be taken")

    def _settle(self, peer: int, until: int) -> None:
        """Let go of what this rank sent to a peer, up to an instruction."""
        sent = self._sent[peer]
        while sent and sent[0][0] <= until:
            _, size, pending = sent.popleft()
            self._held[peer] -= size
            pending.let_go()

    def forget(self) -> None:
        """Let go of everything of a step but what is not sent yet."""
        self._kept = list(self._begun.values()) if self.recorded else []
        self._moving.clear()
        self._begun.clear()
        self._going.clear()
        for waiting in self._unknown.values():
            waiting.clear()

    def end(self) -> None:
        """Let go of what was sent, when it has gone."""
        for peer, sent in self._sent.items():
            while sent:
                _, size, pending = sent.popleft()
                self._held[peer] -= size
                self._wait(pending, "what was sent to be taken")

    def times(self) -> list[tuple[int, float, float]]:
        """When sends and receives of the last recorded step began and ended here.

        Returns:
            Of each its instruction, and `perf_counter` at both ends; for that of a
            send for which nobody waits nobody looks: it is that of its receive.
        """
        result = []
        for index, began, moving in self._kept:
            ended = math.inf if moving is None else began
            for pending in moving or []:
                self._wait(pending, "what was sent to be taken")
                ended = max(ended, pending.ended)
            result.append((index, began, ended))
        self._kept = []
        return result


def taken_before(program: Program) -> dict[int, int]:
    """Of each message, the last send the other way that its sender had taken.

    Of that, the instruction; -1 where there is none.
    """
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
    messages = [program.message_at(i) for i in range(len(program.recv_of))]
    for reader, arriving in readers(program).items():
        for index in arriving:
            message = messages[index]
            pair = message.source, message.target
            taken.setdefault(pair, []).append((reader, message.send))
    result = {}
    for pair, pairs in taken.items():
        pairs.sort()
        back = sorted(
            (m for m in messages if (m.target, m.source) == pair), key=lambda m: m.send
        )
        last, place = -1, 0
        for message in back:
            while place < len(pairs) and pairs[place][0] < message.send:
                last = max(last, pairs[place][1])
                place += 1
            result[message.index] = last
    return {message.index: result.get(message.index, -1) for message in messages}


def _awaited(program: Program) -> frozenset[int]:
    """The messages posted in one group with a receive, which an op waits for too."""
    return frozenset(
        number
        for number, send in enumerate(program.send_of.tolist())
        if any(program.action[i] == Action.RECV for i in program.posted_with(send))
    )
