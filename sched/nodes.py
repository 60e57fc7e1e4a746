"""The instructions that ops become, in the canonical order, and all streams.

The canonical order knows no costs: ops by the tick at which each could run if every op
took one tick and links were free, devices in turn within a tick.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, csr, neighbours
from pipeproof.sched.instructions import Action, Stream, StreamKind
from pipeproof.sched.ir import BESIDE_KINDS, Kind, Schedule
from pipeproof.sched.kernels import distinct


@dataclass(frozen=True)
class Nodes:
    """The instructions that ops become: lone ops and overlap groups.

    Attributes:
        of_op: the node of each op.
        starts: first op of each node, and one behind the last.
        device: of each node.
        by_rank: the nodes in the canonical order.
        kind: of its first op.
    """

    of_op: Index
    starts: Index
    device: NDArray[np.int32]
    by_rank: Index
    kind: NDArray[np.int8]

    @classmethod
    def of(cls, schedule: Schedule) -> Nodes:
        """The nodes of a schedule without cycles."""
        level = schedule.level_of_node
        numbers = np.arange(len(level) + 1, dtype=np.int32)
        _, by_rank = csr(int(level.max(initial=0)) + 1, level, numbers[:-1])
        device, kind = schedule.device_of_op, schedule.ops.kind
        if len(level) == len(schedule):  # every op a node
            return cls(numbers[:-1], numbers, device, by_rank, kind)
        first = np.flatnonzero(~schedule.ops.joined).astype(np.int32)
        starts = np.append(first, np.int32(len(schedule)))
        of_op = schedule.node_of_op
        return cls(of_op, starts, device[first], by_rank, kind[first])

    @cached_property
    def rank(self) -> Index:
        """Place of each node in the canonical order."""
        rank = np.empty(len(self.by_rank), dtype=np.int32)
        rank[self.by_rank] = np.arange(len(rank), dtype=np.int32)
        return rank

    @cached_property
    def beside(self) -> NDArray[np.bool_]:
        """Whether each runs beside the compute stream."""
        if self.kind.max(initial=0) < min(BESIDE_KINDS):
            return np.zeros(len(self.kind), dtype=np.bool_)
        beside = np.zeros(len(Kind), dtype=np.bool_)
        beside[list(BESIDE_KINDS)] = True
        return beside[self.kind]

    @cached_property
    def previous(self) -> Index:
        """The node before each on its device's compute stream, or -1."""
        return neighbours(self.device, ~self.beside)

    @cached_property
    def following(self) -> Index:
        """The node behind each on its device's compute stream, or -1."""
        return neighbours(self.device, ~self.beside, behind=True)


@dataclass(frozen=True)
class Streams:
    """All streams, and which one carries what.

    Attributes:
        streams: as in `Program`.
        of_kind: the stream of an op, at kind × devices + device.
        down, up: the stream that sends a tensor on from a stage, or -1 where it
            stays on its device, at pipe × stages + stage. The one that receives
            it has the next number.
        skip_down, skip_up: likewise over skip connections, at pipe × skips + skip.
    """

    streams: tuple[Stream, ...]
    of_kind: NDArray[np.int32]
    down: NDArray[np.int32]
    up: NDArray[np.int32]
    skip_down: NDArray[np.int32]
    skip_up: NDArray[np.int32]

    @classmethod
    def of(cls, schedule: Schedule) -> Streams:
        """Compute streams by device, those of links by link, those beside last."""
        devices = schedule.devices
        streams = [Stream(device, StreamKind.COMPUTE) for device in range(devices)]
        homes = np.array(schedule.placement.pipes, dtype=np.int64)
        used = distinct(schedule.pipe_of)
        chain = homes.shape[1] - 1
        above = [*range(chain), *(source for source, _ in schedule.skips)]
        below = [*range(1, chain + 1), *(target for _, target in schedule.skips)]
        upper, lower = (homes[used][:, stages].ravel() for stages in (above, below))
        apart = upper != lower
        ends = [(upper, lower), (lower, upper)]
        codes = [source[apart] * devices + target[apart] for source, target in ends]
        pairs = distinct(np.concatenate(codes))
        for a, b in (divmod(pair, devices) for pair in pairs.tolist()):
            streams += [Stream(a, StreamKind.SEND, b), Stream(b, StreamKind.RECV, a)]
        links, over = [], []
        for ahead, (source, target) in zip((0, 1), ends):
            number = devices + 2 * np.searchsorted(pairs, source * devices + target)
            number = np.where(apart, number, -1).reshape(len(used), -1)
            link = np.full(homes.shape, -1, dtype=np.int32)
            link[used, ahead : ahead + chain] = number[:, :chain]
            links.append(link.ravel())
            link = np.full((len(homes), len(schedule.skips)), -1, dtype=np.int32)
            link[used] = number[:, chain:]
            over.append(link.ravel())
        of_kind = np.tile(np.arange(devices, dtype=np.int32), (len(Kind), 1))
        for kind, (_, where) in BESIDE.items():
            there = np.zeros(devices, dtype=np.bool_)
            there[schedule.device_of_op[schedule.ops.kind == kind]] = True
            for device in np.flatnonzero(there).tolist():
                of_kind[kind, device] = len(streams)
                streams.append(_beside(schedule, device, where))
        return cls(tuple(streams), of_kind.ravel(), *links, *over)


BESIDE = {
    Kind.OFFLOAD: (Action.COPY, StreamKind.TO_HOST),
    Kind.RELOAD: (Action.COPY, StreamKind.FROM_HOST),
    Kind.REDUCE: (Action.REDUCE, StreamKind.REDUCE),
}
"""What the kinds that run beside the compute stream become, and where."""

BETWEEN_DEVICES = {
    StreamKind.TO_HOST: StreamKind.TO_DEVICE,
    StreamKind.FROM_HOST: StreamKind.FROM_DEVICE,
}
"""Where copies go instead if they go to another device's memory."""


def _beside(schedule: Schedule, device: int, kind: StreamKind) -> Stream:
    target = schedule.offload_to[device]
    if target is None or kind not in BETWEEN_DEVICES:
        return Stream(device, kind)
    return Stream(device, BETWEEN_DEVICES[kind], target)
