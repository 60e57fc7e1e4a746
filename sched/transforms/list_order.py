"""List scheduling: orders of the same ops, by what is urgent.

Time runs; whenever a device is idle, the most urgent of its ops that can start
does. What is urgent is a rule, and no rule is the best for all schedules, so
several are tried and the order that ends first is taken:

* `as before`: by the place in the schedule that is given, so that an op that
  cannot start yet lets later ones pass;
* `longest way`: by the time that an op's successors take at least;
* `backward first`: gradients, then forwards, oldest micro-batch first, and weight
  gradients when there is nothing else, as 1F1B and the zero-bubble schedules do.

Under a cap on activations, an op that brings some may start only while they fit.
That alone can lock up: on a device with several stages, forwards of the early
ones can fill the cap that the late ones need. So every rule is tried a second
time with *admission*: a device takes micro-batches in one order, the same on all
devices, each only when all that the micro-batch will ever bring to the device
fits. The oldest micro-batch under way can then always go on, and the cap is
never what all wait for. And each is tried with *making room*: what lets go of
activations goes first while others wait for it, as ZB-H1 does with its W.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from pipeproof.sched.exact import Number
from pipeproof.sched.ir import Kind
from pipeproof.sched.transforms.op_graph import Graph

Urgency = Callable[[int], tuple[Any, ...]]
"""Of a node; the least is the most urgent."""

_CLASS = {Kind.OFFLOAD: 0, Kind.B: 0, Kind.I: 0, Kind.R: 1, Kind.RELOAD: 1, Kind.F: 2}


def orders(graph: Graph, cap: Number | None) -> Iterator[list[list[int]]]:
    """The order that is given, and every rule's: those that keep the cap."""
    given: list[list[int]] = [[] for _ in range(graph.schedule.devices)]
    for node, device in enumerate(graph.device):  # in the order of the rows
        given[device].append(node)
    if cap is None or graph.keeps(given, cap):
        yield given
    ops = graph.schedule.ops
    kinds = [Kind(kind) for kind in ops.kind.tolist()]
    stage = ops.stage.tolist()

    def backward_first(node: int) -> tuple[Any, ...]:
        first = graph.first_op[node]
        return _CLASS.get(kinds[first], 3), graph.turn[node], -stage[first]

    rules: list[Urgency] = [
        lambda node: (graph.level[node],),
        lambda node: (-graph.tail[node],),
        backward_first,
    ]
    manners = [(False, False)]
    if cap is not None:
        manners += [(False, True), (True, False), (True, True)]
    for admission, make_room in manners:
        for rule in rules:
            rows = _Run(graph, rule, cap, admission, make_room).rows()
            if rows is not None and (cap is None or graph.keeps(rows, cap)):
                yield rows


class _Run:
    """One pass of list scheduling.

    A device's ready nodes wait in three heaps: those that bring activations for
    which there must be room, those that only let go of some, and all others.
    """

    def __init__(
        self,
        graph: Graph,
        rule: Urgency,
        cap: Number | None,
        admission: bool,
        make_room: bool,
    ) -> None:
        self._graph = graph
        self._cap = math.inf if cap is None else cap
        self._admission = admission
        self._make_room = make_room
        devices = graph.schedule.devices
        size = len(graph.device)
        self._urgency = [(*rule(node), node) for node in range(size)]
        self._rows: list[list[int]] = [[] for _ in range(devices)]
        self._busy = [False] * devices
        self._held = [Fraction(0)] * devices
        self._other: list[list[tuple[Any, ...]]] = [[] for _ in range(devices)]
        self._let_go: list[list[tuple[Any, ...]]] = [[] for _ in range(devices)]
        self._bring: list[list[tuple[Any, ...]]] = [[] for _ in range(devices)]
        self._waits = list(graph.waits)
        self._queue: list[list[int]] = [[] for _ in range(devices)]
        for device, turn in sorted(graph.per_turn, reverse=True):
            self._queue[device].append(turn)
        self._admitted: list[set[int]] = [set() for _ in range(devices)]

    def rows(self) -> list[list[int]] | None:
        """The nodes of each device in order; None if all wait for the cap."""
        events: list[tuple[Any, int, int]] = []  # time, 0 arrived or 1 done, node
        size = len(self._waits)
        for node in range(size):
            if not self._waits[node]:
                self._push(node)
        now: Any = 0
        while True:
            for device in range(len(self._rows)):
                while not self._busy[device]:
                    started = self._pick(device)
                    if started is None:
                        break
                    self._begin(started)
                    end = now + self._graph.time[started]
                    heapq.heappush(events, (end, 1, started))
            if not events:
                break
            now = events[0][0]
            while events and events[0][0] == now:
                _, done, node = heapq.heappop(events)
                if not done:
                    self._arrived(node)
                    continue
                self._end(node)
                for following, late in self._graph.following[node]:
                    if late:
                        heapq.heappush(events, (now + late, 0, following))
                    else:
                        self._arrived(following)
        complete = sum(map(len, self._rows)) == size
        return self._rows if complete else None

    def _arrived(self, node: int) -> None:
        self._waits[node] -= 1
        if not self._waits[node]:
            self._push(node)

    def _push(self, node: int) -> None:
        graph = self._graph
        device, urgency = graph.device[node], self._urgency[node]
        if graph.holds[node] and self._cap != math.inf:
            turn = (graph.turn[node],) if self._admission else ()
            heapq.heappush(self._bring[device], (*turn, *urgency))
        elif graph.frees[node]:
            heapq.heappush(self._let_go[device], urgency)
        else:
            heapq.heappush(self._other[device], urgency)

    def _pick(self, device: int) -> int | None:
        """The most urgent node that may start, taken off its heap."""
        bring, let_go = self._bring[device], self._let_go[device]
        heaps = [heap for heap in (let_go, self._other[device]) if heap]
        if bring:
            if self._fits(device, bring[0][-1]):
                heaps.append(bring)
            elif self._make_room and let_go:
                heaps = [let_go]
        if not heaps:
            return None
        best = min(heaps, key=lambda heap: self._urgency[heap[0][-1]])
        node: int = heapq.heappop(best)[-1]
        return node

    def _fits(self, device: int, node: int) -> bool:
        graph = self._graph
        if not self._admission:
            return self._held[device] + graph.holds[node] <= self._cap
        turn = graph.turn[node]
        if turn in self._admitted[device]:
            return True
        room = self._held[device] + graph.per_turn[device, turn] <= self._cap
        return room and self._queue[device][-1] == turn

    def _begin(self, node: int) -> None:
        graph, device = self._graph, self._graph.device[node]
        self._busy[device] = True
        self._rows[device].append(node)
        if not graph.holds[node]:
            return
        if not self._admission:
            self._held[device] += graph.holds[node]
        elif graph.turn[node] not in self._admitted[device]:
            turn = self._queue[device].pop()
            self._admitted[device].add(turn)
            self._held[device] += graph.per_turn[device, turn]

    def _end(self, node: int) -> None:
        device = self._graph.device[node]
        self._busy[device] = False
        if not (self._admission and self._graph.copies[node]):  # its room stays its own
            self._held[device] -= self._graph.frees[node]
