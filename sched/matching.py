"""Whether the two sides of every message, and of every reduction, belong together.

Links are first in, first out and carry no labels: the k-th SEND of an ordered pair
of devices is met by its k-th RECV. Where these name different messages, tensors
arrive in the wrong place, and the gradients are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.findings import Finding
from pipeproof.sched.groups import Edges, for_all
from pipeproof.sched.instructions import Action, BufferKind, StreamKind
from pipeproof.sched.program import Program
from pipeproof.sched.ties import homes_of, meets_nobody, named


class _Side(NamedTuple):
    action: Action
    stream: StreamKind
    column: int
    other: str


SIDES = (
    _Side(Action.SEND, StreamKind.SEND, 8, "receive"),
    _Side(Action.RECV, StreamKind.RECV, 9, "send"),
)


def mismatches(program: Program) -> tuple[Finding, ...]:
    """Messages without both sides, links out of order, sums not met.

    What else asks about messages and groups asks here first.
    """
    found = misgrouped(program) or tuple(_strays(program))
    return found or (*_out_of_order(program), *_alone(program), *_untied(program))


def misgrouped(program: Program) -> tuple[Finding, ...]:
    """Groups of anything but sends and receives of one device, each in one group."""
    groups, size = program.groups, len(program)
    members = groups.values
    there = (members >= 0) & (members < size)
    legal = there & (np.bincount(members[there], minlength=size)[members * there] == 1)
    action, device = (
        column[members * there] for column in (program.action, program.device)
    )
    legal &= (action == Action.SEND) | (action == Action.RECV)
    first = np.minimum(groups.offsets[:-1], max(0, len(members) - 1))
    legal &= device == device[first[groups.owner]]
    return tuple(
        Finding(
            "posted",
            int(device[place]),
            None,
            None,
            expected="groups of sends and receives of one device, each in one group",
            found=f"instruction {int(members[place])} in group "
            f"{int(groups.owner[place])}",
            remedy="Group only what one device hands to its library at once",
        )
        for place in np.flatnonzero(~legal).tolist()
    )


def _strays(program: Program) -> Iterator[Finding]:
    """Each message is sent once and received once, on the streams of its link."""
    total = len(program.messages)
    kind = np.array([stream.kind for stream in program.streams], dtype=np.int8)
    link = np.array([stream.link or (-1, -1) for stream in program.streams])
    for side in SIDES:
        name = side.action.name.lower()
        members = np.flatnonzero(program.action == side.action)
        message, stream = program.message[members], program.stream[members]
        legal = (message >= 0) & (message < total) & (kind[stream] == side.stream)
        row = program.messages[np.where(legal, message, 0)] if total else None
        if row is not None:
            legal &= (row[:, 6:8] == link[stream].reshape(-1, 2)).all(axis=1)
            legal &= row[:, side.column] == members
        for index in members[~legal].tolist():
            where = program.streams[program.stream[index]]
            yield Finding(
                "message",
                where.device,
                None,
                None,
                expected=f"every {name} is that of one message, on its link's stream",
                found=f"instruction {index}, a {name} on the stream {str(where)!r}, "
                "is not that of the message it names",
                remedy="Name the message, and name the instruction in its row",
            )
        times = np.bincount(message[legal], minlength=total)
        for number in np.flatnonzero(times != 1).tolist():
            it = program.message_at(number)
            yield Finding(
                "message",
                it.source if side.action == Action.SEND else it.target,
                None,
                None,
                expected=f"one {name} of {it} from device {it.source} to {it.target}",
                found=f"{int(times[number])} of them",
                remedy=f"Add it, or drop the {side.other}: the other side waits for it",
            )


def _out_of_order(program: Program) -> Iterator[Finding]:
    """The k-th send on an ordered pair is the k-th receive, by identity."""
    sent, received = (_by_link(program, side) for side in SIDES)
    seen: set[tuple[int, int]] = set()
    for place in np.flatnonzero(sent != received).tolist():
        out, into = map(program.message_at, (int(sent[place]), int(received[place])))
        link = out.source, out.target
        if link in seen:
            continue  # the rest of the link is a consequence
        seen.add(link)
        ends = program.messages[sent, 6:8]
        count = 1 + place - int(np.flatnonzero((ends == link).all(axis=1))[0])
        yield Finding(
            "fifo",
            out.source,
            None,
            None,
            expected=f"message {count} that device {out.target} receives from "
            f"{out.source} is message {count} that was sent",
            found=f"{into} is received where {out} was sent",
            remedy="Post receives in the order of the sends: a link has no labels",
        )


def _by_link(program: Program, side: _Side) -> NDArray[np.int32]:
    """Messages by ordered pair of devices, and of each in the stream's order."""
    members = np.flatnonzero(program.action == side.action)
    message = program.message[members]
    ends = program.messages[message, 6:8]
    return message[np.lexsort((members, ends[:, 1], ends[:, 0]))]


def meetings(program: Program) -> list[NDArray[np.int64]]:
    """The REDUCEs and TIEs that meet, by device.

    Of each stage, and each tie, the k-th of every device. A TIE of a device that holds
    all stages of a tie, as all of its devices do, is alone.
    """
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    times: dict[tuple[int, int, int], int] = {}
    schedule, device = program.schedule, program.device_of
    ties = ties_of(program)
    alone = [meets_nobody(schedule, tie) for tie in schedule.ties]
    for index in program.sums.tolist():
        of = ties.get(index)
        apart = of is not None and 0 <= of < len(alone) and alone[of]
        if of is None:
            of = int(schedule.ops.stage[program.first_op[index]])
        what, where = int(program.action[index]), device(index)
        times[what, of, where] = nth = times.get((what, of, where), -1) + 1
        groups.setdefault((what, of, nth, where if apart else -1), []).append(index)
    return [
        np.array(sorted(group, key=device), dtype=np.int64) for group in groups.values()
    ]


def meeting(program: Program, turn: NDArray[np.int32]) -> Edges:
    """What one of a REDUCE or a TIE waits for, all of it wait for.

    Args:
        program: whose.
        turn: of each instruction, a number that those share which take turns.

    Returns:
        Which instruction must end before which may start.
    """
    pairs = _met(program, turn) if len(program.sums) else []
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return for_all(program, ends[:, 0], ends[:, 1])


def _met(program: Program, turn: NDArray[np.int32]) -> list[tuple[int, int]]:
    needs = {index: program.waits_for[index] for index in program.sums.tolist()}
    theirs = np.zeros(len(program.streams), dtype=np.bool_)
    theirs[turn[program.sums]] = True
    members = np.flatnonzero(theirs[turn])
    members = members[np.argsort(turn[members], kind="stable")]
    behind = members[1:]
    is_sum = np.isin(program.action[behind], (Action.REDUCE, Action.TIE))
    at = 1 + np.flatnonzero(is_sum & (turn[behind] == turn[members[:-1]]))
    for one, following in zip(members[at - 1].tolist(), members[at].tolist()):
        needs[following].append(one)
    return [
        (need, other)
        for group in map(np.ndarray.tolist, meetings(program))
        for one in group
        for need in needs[one]
        if need not in group  # two in one stream can only be in turn
        for other in group
        if other != one
    ]


def ties_of(program: Program) -> dict[int, int]:
    """The tie of each TIE, which is that of what it writes; -1 where that is none."""
    result = {}
    sums = program.sums
    for index in sums[program.action[sums] == Action.TIE].tolist():
        written = program.buffers[program.writes[index]]
        sums = written[written[:, 0] == BufferKind.TIED, 2].tolist()
        result[index] = sums[0] if len(sums) == len(written) == 1 else -1
    return result


def _alone(program: Program) -> Iterator[Finding]:
    """A REDUCE waits for one on every device that holds the stage."""
    pipes = program.schedule.placement.pipes
    for group in meetings(program):
        if program.action[group[0]] != Action.REDUCE:
            continue
        stage = int(program.schedule.ops.stage[program.first_op[group[0]]])
        homes = sorted({pipe[stage] for pipe in pipes})
        there = program.device[group].tolist()
        if there != homes:
            yield Finding(
                "reduce",
                there[0],
                None,
                program.schedule.ops[int(program.first_op[group[0]])],
                expected=f"the REDUCE of stage {stage} on each of devices "
                f"{', '.join(map(str, homes))}",
                found=f"it on {', '.join(map(str, there))}",
                remedy="Give each replica its REDUCE: the others wait for it",
            )


def _untied(program: Program) -> Iterator[Finding]:
    """Each device that holds a stage of a tie has the tie's TIE, and once."""
    schedule, device = program.schedule, program.device
    there: dict[int, list[int]] = {number: [] for number in range(len(schedule.ties))}
    for index, number in ties_of(program).items():
        if number in there:
            there[number].append(int(device[index]))
            continue
        yield Finding(
            "tie",
            int(device[index]),
            None,
            None,
            expected="a TIE that writes one sum, that of a tie of the schedule",
            found=f"instruction {index} writes "
            f"{', '.join(map(str, program[index].writes)) or 'nothing'}",
            remedy="Let it write the tied buffer of its device",
        )
    for number, devices in there.items():
        tie = schedule.ties[number]
        homes = list(homes_of(schedule, tie))
        if sorted(devices) != homes:
            yield Finding(
                "tie",
                homes[0],
                None,
                None,
                expected=f"the sum of tie {named(tie)} once on each of devices "
                f"{', '.join(map(str, homes))}",
                found=f"it on {', '.join(map(str, sorted(devices))) or 'none'}",
                remedy="Give each device one TIE of it: the others wait for it, and "
                "each adds the sum to the gradient",
            )
