"""Whether the streams of a device can get in each other's way over a buffer.

A buffer is in use from the start of an instruction that touches it to its end; one
that only frees it does so at its end. Two uses of one slot, of which one writes or
frees it, must come one after the other in every order that streams, waits and
messages allow; otherwise which content is read depends on luck, and no walk in one
order says what the others compute.

For each slot its uses stand in the order of one walk. If each write is ordered
with the uses next to it, up to the writes on both sides, then all are ordered: so
the pairs to look at are no more than twice the uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deadlock import Waiting, named
from pipeproof.sched.findings import Finding
from pipeproof.sched.groups import needs
from pipeproof.sched.kernels import csr, run
from pipeproof.sched.legal import slots
from pipeproof.sched.program import Program

Index = NDArray[np.int64]

BITS = 62
"""Searches done in one pass over the graph, one bit of an int64 each."""


def races(
    program: Program, waiting: Waiting, level: Index, order: Index
) -> tuple[Finding, ...]:
    """Uses of one slot that may overlap.

    Args:
        program: one without deadlock.
        waiting: what holds under every buffering.
        level: of each of its nodes.
        order: the instructions in one order that it allows.
    """
    first, second, slot = _neighbours(program, order)
    apart = program.stream[first] != program.stream[second]
    first, second, slot = first[apart], second[apart], slot[apart]
    unsure = ~_ordered_on_device(program, order, first, second)
    if not unsure.any():
        return ()
    first, second, slot = first[unsure], second[unsure], slot[unsure]
    sources, targets = csr(waiting.nodes, waiting.before, waiting.after)
    by_level = np.argsort(level, kind="stable")
    for low in range(0, len(first), BITS):
        part = slice(low, low + BITS)
        start, goal = (
            waiting.done[first[part]],
            _from(program, waiting, second[part], slot[part]),
        )
        reached = _reached(by_level, sources, targets, start)[goal]
        wrong = (reached >> np.arange(len(goal))) & 1 == 0
        if wrong.any():
            pairs = zip(first[part][wrong], second[part][wrong], slot[part][wrong])
            return tuple(_race(program, *map(int, pair)) for pair in pairs)
    return ()


def _from(program: Program, waiting: Waiting, users: Index, slot: Index) -> Index:
    """The node from which on each uses a slot: its start, or its end if it frees."""
    slot_of = slots(program)
    uses = zip(users.tolist(), slot.tolist())
    only_frees = np.array(
        [
            not any(
                slot_of[buffer] == where
                for buffer in (*program.reads[user], *program.writes[user])
            )
            for user, where in uses
        ],
        dtype=np.bool_,
    )
    return np.where(only_frees, waiting.done[users], users)


def _neighbours(program: Program, order: Index) -> tuple[Index, Index, Index]:
    """Pairs (instruction, later instruction, slot) that must not overlap."""
    slot_of, size = slots(program), len(program)
    place = np.empty(size, dtype=np.int64)
    place[order] = np.arange(size)
    lists = (program.reads, False), (program.writes, True), (program.frees, True)
    slot = np.concatenate([slot_of[touched.values] for touched, _ in lists])
    when = np.concatenate([place[touched.owner] for touched, _ in lists])
    writes = np.repeat(
        [write for _, write in lists], [len(touched.values) for touched, _ in lists]
    )
    # One use for each instruction and slot: its write, if it has one.
    key = (slot * size + when) * 2 + ~writes
    key.sort()
    writes, use = key % 2 == 0, key // 2
    once = np.append(True, use[1:] != use[:-1]) if len(use) else writes
    writes, use = writes[once], use[once]
    slot, who = use // size, order[use % size]
    every = np.arange(len(use))
    last = np.maximum.accumulate(np.where(writes, every, -1))
    last = np.append(-1, last[:-1])[: len(use)]
    following = np.minimum.accumulate(np.where(writes, every, len(use))[::-1])[::-1]
    following = np.append(following[1:], len(use))[: len(use)]
    behind = last >= 0
    behind[behind] = slot[last[behind]] == slot[behind]
    ahead = (following < len(use)) & ~writes
    ahead[ahead] = slot[following[ahead]] == slot[ahead]
    pairs = (
        np.concatenate([last[behind], every[ahead]]),
        np.concatenate([every[behind], following[ahead]]),
    )
    return who[pairs[0]], who[pairs[1]], slot[pairs[0]]


def _ordered_on_device(
    program: Program, order: Index, first: Index, second: Index
) -> NDArray[np.bool_]:
    """Which pairs the streams and waits of their one device order.

    Each instruction has a clock: for each stream of its device, how many of the
    stream's instructions are done before it starts. (Fidge 1988, Mattern 1989.)
    """
    size = len(program)
    device = np.array([stream.device for stream in program.streams], dtype=np.int64)
    rank = np.zeros(len(device), dtype=np.int64)
    for own in np.unique(device).tolist():
        rank[device == own] = np.arange(int((device == own).sum()))
    width = np.bincount(device, minlength=1)[program.device].astype(np.int64)
    clock_of = np.cumsum(width) - width
    number, before = np.zeros(size, dtype=np.int64), np.full(size, -1)
    for members in program.by_stream:
        number[members] = np.arange(1, len(members) + 1)
        before[members[1:]] = members[:-1]
    before[program.groups.values] = -1  # what they wait for is among their needs
    waits = needs(program)
    columns = [
        order,
        before,
        waits.offsets,
        waits.values,
        program.device,
        width,
        clock_of,
        rank[program.stream],
        number,
        np.zeros(int(width.sum()), dtype=np.int32),
    ]
    clock = run(_clocks, columns, results=[9], size=10 * size)[0]
    same = program.device[first] == program.device[second]
    seen = clock[np.where(same, clock_of[second] + rank[program.stream[first]], 0)]
    ordered: NDArray[np.bool_] = same & (seen >= number[first])
    return ordered


def _clocks(
    order: Any,
    before: Any,
    offsets: Any,
    waits: Any,
    device: Any,
    width: Any,
    clock_of: Any,
    rank: Any,
    number: Any,
    clock: Any,
) -> None:
    for k in range(len(order)):
        i = order[k]
        own = clock_of[i]
        for e in range(offsets[i] - 1, offsets[i + 1]):
            j = before[i] if e < offsets[i] else waits[e]
            if j < 0 or device[j] != device[i]:
                continue
            theirs = clock_of[j]
            for s in range(width[i]):
                if clock[own + s] < clock[theirs + s]:
                    clock[own + s] = clock[theirs + s]
            if clock[own + rank[j]] < number[j]:
                clock[own + rank[j]] = number[j]


def _reached(by_level: Index, offsets: Index, targets: Index, start: Index) -> Index:
    """For each node, as bits, from which of these nodes a path leads to it."""
    bits = np.zeros(len(by_level), dtype=np.int64)
    np.bitwise_or.at(bits, start, np.int64(1) << np.arange(len(start)))
    columns = [by_level, offsets, targets, bits]
    return run(_spread, columns, results=[3], size=len(targets))[0]


def _spread(by_level: Any, offsets: Any, targets: Any, bits: Any) -> None:
    for k in range(len(by_level)):
        node = by_level[k]
        if bits[node] != 0:
            for edge in range(offsets[node], offsets[node + 1]):
                bits[targets[edge]] |= bits[node]


def _race(program: Program, first: int, second: int, slot: int) -> Finding:
    used = {i: _use(program, i, slot) for i in (first, second)}
    return Finding(
        "race",
        int(program.device[second]),
        None,
        None,
        expected=f"{named(program, second)} to start after {named(program, first)} "
        "has ended",
        found=f"nothing orders {program.label(second)}, which {used[second]}, behind "
        f"{program.label(first)}, which {used[first]}, in the same slot",
        remedy=f"Let instruction {second} wait for instruction {first}",
    )


def _use(program: Program, index: int, slot: int) -> str:
    """How an instruction uses a slot, in words."""
    slot_of, instruction = slots(program), program[index]
    verbs = ("writes", instruction.writes), ("frees", instruction.frees)
    for verb, buffers in (*verbs, ("reads", instruction.reads)):
        for buffer in buffers:
            if slot_of[buffer.index] == slot:
                return f"{verb} {buffer}"
    raise AssertionError(f"instruction {index} does not use slot {slot}")
