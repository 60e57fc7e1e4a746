"""What offloaded activations take of the hosts' memory, over the devices of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeproof.sched.exact import Number, plain
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.memory import lifetimes

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


@dataclass(frozen=True, slots=True)
class HostPeak:
    """The most that lies on a node's host at one time.

    Attributes:
        node: which.
        total: bytes.
        op: the instruction at which it is first reached.
    """

    node: int
    total: Number
    op: int


def host_peaks(trace: Trace, node_of: Sequence[int]) -> list[HostPeak]:
    """Of each node whose host holds anything, by node.

    A copy is there from the start of its OFFLOAD to the end of its RELOAD. At equal
    times these go in the program's order, as on devices.

    Args:
        trace: predicted or measured.
        node_of: the node of each device.

    Raises:
        ParameterError: no bytes are known.
    """
    program, weight = trace.program, trace.sizes.known_bytes()
    copies = np.flatnonzero(program.buffers[:, 0] == BufferKind.HOST)
    born, died = lifetimes(program)
    changes: list[tuple[Any, int, int, Any]] = []
    for buffer in copies.tolist():
        start, end = int(born[buffer]), int(died[buffer])
        size, node = weight[buffer], node_of[int(program.buffers[buffer, 1])]
        changes.append((trace.start[start], 2 * start, node, size))
        if end >= 0:
            changes.append((trace.end[end], 2 * end + 1, node, -size))
    changes.sort(key=lambda change: change[:2])
    now: dict[int, Any] = {}
    most: dict[int, HostPeak] = {}
    for _, moment, node, size in changes:
        now[node] = now.get(node, 0) + size
        if node not in most or now[node] > most[node].total:
            most[node] = HostPeak(node, plain(now[node]), moment // 2)
    return [most[node] for node in sorted(most)]
