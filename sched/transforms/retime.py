"""The same ops in an order that suits their times: list scheduling.

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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from pipeproof.sched.deps import OpTable, csr, order
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.ir import BESIDE_KINDS, STAGE_KINDS, Kind, Schedule
from pipeproof.sched.lower import lower
from pipeproof.sched.program import LOWERED, Action

PerStage = Number | Sequence[Number]


def retime(
    schedule: Schedule,
    times: Mapping[Kind, PerStage],
    *,
    overlap: PerStage | None = None,
    activations: Number | None = None,
    link_latency: Number = 0,
) -> Schedule:
    """The same ops on the same devices, ordered for these times.

    Without a cap the result never takes longer than the schedule that is given,
    which is kept where no other order is faster; so too under a cap that it
    keeps itself. Deterministic. A heuristic: a faster order may exist.

    Args:
        schedule: of one step. Overlap groups stay together.
        times: for each kind, the time of one op, or one per stage. Unlike in
            `Cost`, a number is that of a stage, not of a device's whole share,
            and of a slice. B defaults to I + W, R to F; REDUCE, OFFLOAD and RELOAD
            to 0.
        overlap: joint time of a group F&B (or F&I&W), by F's stage; default, and of
            any other group, the sum of its ops' times.
        activations: at most so many live activations on each device at any time,
            in micro-batches of its share; counted as `peak_activations` does,
            from the start of F (or R) to the end of B, or of W. What is offloaded
            does not count while it is away; it counts as if it stayed where copies
            take time.
        link_latency: from the end of an op to its tensor on another device.

    Raises:
        ParameterError: a time that is missing, negative or not finite, a cap that
            no order found here keeps, or one where devices OFFLOAD to each other.
        ScheduleError: `check` has findings.
        UnsupportedError: ops that are not lowered yet.
    """
    _number("link_latency", link_latency)
    if activations is not None:
        _number("activations", activations)
        if schedule.offloads_to_devices:
            raise ParameterError(
                f"{schedule.summary}: a cap on activations is for what a device keeps "
                "of its own or OFFLOADs to the host, but here devices keep each other's"
            )
    lower(schedule)  # refuses what cannot be timed
    durations = _durations(schedule, times, overlap)
    graph = _Graph.of(schedule, durations, link_latency)
    best: Schedule | None = None
    best_time: Number = 0
    seen: set[str] = set()
    for rows in _orders(graph, activations):
        candidate = schedule.with_rows(
            [[schedule.ops[graph.span(node)] for node in row] for row in rows]
        )
        if candidate.digest not in seen:
            seen.add(candidate.digest)
            durations = _durations(candidate, times, overlap)
            time = _makespan(candidate, durations, link_latency)
            if best is None or time < best_time:
                best, best_time = candidate, time
    if best is None:
        raise ParameterError(
            f"{schedule.summary}: found no order with at most {activations} live "
            "activations on each device; one micro-batch alone brings "
            f"{plain(graph.least)}"
        )
    return best


def _number(name: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < math.inf:  # type: ignore[operator]
        raise ParameterError(
            f"{name} must be a finite number of at least 0, got {value!r}"
        )


def _durations(
    schedule: Schedule, times: Mapping[Kind, PerStage], overlap: PerStage | None
) -> list[Number]:
    """The time of each op; a joint one whole on its group's first."""
    if unknown := [key for key in times if not isinstance(key, Kind)]:
        raise ParameterError(
            f"times has keys of Kind, such as Kind.F, got {unknown[0]!r}"
        )
    by_stage: dict[Kind, list[Number]] = {}
    for kind, value in times.items():
        by_stage[kind] = _per_stage(f"times[{kind.name}]", value, schedule.stages)
    if Kind.I in by_stage and Kind.W in by_stage:
        both = zip(by_stage[Kind.I], by_stage[Kind.W])
        by_stage.setdefault(Kind.B, [plain(i + w) for i, w in both])
    if Kind.F in by_stage:
        by_stage.setdefault(Kind.R, by_stage[Kind.F])
    for kind in BESIDE_KINDS:
        by_stage.setdefault(kind, [0] * schedule.stages)
    for kind in sorted(LOWERED - by_stage.keys()):
        if schedule.has(kind):
            raise ParameterError(f"times lacks {kind.name}, of which there are ops")
    pairs = zip(schedule.ops.kind.tolist(), schedule.ops.stage.tolist())
    result = [by_stage[Kind(kind)][stage] for kind, stage in pairs]
    if overlap is not None:
        joint = _per_stage("overlap", overlap, schedule.stages)
        for members, stage in _pairs(schedule):
            for op in members:
                result[op] = 0
            result[members.start] = joint[stage]
    return result


def _per_stage(name: str, value: PerStage, stages: int) -> list[Number]:
    given = [value] * stages if is_number(value) else list(value)  # type: ignore[arg-type]
    if len(given) != stages:
        raise ParameterError(
            f"{name} has {len(given)} numbers for {stages} stages: give one number, or "
            "one per stage"
        )
    for number in given:
        _number(name, number)
    return [plain(number) for number in given]


def _pairs(schedule: Schedule) -> Iterator[tuple[range, int]]:
    """Each group F&B or F&I&W, with the stage of its F."""
    ops = schedule.ops
    first = np.flatnonzero(~ops.joined)
    for start, end in pairwise([*first.tolist(), len(ops)]):
        kinds = ops.kind[start:end].tolist()
        if sorted(kinds) in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]):
            yield range(start, end), int(ops.stage[start + kinds.index(Kind.F)])


def _makespan(
    schedule: Schedule, durations: list[Number], link_latency: Number
) -> Number:
    """When the last instruction of the program ends."""
    program = lower(schedule)
    ends: list[Any] = [0] * len(program)
    stream_free: list[Any] = [0] * len(program.streams)
    waits, first = program.waits_for.to_lists(), program.first_op.tolist()
    count, action = program.op_count.tolist(), program.action.tolist()
    send_of, kinds = program.send_of.tolist(), schedule.ops.kind
    stream, message = program.stream.tolist(), program.message.tolist()
    reducers = Counter(schedule.ops.stage[kinds == Kind.REDUCE].tolist())
    meeting: dict[int, list[int]] = defaultdict(list)
    for i in range(len(program)):  # each comes after all that it waits for
        start = max([stream_free[stream[i]], *(ends[before] for before in waits[i])])
        if action[i] == Action.RECV:
            start = max(start, ends[send_of[message[i]]] + link_latency)
        ends[i] = start + sum(durations[first[i] : first[i] + count[i]])
        stream_free[stream[i]] = ends[i]
        if action[i] == Action.REDUCE:  # starts on all its devices at once
            stage = int(schedule.ops.stage[first[i]])
            meeting[stage].append(i)
            if len(meeting[stage]) == reducers[stage]:
                last = max(ends[j] for j in meeting[stage])
                for j in meeting[stage]:
                    ends[j] = stream_free[stream[j]] = last
    latest: Number = max(ends, default=0)
    return latest


@dataclass(frozen=True)
class _Graph:
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
    def of(cls, schedule: Schedule, durations: list[Number], latency: Number) -> _Graph:
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


Urgency = Callable[[int], tuple[Any, ...]]
"""Of a node; the least is the most urgent."""

COPIES = (Kind.OFFLOAD, Kind.RELOAD)
_CLASS = {Kind.OFFLOAD: 0, Kind.B: 0, Kind.I: 0, Kind.R: 1, Kind.RELOAD: 1, Kind.F: 2}


def _orders(graph: _Graph, cap: Number | None) -> Iterator[list[list[int]]]:
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
        graph: _Graph,
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
