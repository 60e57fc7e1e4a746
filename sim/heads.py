"""What must precede what, whatever the order of ops: heads, tails and lives.

A node is an op or an overlap group. Its head is the longest path of dependencies to
its start, links included; its tail the longest one from its end on.
"""

from __future__ import annotations

import heapq
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Kind, Program
from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.instructions import MessageKind
from pipeproof.sched.ir import BACKWARD_KINDS
from pipeproof.sched.kernels import levels
from pipeproof.sim.timing import Timing


class Graph:
    """Ops and groups of a program as nodes, and what must precede what.

    All times are in the timing's unit and number type.

    Attributes:
        time: per node, how long it runs.
        head, tail: longest path up to its start, and from its end on.
        computes: whether it occupies its device.
        arrives: per op, how long the tensor of the next stage, which it needs, takes
            to it.
    """

    def __init__(self, program: Program, timing: Timing) -> None:
        self.program = program
        schedule = program.schedule
        self.node = schedule.node_of_op
        first = np.flatnonzero(~schedule.ops.joined)
        self.device = schedule.device_of_op[first]
        self.table = OpTable.of(schedule)
        running = np.flatnonzero(program.first_op >= 0)
        where = self.node[program.first_op[running]]
        self.time = np.zeros(len(first), dtype=timing.times.dtype)
        self.time[where] = timing.durations[running]
        self.computes = np.zeros(len(first), dtype=np.bool_)
        self.computes[where] = program.action[running] == Action.COMPUTE
        before, after = (self.node[ends] for ends in self.table.dependencies)
        apart = before != after
        source, target, sent = self._messages(timing)
        before = np.concatenate([before[apart], self.node[source]])
        after = np.concatenate([after[apart], self.node[target]])
        lag = np.concatenate([np.zeros_like(sent, shape=int(apart.sum())), sent])
        self.arrives = np.zeros(len(schedule), dtype=self.time.dtype)
        next_to = np.abs(np.subtract(*self.program.messages.T[1:3])) == 1
        self.arrives[target[next_to]] = sent[next_to]
        level = levels(len(first), before, after)
        self.head = self._longest(before, after, lag, level)
        self.tail = self._longest(after, before, lag, -level)

    def _messages(self, timing: Timing) -> tuple[Index, Index, NDArray[Any]]:
        """Between which ops tensors cross devices, and how long they take."""
        kind, source, target, _, micro_batch, part, *_ = self.program.messages.T
        down = kind == MessageKind.ACTIVATION
        forward = self.table.get(Kind.F)
        backward = self.table.get(*BACKWARD_KINDS)
        ends = [
            np.where(
                down,
                forward[micro_batch, part, stage],
                backward[micro_batch, part, stage],
            )
            for stage in (source, target)
        ]
        lag = timing.durations[self.program.send_of] + timing.latencies
        return ends[0], ends[1], lag

    def _longest(
        self, before: Index, after: Index, lag: NDArray[Any], level: Index
    ) -> NDArray[Any]:
        """The longest path that ends where each node begins."""
        edges = np.argsort(level[before], kind="stable")
        ends = zip(before[edges].tolist(), after[edges].tolist(), lag[edges].tolist())
        time: list[Any] = self.time.tolist()
        reached: list[Any] = [0] * len(time)
        for a, b, wait in ends:
            over = reached[a] + time[a] + wait
            if over > reached[b]:
                reached[b] = over
        return np.array(reached, dtype=self.time.dtype)

    @property
    def chain(self) -> Any:
        """The longest path of all."""
        columns = (self.head, self.time, self.tail)
        return max(map(sum, zip(*(column.tolist() for column in columns))), default=0)

    def on(self, device: int) -> Index:
        """The nodes of a device."""
        return np.flatnonzero(self.device == device)

    def one_machine(self, nodes: Index) -> Any:
        """When the preemptive schedule of these ops on one device is over."""
        nodes = nodes[self.computes[nodes]]
        nodes = nodes[np.argsort(self.head[nodes], kind="stable")]
        jobs = zip(*(c[nodes].tolist() for c in (self.head, self.time, self.tail)))
        ready: list[tuple[Any, Any]] = []  # (-tail, what is left to run)
        now: Any = 0
        end: Any = 0
        for head, time, tail in jobs:
            now, end = _run(ready, now, end, head)
            heapq.heappush(ready, (-tail, time))
        return _run(ready, now, end, None)[1]

    @cached_property
    def lives(self) -> NDArray[Any]:
        """For each op with an F its longest path from there to the end of its B or I.

        From F(s, q) it goes down to F(s+1, q) and comes back from its B, or on to
        F(s, q+1) and back, or through R: the longest of these, from the last stage
        and slice on.

        Returns:
            Of shape (micro-batches, slices, stages).
        """
        forward, backward = self.table.get(Kind.F), self.table.get(*BACKWARD_KINDS)
        again = self.table.get(Kind.R)
        f, b = self._time_of(forward), self._time_of(backward)
        inner = self._time_of(again)
        result = np.zeros_like(f)
        _, slices, stages = f.shape
        for s in reversed(range(stages)):
            for q in reversed(range(slices)):
                within = inner[:, q, s]
                if s + 1 < stages:
                    down = self.arrives[forward[:, q, s + 1]]
                    up = self.arrives[backward[:, q, s]]
                    within = np.maximum(within, down + result[:, q, s + 1] + up)
                if q + 1 < slices:
                    within = np.maximum(within, result[:, q + 1, s])
                result[:, q, s] = f[:, q, s] + within + b[:, q, s]
        return result

    def _time_of(self, ops: Index) -> NDArray[Any]:
        zero = np.zeros_like(self.time[:1])
        return np.where(ops >= 0, self.time[self.node[ops]], zero)


def _run(ready: list[tuple[Any, Any]], now: Any, end: Any, until: Any) -> Any:
    """Run the longest tails first, until another op is there; None for to the end."""
    while ready and (until is None or now < until):
        tail, left = ready[0]
        if until is not None and now + left > until:
            heapq.heapreplace(ready, (tail, now + left - until))
            return until, end
        heapq.heappop(ready)
        now += left
        end = max(end, now - tail)
    return now if until is None else max(now, until), end
