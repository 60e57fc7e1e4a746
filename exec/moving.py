"""What moves values, bound: SEND, RECV, LOCAL and COPY, and taking what came.

Within a process a value is put where the receive wants it. Between processes a
transport takes it, and gives it to the first op that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pipeproof.exec import tensors
from pipeproof.exec.replicas import Run
from pipeproof.exec.stash import Copies, Place
from pipeproof.exec.workspace import Workspace, of
from pipeproof.sched import Action, Kind, Program
from pipeproof.sched.instructions import Instruction, Message, MessageKind


class Transport(Protocol):
    """Takes what a device hands to one in another process."""

    def send(self, message: Message, value: Any) -> None:
        """Take a value, or a value's gradients."""

    def post(self, message: Message) -> None:
        """Get ready to receive: its slot is free."""

    def take(self, message: Message) -> Any:
        """The same on the target's device, as leaves where they want gradients."""

    def finish(self, message: Message) -> None:
        """Return once a message that was sent is through."""

    def forget(self) -> None:
        """Let go of everything of a step."""


Lend = Callable[[str], Place]
"""Gives a place in another process's memory for what the text says."""


class Moving:
    """Binds them.

    Args:
        space: where values lie.
        devices: the torch device of each of the schedule's.
        transport: between processes; None where all devices are in this one.
        lend: as for `Surroundings`.
    """

    def __init__(
        self,
        space: Workspace,
        devices: Sequence[torch.device],
        transport: Transport | None,
        lend: Lend | None,
    ) -> None:
        self._space, self._program, self._devices = space, space.program, devices
        self._transport, self._lend = transport, lend
        self._reader = {} if transport is None else readers(space.program)

    def send(self, instruction: Instruction) -> Run:
        """A SEND."""
        values, message = self._space.values, instruction.message
        assert message is not None
        read = instruction.reads[0].index
        if self._transport is None:
            return self._putting(message, read)
        send = self._transport.send

        def hand_to_link() -> None:
            send(message, values[read])
            values[read] = None

        return hand_to_link

    def receive(self, instruction: Instruction) -> Run | None:
        """A RECV; None where the send does it all."""
        if self._transport is None:
            return None
        assert instruction.message is not None
        return partial(self._transport.post, instruction.message)

    def _putting(self, message: Message, read: int) -> Run:
        """To another device of this process."""
        values, write = self._space.values, self._program.writes[message.recv][0]
        target = self._devices[message.target]
        if self._devices[message.source] == target:

            def put() -> None:
                values[write], values[read] = values[read], None

            return put

        def copy_over() -> None:
            values[write], values[read] = tensors.moved(values[read], target), None

        return copy_over

    def hand_over(self, instruction: Instruction) -> Run:
        """What is in the buffers that it reads, in turn, to those that it writes."""
        values = self._space.values
        pairs = [
            (read.index, write.index)
            for read, write in zip(instruction.reads, instruction.writes, strict=True)
        ]

        def move() -> None:
            for read, write in pairs:
                values[write], values[read] = values[read], None

        return move

    def copy(self, instruction: Instruction) -> Run:
        """OFFLOAD and RELOAD of all that a forward stored, and of its leaves."""
        (op,), device = instruction.ops, instruction.stream.device
        stashes, hand_over = self._space.stashes, self.hand_over(instruction)
        target = self._program.schedule.offload_to[device]
        place: Callable[[], Place]
        if target is not None and self._lend is not None:
            place = partial(self._lend, instruction.label)
        else:
            away = torch.device("cpu") if target is None else self._devices[target]
            place = partial(Copies, self._devices[device], away)

        def offload() -> None:
            stashes[of(op)].offload(place(), self._space.leaves(op, instruction))
            hand_over()

        def reload() -> None:
            stashes.pop(of(op)).reload()
            hand_over()

        return offload if op.kind == Kind.OFFLOAD else reload

    def taking(self, index: int, run: Run) -> Run:
        """An instruction, and before it what it is the first to read of messages.

        And those sent in one group with them, once these are there: both sides of
        an exchange take first, so neither waits for a receive that comes later.
        """
        transport, program = self._transport, self._program
        if transport is None or index not in self._reader:
            return run
        values, take, finish = self._space.values, transport.take, transport.finish
        arriving = self._reader[index]
        recvs = program.recv_of[arriving].tolist()
        pairs = [
            (program.message_at(message), program.writes[recv][0])
            for message, recv in zip(arriving, recvs)
        ]
        sent = [
            program.message_at(int(program.message[other]))
            for recv in recvs
            for other in program.posted_with(recv)
            if program.action[other] == Action.SEND
        ]

        def take_and_run() -> None:
            for message, write in pairs:
                values[write] = take(message)
            for message in sent:
                finish(message)
            run()

        return take_and_run

    def taking_outputs(self, index: int, run: Run) -> Run:
        """As `taking`, where there are only forwards: what these read, and no more."""
        transport, values = self._transport, self._space.values
        if transport is None or index not in self._reader:
            return run
        messages = map(self._program.message_at, self._reader[index])
        pairs = [
            (message, self._program.writes[message.recv][0])
            for message in messages
            if message.kind == MessageKind.ACTIVATION
        ]

        def take_and_run() -> None:
            for message, write in pairs:
                values[write] = transport.take(message)
            run()

        return take_and_run


def readers(program: Program) -> dict[int, list[int]]:
    """Of each instruction, the messages of which it is the first reader."""
    written = {
        program.writes[recv][0]: i for i, recv in enumerate(program.recv_of.tolist())
    }
    result: dict[int, list[int]] = {}
    for index, reads in enumerate(program.reads.to_lists()):
        for buffer in reads:
            message = written.pop(buffer, None)
            if message is not None:
                result.setdefault(index, []).append(message)
    return result
