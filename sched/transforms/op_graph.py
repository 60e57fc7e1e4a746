"""The ops of a schedule as a graph, with what each takes, holds and lets go of."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from pipeproof.sched.deps import OpTable, csr, order
from pipeproof.sched.exact import Number
from pipeproof.sched.ir import STAGE_KINDS, Kind, Schedule

COPIES = (Kind.OFFLOAD, Kind.RELOAD)


@dataclass(frozen=True)
class Graph:
    """Ops and overlap groups as nodes, what they wait for, and what they hold.

    Attributes:
        schedule: whose.
        first_op: of each node, and one behind the last.
        device, time: of each node.
        following: for each node, those that wait for it, with the latency.
        waits: for each node, how many it waits for.
        level: tick in the order that is given.
        tail: least time from a node's start to the end of all.
        holds, frees: activations that a node brings, and lets go of.
        copies: whether a node is an OFFLOAD or a RELOAD.
        turn: the place of a node's micro-batch in the one order of admission.
        per_turn: (device, turn) → all that this micro-batch brings there.
    """

    schedule: Schedule
    first_op: list[int]
    device: list[int]
    time: list[Any]
    following: list[list[tuple[int, Any]]]
    waits: list[int]
    level: list[int]
    tail: list[Any]
    holds: list[Fraction]
    frees: list[Fraction]
    copies: list[bool]
    turn: list[int]
    per_turn: dict[tuple[int, int], Fraction]

    @classmethod
    def of(cls, schedule: Schedule, durations: list[Number], latency: Number) -> Graph:
        """The graph of a clean schedule.

        Args:
            schedule: of which ops.
            durations: of each op; a joint one whole on its group's first.
            latency: from the end of an op to its tensor on another device.
        """
        table = OpTable.of(schedule)
        base = order(schedule, table)
        first = [*base.first_op.tolist(), len(schedule)]
        size = len(first) - 1
        device = schedule.device_of_op[base.first_op].tolist()
        time = [sum(durations[a:b]) for a, b in pairwise(first)]
        copies = np.isin(schedule.ops.kind[base.first_op], COPIES).tolist()
        # A copy keeps no op from running: what needs it waits, its device does not.
        behind = [t if copy else 0 for t, copy in zip(time, copies)]
        time = [0 if copy else t for t, copy in zip(time, copies)]
        node = schedule.node_of_op
        before, after = (node[ends] for ends in table.dependencies)
        apart = before != after
        before, after = before[apart], after[apart]
        offsets, values = csr(size, before, after)
        grouped = np.split(values, offsets[1:-1]) if size else []
        following = [
            [
                (n, behind[i] + (0 if device[n] == device[i] else latency))
                for n in row.tolist()
            ]
            for i, row in enumerate(grouped)
        ]
        tail: list[Any] = list(time)
        # Whoever waits has a higher level, so from the highest down.
        for i in np.argsort(-base.level, kind="stable").tolist():
            rest = [tail[n] + late for n, late in following[i]]
            tail[i] = time[i] + max(rest, default=0)
        result = cls(
            schedule,
            first,
            device,
            time,
            following,
            np.bincount(after, minlength=size).tolist(),
            base.level.tolist(),
            tail,
            [Fraction(0)] * size,
            [Fraction(0)] * size,
            copies,
            [0] * size,
            {},
        )
        result._weigh(table, free_copies=not any(behind))
        return result

    def _weigh(self, table: OpTable, *, free_copies: bool) -> None:
        schedule, ops = self.schedule, self.schedule.ops
        freeing = {Kind.B, Kind.W} | ({Kind.OFFLOAD} if free_copies else set())
        shares = schedule.placement.shares()
        again = table.get(Kind.R)
        turns = _turns(schedule)
        for node, (start, end) in enumerate(pairwise(self.first_op)):
            for op in ops[start:end]:
                if op.kind in STAGE_KINDS:
                    continue
                turn = turns[op.micro_batch]
                share = shares[schedule.pipe_of[op.micro_batch]][op.stage]
                part = Fraction(1, share * schedule.slices)
                if not self.holds[node]:
                    self.turn[node] = turn
                where = op.micro_batch, op.slice, op.stage
                if op.kind == Kind.R or (op.kind == Kind.F and again[where] < 0):
                    self.holds[node] += part
                    key = self.device[node], turn
                    self.per_turn[key] = self.per_turn.get(key, Fraction(0)) + part
                elif op.kind in freeing:
                    self.frees[node] += part
                elif op.kind == Kind.RELOAD and free_copies:
                    self.holds[node] += part

    def span(self, node: int) -> slice:
        """The ops of a node."""
        return slice(self.first_op[node], self.first_op[node + 1])

    @property
    def least(self) -> Fraction:
        """What a single micro-batch brings to any device at most."""
        return max(self.per_turn.values(), default=Fraction(0))

    def keeps(self, rows: list[list[int]], cap: Number) -> bool:
        """Whether no device ever holds more than the cap."""
        for row in rows:
            live = Fraction(0)
            for node in row:
                live += self.holds[node]
                if live > cap:
                    return False
                live -= self.frees[node]
        return True


def _turns(schedule: Schedule) -> list[int]:
    """Micro-batches in one order: by their place in their pipe, pipes in turn."""
    seen = [0] * len(schedule.placement.pipes)
    keys = []
    for pipe in schedule.pipe_of.tolist():
        keys.append((seen[pipe], pipe))
        seen[pipe] += 1
    place = {key: turn for turn, key in enumerate(sorted(keys))}
    return [place[key] for key in keys]
