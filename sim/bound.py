"""Makespans that no order of the same ops can beat, and why.

Placement, costs and cluster are given; the order of ops on their devices is free.
Three things take time, and each bounds the makespan M from below.

*Chain.* An op starts no earlier than its head h, the longest path of dependencies
to it, links included; and behind its end remains at least its tail t, the longest
path onward. So M ≥ h + duration + t.

*Work.* A device runs one op at a time. Take any set S of its ops: the first of them
starts no earlier than the least head in S, all must run, and behind the last one
at least the least tail in S remains:

    M ≥ min h + Σ durations + min t        for every S

The best S need not be searched for: if ops may be interrupted, running at any time
the available one with the longest tail ends at the maximum of this over all S
(Jackson's preemptive schedule; Carlier 1982, The one-machine sequencing problem,
European Journal of Operational Research 11(1), proposition 1).

*Memory.* A buffer of weight w that is born when op a starts and dies when op b ends
lives at least L, the longest path from a to b with both. While at most C is alive
on a device, the integral of what is alive over time is at most C times the time in
which anything is; and that integral is at least the sum of all w·L:

    M ≥ min h over the a + Σ w·L / C + min t over the b

Weights are often all multiples of some u: no more than u·⌊C / u⌋ is then ever
alive, and C is replaced by that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import BufferKind, Kind, Program
from pipeproof.sched.deps import Index
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number, plain, ratio
from pipeproof.sched.ir import BACKWARD_KINDS
from pipeproof.sched.memory import lifetimes
from pipeproof.sched.weights import Weights
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost
from pipeproof.sim.heads import Graph
from pipeproof.sim.timing import Timing

PerDevice = Number | Sequence[Number]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times that no makespan is below, in the cost's unit.

    Attributes:
        chain: by the longest path of dependencies.
        work: for each device, by what it has to run.
        memory: for each device, by what may be alive on it; None where that has
            no limit.
        shared: by all work together, where devices share a processor.
    """

    chain: Number
    work: tuple[Number, ...]
    memory: tuple[Number, ...] | None = None
    shared: Number = 0

    @property
    def largest(self) -> Number:
        """The one that counts."""
        return max((self.chain, *self.work, *(self.memory or ()), self.shared))

    @property
    def reason(self) -> str:
        """Which of them it is."""
        largest = self.largest
        if largest in self.work:
            return f"the work of device {self.work.index(largest)}"
        if largest == self.chain:
            return "the longest chain of dependencies"
        if self.memory is not None and largest in self.memory:
            return f"the memory of device {self.memory.index(largest)}"
        return "the work of the processor that all devices share"

    def distance(self, makespan: Number) -> Number:
        """Makespan / largest bound - 1; 0 where both are 0."""
        return ratio(makespan - self.largest, self.largest)


def lower_bound(
    program: Program, cost: Cost | None = None, cluster: Cluster | None = None
) -> Number:
    """The largest of the bounds by chain and by work; see `bounds`."""
    return bounds(program, cost, cluster).largest


def bounds(
    program: Program,
    cost: Cost | None = None,
    cluster: Cluster | None = None,
    *,
    max_activations: PerDevice | None = None,
    max_bytes: PerDevice | None = None,
) -> Bounds:
    """Bounds on the makespan of these ops on these devices, in any order.

    Time n log n in the ops, memory linear. Transfers count with the bandwidth that
    they would have to themselves.

    Args:
        program: whose ops to bound.
        cost: as in `simulate`.
        cluster: likewise.
        max_activations: of each device, in micro-batches of its share, as
            `Trace.peak_activations` counts them; one number, or one per device.
        max_bytes: of each device, as `Trace.peak_bytes` counts them.

    Raises:
        ParameterError: costs that do not fit, no number for each device, or a
            limit that not even a single buffer fits under.
    """
    cost, cluster = cost or Cost(), cluster or Cluster()
    sizes = cost.sizes(program)
    timing = Timing.of(program, cost, cluster, sizes)
    graph = Graph(program, timing)
    devices = range(program.schedule.devices)

    def unscaled(times: Sequence[Any]) -> tuple[Number, ...]:
        scale = timing.scale
        if scale is None:
            return tuple(map(float, times))
        return tuple(plain(Fraction(time) / scale) for time in times)

    memory: list[Any] = []
    if max_activations is not None:
        caps = _caps("max_activations", max_activations, program)
        weight = sizes.activations
        if isinstance(weight, Weights):
            weight = weight.column(program)
        memory.append(_by_memory(graph, weight, caps, "activations"))
    if max_bytes is not None:
        caps = _caps("max_bytes", max_bytes, program)
        for held in (sizes.resident or {}).values():
            caps = [cap - number for cap, number in zip(caps, held)]
        memory.append(_by_memory(graph, sizes.known_bytes(), caps, "bytes"))
    shared: Any = 0
    if cluster.shared_processor:
        shared = graph.one_machine(np.arange(len(graph.time)))
    return Bounds(
        unscaled([graph.chain])[0],
        unscaled([graph.one_machine(graph.on(device)) for device in devices]),
        unscaled([max(column) for column in zip(*memory)]) if memory else None,
        unscaled([shared])[0],
    )


def _caps(name: str, value: PerDevice, program: Program) -> list[Any]:
    devices = program.schedule.devices
    caps = list(value) if isinstance(value, Sequence) else [value] * devices
    if len(caps) != devices:
        raise ParameterError(
            f"{name} has {len(caps)} numbers for {devices} devices: give one number, "
            "or one per device"
        )
    for cap in caps:
        if not is_number(cap) or not 0 <= cap < math.inf:
            raise ParameterError(
                f"{name} must be a finite number of at least 0, or one per device, got "
                f"{cap!r}"
            )
    return caps


def _by_memory(
    graph: Graph, weight: NDArray[Any], caps: list[Any], what: str
) -> list[Any]:
    """For each device the bound by memory, in the timing's unit."""
    kind, device = graph.program.buffers[:, 0], graph.program.buffers[:, 1]
    counted = (kind != BufferKind.HOST) & (kind != BufferKind.GRADIENT)
    counted &= (weight != 0).astype(np.bool_)
    first, last, life = _lives(graph)
    result: list[Any] = []
    for number, cap in enumerate(caps):
        mine = np.flatnonzero(counted & (device == number))
        weights = set(weight[mine].tolist())
        if max(weights, default=0) > cap:
            raise ParameterError(
                f"device {number}: one buffer alone holds {max(weights)} {what}, and "
                f"{cap} are allowed: no order of these ops fits"
            )
        mine = mine[(life[mine] > 0).astype(np.bool_)]
        if not len(mine):
            result.append(0)
            continue
        area = sum(w * t for w, t in zip(weight[mine].tolist(), life[mine].tolist()))
        head = min(graph.head[first[mine]].tolist())
        tail = min(graph.tail[last[mine]].tolist())
        result.append(head + _over(area, _usable(weights, cap)) + tail)
    return result


def _over(area: Any, cap: Any) -> Any:
    exact = isinstance(cap, int | Fraction) and not isinstance(area, float)
    return Fraction(area) / cap if exact else float(area) / float(cap)


def _usable(weights: set[Any], cap: Any) -> Any:
    """As much of the cap as sums of the weights can fill."""
    if not all(isinstance(number, int | Fraction) for number in (*weights, cap)):
        return cap
    fractions = [Fraction(number) for number in weights]
    below = math.lcm(*(number.denominator for number in fractions))
    unit = Fraction(math.gcd(*(int(number * below) for number in fractions)), below)
    return unit * (Fraction(cap) // unit)


def _lives(graph: Graph) -> tuple[Index, Index, NDArray[Any]]:
    """For each buffer nodes between whose start and end it lives, and how long.

    It is born with an F, an R or a RELOAD and dies with a B, I, W or OFFLOAD; what
    arrives before an F counts from there on. Of others no more is said than 0.

    Returns:
        The first node, the last one, and the shortest time from the start of the
        one to the end of the other.
    """
    program, table, time = graph.program, graph.table, graph.time
    _, _, stage, micro_batch, part, _ = program.buffers.T
    place = np.maximum(micro_batch, 0), part, stage

    def node_of(*kinds: Kind) -> tuple[Index, NDArray[Any]]:
        ops = table.get(*kinds)[place]
        there = (ops >= 0) & (micro_batch >= 0)
        nodes = np.where(there, graph.node[ops], -1)
        return nodes, np.where(there, time[nodes], np.zeros_like(time[:1]))

    forward, f = node_of(Kind.F)
    again, r = node_of(Kind.R)
    back, b = node_of(*BACKWARD_KINDS)
    weight, w = node_of(Kind.W)
    away, o = node_of(Kind.OFFLOAD)
    reload, l = node_of(Kind.RELOAD)
    born, died = lifetimes(program)
    first = _node_of_instruction(graph, born)
    last = _node_of_instruction(graph, died)
    kind = program.buffers[:, 0]
    arrives = (kind == BufferKind.INPUT) | (kind == BufferKind.STORED_INPUT)
    first = np.where(arrives & (first < 0), forward, first)
    # What W adds behind I, unless they run as one.
    more = np.where((last == weight) & (weight != back), w, np.zeros_like(w))
    life = np.zeros(len(kind), dtype=time.dtype)
    to_backward = (last >= 0) & ((last == back) | (last == weight))
    for starts, before in (
        (forward, graph.lives[place]),
        (again, r + b),
        (reload, l + b),
    ):
        these = to_backward & (first == starts)
        life[these] = before[these] + more[these]
    gone = (last >= 0) & (last == away) & (first == forward)
    life[gone] = f[gone] + o[gone]
    return first, last, life


def _node_of_instruction(graph: Graph, instructions: Index) -> Index:
    """The node that each runs; -1 where there is none."""
    first_op = np.append(graph.program.first_op, [-1])
    op = first_op[np.where(instructions < 0, len(first_op) - 1, instructions)]
    return np.where(op >= 0, graph.node[op], -1)
