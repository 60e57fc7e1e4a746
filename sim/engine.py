"""The discrete-event simulation of a program, on SimPy.

An instruction starts when its last condition is met: the one before it on its
stream is done, so is all it waits for, and a send is admitted by the transport's
buffers. Only what takes time becomes a SimPy event; what takes none ends at once.

Times come from SimPy's clock alone, which only ever adds a duration to the time
at which the last condition was met: every end is max(ready times) + duration,
never a difference of two readings. So the engine works in any number type, and
ints stay exact. Only transfers that share a link with others are an exception: see
`pipeproof.sim.fair`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program
from pipeproof.sched.deps import csr
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.exact import Number
from pipeproof.sched.groups import Edges
from pipeproof.sched.lists import Lists
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.fair import FairLinks
from pipeproof.sim.timing import Timing
from pipeproof.sim.topology import Sharing
from pipeproof.sim.waits import (
    admitted_by_start,
    in_program,
    not_in_program,
    others_in_turn,
)

if TYPE_CHECKING:
    import simpy


class DeadlockError(PipeproofError):
    """A simulated program in which nothing can go on."""


Progress = Callable[[int, int], None]
"""Told how many of how many events are over."""

REPORT_EVERY = 20_000
"""Events between two such calls."""


def play(
    program: Program,
    timing: Timing,
    cluster: Cluster,
    progress: Progress | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Start and end of each instruction, in the timing's unit and number type.

    Where transfers share links, exact times may be parts of that unit: objects.

    Args:
        program: what to play.
        timing: durations and latencies.
        cluster: buffering, shared links, and which streams are one.
        progress: called now and then while it plays.

    Raises:
        DeadlockError: naming the instructions that wait for each other.
    """
    engine = _Engine(program, timing, cluster)
    engine.run(progress)
    dtype = object if engine.shares and timing.scale else timing.times.dtype
    return np.array(engine.start, dtype=dtype), np.array(engine.end, dtype=dtype)


class _Engine:
    def __init__(self, program: Program, timing: Timing, cluster: Cluster) -> None:
        import simpy  # only here: most programs are replayed

        size = len(program)
        self.start: list[Any] = [None] * size
        self.end: list[Any] = [None] * size
        self._program = program
        self._env = simpy.Environment(initial_time=0)
        self._durations: list[Number] = timing.durations.tolist()
        self._after_end = _edges(program, cluster)
        self._after_start = admitted_by_start(program, cluster)
        self._next = _grouped(size, self._after_end)
        self._next_of_start = dict(zip(*map(np.ndarray.tolist, self._after_start)))
        conditions = np.bincount(self._after_end[1], minlength=size)
        conditions += np.bincount(self._after_start[1], minlength=size)
        self._conditions: list[int] = conditions.tolist()
        # A receive ends when it is posted and its message is there.
        self._halves = dict.fromkeys(_where(program, Action.RECV).tolist(), 2)
        sends = _where(program, Action.SEND)
        messages = program.message[sends]
        recvs = program.recv_of[messages]
        self._recv_of = dict(zip(sends.tolist(), recvs.tolist()))
        under_way = timing.latencies[messages].tolist()
        self._latency: dict[int, Number] = dict(zip(sends.tolist(), under_way))
        sharing = Sharing.of(program, cluster)
        self._routes = {
            index: route
            for stream, route in sharing.routes.items()
            for index in program.by_stream[stream].tolist()
        }
        bandwidths = sharing.bandwidths
        if timing.scale is None:
            bandwidths = list(map(float, bandwidths))
        self._links = FairLinks(self._env, bandwidths, self._transferred)

    @property
    def shares(self) -> bool:
        """Whether any transfers share a link."""
        return bool(self._routes)

    def run(self, progress: Progress | None) -> None:
        ended: list[int] = []
        for index in [i for i, left in enumerate(self._conditions) if left == 0]:
            self._go(index, ended)
        self._settle(ended)
        if progress is None:
            self._env.run()
        else:
            self._run_watched(progress)
        if None in self.end:
            raise DeadlockError(self._explain())

    def _run_watched(self, progress: Progress) -> None:
        total = sum(1 for duration in self._durations if duration)
        total += sum(1 for latency in self._latency.values() if latency)
        for done in count():
            if self._env.peek() == math.inf:
                progress(total, total)
                return
            if done % REPORT_EVERY == 0:
                progress(min(done, total), total)  # shared links have more
            self._env.step()

    def _begin(self, index: int) -> bool:
        """Start an instruction; True if it ends at once."""
        self.start[index] = self._env.now
        if index in self._halves:
            return self._half(index)
        duration = self._durations[index]
        if not duration:
            return True
        if index in self._routes:
            self._links.begin(index, self._routes[index], duration)
        else:
            self._in(duration, self._over, index)
        return False

    def _in(
        self, delay: Any, callback: Callable[[simpy.Event], None], index: int
    ) -> None:
        event = self._env.timeout(delay, index)
        assert event.callbacks is not None  # it has not happened yet
        event.callbacks.append(callback)

    def _half(self, recv: int) -> bool:
        self._halves[recv] -= 1
        return self._halves[recv] == 0

    def _transferred(self, index: int) -> None:
        self._settle([index])

    def _over(self, event: simpy.Event) -> None:
        self._settle([cast(int, event.value)])

    def _arrived(self, event: simpy.Event) -> None:
        recv = cast(int, event.value)
        if self._half(recv):
            self._settle([recv])

    def _settle(self, ended: list[int]) -> None:
        """End these, and whatever then starts and takes no time."""
        now, end, conditions = self._env.now, self.end, self._conditions
        while ended:
            index = ended.pop()
            end[index] = now
            if index in self._recv_of and self._depart(index):
                ended.append(self._recv_of[index])
            for following in self._next[index]:
                conditions[following] -= 1
                if conditions[following] == 0:
                    self._go(following, ended)
        if self._routes:
            self._links.share()

    def _depart(self, send: int) -> bool:
        """The message is off; True if its receive ends at once."""
        recv, latency = self._recv_of[send], self._latency[send]
        if not latency:
            return self._half(recv)
        self._in(latency, self._arrived, recv)
        return False

    def _go(self, index: int, ended: list[int]) -> None:
        """Start an instruction, and the send that a receive admits by that."""
        if self._begin(index):
            ended.append(index)
        send = self._next_of_start.get(index)
        if send is not None:
            self._conditions[send] -= 1
            if self._conditions[send] == 0 and self._begin(send):
                ended.append(send)

    def _explain(self) -> str:
        """Which instructions wait for which, along one cycle."""
        import networkx as nx

        left = {i for i, end in enumerate(self.end) if end is None}
        graph = nx.DiGraph()
        for before, after in (self._after_end, self._after_start):
            pairs = zip(after.tolist(), before.tolist())
            graph.add_edges_from((a, b) for a, b in pairs if a in left and b in left)
        graph.add_edges_from(
            (recv, send) for send, recv in self._recv_of.items() if send in left
        )
        ring = [edge[0] for edge in nx.find_cycle(graph)]
        names = [
            f"{self._program.label(i)} (device {self._program.device[i]})"
            for i in [*ring, ring[0]]
        ]
        return (
            f"{self._program.schedule.summary}: deadlock, {len(left):,} instructions "
            f"never run: {' waits for '.join(names)}"
        )


def _where(program: Program, action: Action) -> NDArray[np.int64]:
    return np.flatnonzero(program.action == action)


def _edges(program: Program, cluster: Cluster) -> Edges:
    """Which instruction must end before which may start."""
    waits = in_program(program, cluster)
    some = (
        others_in_turn(program, cluster),
        (waits.values.astype(np.int64), waits.owner),
        not_in_program(program, cluster),
    )
    before, after = map(np.concatenate, zip(*some))
    return before, after


def _grouped(count: int, edges: Edges) -> list[list[int]]:
    before, after = edges
    return Lists(*csr(count, before, after)).to_lists()
