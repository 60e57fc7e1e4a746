"""Tensors passed between stages, and where they are handed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable, csr
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Schedule
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import run
from pipeproof.sched.nodes import Nodes, Streams
from pipeproof.sched.skips import SkipTable

_F, _B, _I = int(Kind.F), int(Kind.B), int(Kind.I)


@dataclass(frozen=True)
class Hops:
    """Tensors passed between stages, in the order of production.

    An op passes one on to the next stage, then one over each skip connection.

    Attributes:
        source, target: the ops that produce and consume each.
        link: the stream that sends it; -1 where it stays on its device.
        slot: the sort of slot that it arrives in: one for what goes down the stages
            and one for what goes up, for each stage, and each skip, on each device; -1
            where it stays on its device.
        message: its number among those that cross devices, or -1.
        starts: where those that each node produces begin, in the canonical order,
            and the end.
        out_of, into: for each op, the first hop that it produces, behind which its
            others are, and the one that it consumes from the chain of stages; -1
            for none.
        skip: which skip connection each goes over, or -1; empty without any.
        beside: for each hop the next one that its consumer consumes, or -1; empty
            without skip connections.
    """

    source: Index
    target: Index
    link: Index
    slot: Index
    message: Index
    starts: Index
    out_of: Index
    into: Index
    skip: Index
    beside: Index

    @classmethod
    def of(
        cls, schedule: Schedule, table: OpTable, nodes: Nodes, streams: Streams
    ) -> Hops:
        """Activations down the stages and gradients up, in the order of production.

        Those of an overlap group come in the order of its ops.
        """
        ops = schedule.ops
        skips = SkipTable.of(schedule)
        size = 2 * (schedule.stages - 1 + len(skips))
        size *= schedule.all_micro_batches * schedule.slices
        most = size if len(skips) else 0
        filled = new_columns(
            *[(size, np.int32)] * 5,
            (len(nodes.by_rank) + 1, np.int32),
            *[(len(ops), np.int32)] * 2,
            *[(most, np.int32)] * 2,
        )
        filled[5][0] = 0
        for column in filled[6:]:
            column[:] = -1
        columns = [
            nodes.by_rank,
            nodes.starts,
            ops.kind,
            ops.stage,
            ops.micro_batch,
            table.place,
            schedule.pipe_of,
            table.get(Kind.F).ravel(),
            table.get(*BACKWARD_KINDS).ravel(),
            streams.down,
            streams.up,
            _slots(schedule),
            np.array([schedule.stages, len(skips), len(schedule.placement.pipes)]),
            skips.source,
            skips.target,
            skips.down,
            skips.down_at,
            skips.up,
            skips.up_at,
            streams.skip_down,
            streams.skip_up,
            *_skip_slots(schedule, skips),
            *filled,
        ]
        return cls(*run(_produce, columns, results=[*range(23, 33)], size=len(ops)))

    @cached_property
    def messages(self) -> int:
        """How many cross devices."""
        return int(self.message.max(initial=-1)) + 1


def _slots(schedule: Schedule) -> NDArray[np.int32]:
    """The first of two sorts of slot of each stage, at pipe × stages + stage.

    Pipes whose stage lies on one device share them.
    """
    stages = schedule.stages
    slots = _first_there(schedule) * stages + np.arange(stages)
    return (2 * slots).astype(np.int32).ravel()


def _first_there(schedule: Schedule) -> NDArray[np.int64]:
    """Of each pipe and stage, the first pipe that has the stage on that device."""
    homes = np.array(schedule.placement.pipes)
    first: NDArray[np.int64] = np.argmax(homes[:, None] == homes, axis=1)
    return first


def _skip_slots(
    schedule: Schedule, skips: SkipTable
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The sort of slot at the target, and at the source, of each pipe and skip."""
    first = _first_there(schedule)
    chain, every = first.size, np.arange(len(skips))
    slots = (
        2 * (chain + first[:, stages] * len(skips) + every) + up
        for up, stages in enumerate((skips.target, skips.source))
    )
    down, up = (some.astype(np.int32).ravel() for some in slots)
    return down, up


def _produce(
    by_rank: Any,
    starts: Any,
    kind: Any,
    stage: Any,
    micro_batch: Any,
    place: Any,
    pipe_of: Any,
    forward: Any,
    backward: Any,
    down: Any,
    up: Any,
    slots: Any,
    sizes: Any,
    skip_source: Any,
    skip_target: Any,
    skips_down: Any,
    down_at: Any,
    skips_up: Any,
    up_at: Any,
    skip_down: Any,
    skip_up: Any,
    skip_slots_down: Any,
    skip_slots_up: Any,
    source: Any,
    target: Any,
    link: Any,
    slot: Any,
    message: Any,
    hops_at: Any,
    out_of: Any,
    into: Any,
    skip_of: Any,
    beside: Any,
) -> None:
    """Number the hops op by op, and note which op each one leads to.

    What comes over skips is there before what comes from the chain, since the stages
    between need it too: so the last one to name a consumer stands first in its list.
    """
    stages, skips, pipes = sizes[0], sizes[1], sizes[2]
    lone = len(by_rank) == len(kind)  # without groups
    hop = 0
    sent = 0
    for rank in range(len(by_rank)):
        node = by_rank[rank]
        first, end = node, node + 1
        if not lone:
            first, end = starts[node], starts[node + 1]
        for op in range(first, end):
            at = stage[op]
            if kind[op] == _F and at < stages - 1:
                after = forward[place[op] + 1]
                pipe = pipe_of[micro_batch[op]] if pipes > 1 else 0
                over = down[pipe * stages + at]
                sort = slots[pipe * stages + at + 1]
            elif (kind[op] == _B or kind[op] == _I) and at > 0:
                after = backward[place[op] - 1]
                pipe = pipe_of[micro_batch[op]] if pipes > 1 else 0
                over = up[pipe * stages + at]
                sort = slots[pipe * stages + at - 1] + 1
            else:
                continue
            source[hop] = op
            target[hop] = after
            out_of[op] = hop
            link[hop] = over
            slot[hop] = -1
            message[hop] = -1
            if over >= 0:
                slot[hop] = sort
                message[hop] = sent
                sent += 1
            if skips > 0:
                beside[hop] = into[after]
            into[after] = hop
            hop += 1
            if skips == 0:
                continue
            pipe = pipe_of[micro_batch[op]] if pipes > 1 else 0
            down_here = kind[op] == _F
            begin = down_at[at] if down_here else up_at[at]
            behind = down_at[at + 1] if down_here else up_at[at + 1]
            for nth in range(begin, behind):
                if down_here:
                    skip = skips_down[nth]
                    after = forward[place[op] + skip_target[skip] - at]
                    over = skip_down[pipe * skips + skip]
                    sort = skip_slots_down[pipe * skips + skip]
                else:
                    skip = skips_up[nth]
                    after = backward[place[op] + skip_source[skip] - at]
                    over = skip_up[pipe * skips + skip]
                    sort = skip_slots_up[pipe * skips + skip]
                source[hop] = op
                target[hop] = after
                skip_of[hop] = skip
                beside[hop] = into[after]
                into[after] = hop
                link[hop] = over
                slot[hop] = -1
                message[hop] = -1
                if over >= 0:
                    slot[hop] = sort
                    message[hop] = sent
                    sent += 1
                hop += 1
        hops_at[rank + 1] = hop


def handed_on(
    hops: Hops, nodes: Nodes, blocking: bool, late: bool, together: Index | None = None
) -> tuple[Index, Index]:
    """The hops that are appended beside each node, in the canonical order.

    Args:
        hops: tensors under way.
        nodes: ops and groups.
        blocking: the sender's next op waits for its sends.
        late: receives are posted just in time.
        together: for each hop the other one of its exchange, or -1: both are
            appended, side by side, as soon as both devices have produced theirs.

    Returns:
        Where those of each node begin, and the hops.
    """
    every = np.arange(len(hops.source), dtype=np.int32)
    if together is None and not late:
        return hops.starts, every
    steps = _steps(hops, nodes, blocking, late, together)
    if together is not None:
        first = np.where(together >= 0, np.minimum(every, together), every)
        every = np.argsort(first, kind="stable").astype(np.int32)
        steps = steps[every]
    return csr(len(nodes.by_rank), steps, every)


def _steps(
    hops: Hops, nodes: Nodes, blocking: bool, late: bool, together: Index | None
) -> Index:
    """The rank of the node beside which each hop is appended."""
    follows = nodes.following if blocking and late else nodes.by_rank[:0]
    joint = np.full(len(hops.source) if together is not None else 0, -1, dtype=np.int32)
    if together is not None:
        produced = nodes.rank[nodes.of_op[hops.source]]
        both = np.flatnonzero(together >= 0)
        joint[both] = np.maximum(produced[both], produced[together[both]]) + late
    columns = [
        hops.source,
        hops.target,
        hops.link,
        nodes.of_op,
        nodes.rank,
        follows,
        np.full(int(hops.link.max(initial=-1)) + 1, len(nodes.by_rank)),
        np.array([late], dtype=np.int8),
        joint,
        np.empty(len(hops.source), dtype=np.int32),
    ]
    return run(_step, columns, results=[9], size=len(hops.source))[0]


def _step(
    source: Any,
    target: Any,
    link: Any,
    node: Any,
    rank: Any,
    following: Any,
    lowest: Any,
    late: Any,
    joint: Any,
    step: Any,
) -> None:
    """Beside the producer, or before the consumer; an exchange where it must be.

    Backwards, so that what is sent first is, on each link, handed on no later than
    what is sent after it: links are first in, first out.
    """
    for hop in range(len(source) - 1, -1, -1):
        step[hop] = rank[node[source[hop]]]
        if len(joint) > 0 and joint[hop] >= 0:
            step[hop] = joint[hop]
            lowest[link[hop]] = min(lowest[link[hop]], joint[hop])
            continue
        if late[0] == 0 or link[hop] < 0:
            continue
        behind = rank[node[target[hop]]]
        if len(following) > 0:
            after = following[node[source[hop]]]
            if after >= 0:
                behind = min(behind, rank[after])
        behind = min(behind, lowest[link[hop]])
        lowest[link[hop]] = behind
        step[hop] = behind
