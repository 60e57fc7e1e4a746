"""What holds for every program, in whatever order it runs: its form.

Each buffer has a slot, and belongs to a device; each instruction stands on a stream
that is for what it does. `matching` says the same of messages.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deadlock import named
from pipeproof.sched.findings import Finding
from pipeproof.sched.instructions import Action, BufferKind, StreamKind
from pipeproof.sched.program import Program

STREAMS_OF = {
    Action.COMPUTE: (StreamKind.COMPUTE,),
    Action.LOCAL: (StreamKind.COMPUTE,),
    Action.COPY: (
        StreamKind.TO_HOST,
        StreamKind.FROM_HOST,
        StreamKind.TO_DEVICE,
        StreamKind.FROM_DEVICE,
    ),
    Action.REDUCE: (StreamKind.REDUCE,),
    Action.TIE: (StreamKind.REDUCE,),
}
"""For each action but SEND and RECV, which `matching` judges, what may carry it."""


def illegal(program: Program) -> tuple[Finding, ...]:
    """All that breaks the form."""
    if rings := tuple(_rings(program)):
        return rings  # without a first buffer there is no slot to judge
    return (*_shared(program), *_misplaced(program), *_elsewhere(program))


def slots(program: Program) -> NDArray[np.int64]:
    """For each buffer the first one of those that share its slot."""
    before = program.buffers[:, 5].astype(np.int64)
    root = np.where(before < 0, np.arange(len(before)), before)
    for _ in range(max(1, len(root).bit_length())):  # each doubles the steps taken
        root = root[root]
    return root


def _rings(program: Program) -> Iterator[Finding]:
    """Buffers that take over each other's slot in a ring, which has no first."""
    before = program.buffers[:, 5]
    for number in np.flatnonzero(before[slots(program)] >= 0).tolist():
        yield _of_slot(
            program,
            number,
            "slots that one buffer is the first in",
            "takes over from itself",
            "Let takes_over name a buffer that was there before",
        )


def _shared(program: Program) -> Iterator[Finding]:
    """Buffers in a slot of another device, or of a gradient or a tie's sum.

    These are added to from step to step, and what else lies there spoils them.
    """
    slot, kind, device = slots(program), program.buffers[:, 0], program.buffers[:, 1]
    for number in np.flatnonzero(device[slot] != device).tolist():
        yield _of_slot(
            program,
            number,
            "slots of one device",
            f"takes over a slot of device {device[slot[number]]}",
            "Let takes_over name a buffer of the same device",
        )
    sums = np.flatnonzero(np.isin(kind, (BufferKind.GRADIENT, BufferKind.TIED)))
    times = np.bincount(slot, minlength=len(slot))[slot[sums]]
    for number in sums[times > 1].tolist():
        yield _of_slot(
            program,
            number,
            "a slot of its own for each accumulated gradient and each tie's sum",
            "shares its slot",
            "Let nothing take over from it, and it from nothing",
        )


def _of_slot(
    program: Program, buffer: int, expected: str, found: str, remedy: str
) -> Finding:
    it = program.buffer_at(buffer)
    found = f"{it} {found}"
    return Finding("slot", it.device, None, None, expected, found, remedy)


def _misplaced(program: Program) -> Iterator[Finding]:
    """Instructions on a stream that is not for what they do."""
    kinds = np.array([stream.kind for stream in program.streams], dtype=np.int8)
    for action, right in STREAMS_OF.items():
        members = np.flatnonzero(program.action == action)
        wrong = ~np.isin(kinds[program.stream[members]], right)
        for index in members[wrong].tolist():
            names = " or ".join(kind.name.lower().replace("_", " ") for kind in right)
            yield Finding(
                "stream",
                int(program.device[index]),
                None,
                None,
                expected=f"a {action.name} on a stream {names!r}",
                found=f"{named(program, index)} is on another",
                remedy="Move it to the stream of its device that is for it",
            )


def _elsewhere(program: Program) -> Iterator[Finding]:
    """Buffers used from another device than theirs, but for what is offloaded there."""
    for touched in (program.reads, program.writes, program.frees):
        rows = program.buffers[touched.values]
        wrong = rows[:, 1] != program.device[touched.owner]
        wrong &= rows[:, 0] != BufferKind.OFFLOADED
        for use in np.flatnonzero(wrong).tolist():
            index = int(touched.owner[use])
            buffer = program.buffer_at(int(touched.values[use]))
            yield Finding(
                "place",
                int(program.device[index]),
                None,
                None,
                expected="buffers of the device that uses them",
                found=f"{named(program, index)} uses {buffer} of device "
                f"{buffer.device}",
                remedy="Send the tensor over, or name a buffer of this device",
            )
