"""What two devices exchange between two ops of each: messages posted in groups.

An executor that sends what an op produced and then waits for what its next op needs
may as well do both at once, if both go to and come from the same device. 1F1B's
steady state consists of nothing else::

    device 0 |  F2 ─┐              ┌─ B0
                    ├ send F2 ───▶ │        one group on each device: neither
                    │ ◀─── recv B0 │        direction waits for the other
    device 1 |  B0 ─┘              └─ F2

That is Megatron-LM's `send_forward_recv_backward` on device 0 meeting
`send_backward_recv_forward` on device 1 (core/pipeline_parallel/
p2p_communication.py), and the fused sends and receives of torch's `Schedule1F1B`.

An exchange makes no op wait for one that it does not wait for anyhow. Message x goes
from op p on device d to op c' on device e; message y from op p' on e to op c on d;
c is d's next op behind p, and c' is e's next one behind p'::

    d:  p  ── x ─▶ ┐  c           c  needs y, and so p'; it follows p
    e:  p' ── y ─▶ ┘  c'          c' needs x, and so p;  it follows p'

So both messages can stand together in the canonical order, at the step of the later
of p and p', and everything that waits for either stands behind: the argument by which
a lowered program cannot deadlock holds for groups too.
"""

from __future__ import annotations

import numpy as np

from pipeproof.sched.deps import Index
from pipeproof.sched.hops import Hops
from pipeproof.sched.layout import Layout
from pipeproof.sched.lists import Lists
from pipeproof.sched.nodes import Nodes


def exchanges(nodes: Nodes, hops: Hops) -> Index:
    """For each hop the other one of its exchange, or -1.

    Overlap groups may produce and consume several messages between the same two
    devices: of those the first meets the first, and so on.
    """
    size = np.int64(len(nodes.by_rank))
    other = np.full(len(hops.source), -1, dtype=np.int32)
    crossing = np.flatnonzero(hops.link >= 0)
    source, target = (
        nodes.of_op[ops[crossing]].astype(np.int64)
        for ops in (hops.source, hops.target)
    )
    # What would meet each: from the op before its consumer to the one behind its
    # producer. A device's first op has none before it, its last one none behind.
    back, on = nodes.previous[target], nodes.following[source]
    there = (back >= 0) & (on >= 0)
    own = _nth(source * size + target, len(crossing))
    wanted = _nth(back * size + on, len(crossing))
    order = np.argsort(own)
    place = np.searchsorted(own, wanted, sorter=order)
    found = order[np.minimum(place, len(order) - 1)] if len(order) else order
    met = there & (own[found] == wanted)
    other[crossing[met]] = crossing[found[met]]
    return other


def _nth(code: Index, count: int) -> Index:
    """Codes of which equal ones are told apart by how many came before."""
    order = np.argsort(code, kind="stable")
    ordered = code[order]
    every = np.arange(len(code))
    first = np.append(True, ordered[1:] != ordered[:-1])[: len(code)]
    nth = np.empty(len(code), dtype=np.int64)
    nth[order] = every - np.maximum.accumulate(np.where(first, every, 0))
    return np.asarray(code * max(1, count) + nth)


def groups_of(together: Index, layout: Layout) -> Lists:
    """The groups: each device's SEND and RECV of each exchange."""
    one = np.flatnonzero(together > np.arange(len(together)))
    two = together[one]
    ends = (layout.out[one], layout.into[two]), (layout.out[two], layout.into[one])
    pairs = np.sort(np.concatenate([np.stack(pair, axis=1) for pair in ends]))
    members = pairs[np.argsort(pairs[:, 0])].ravel().astype(np.int32)
    offsets = np.arange(0, len(members) + 1, 2, dtype=np.int32)
    return Lists(offsets, members)
