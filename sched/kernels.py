"""The few loops that numpy cannot say, compiled where it pays.

Each is plain Python over integers. Above `COMPILE_FROM` elements numba compiles
it, once per machine; where numba cannot be imported the plain loop runs and
gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPILE_FROM = 3_000_000
"""Below this the plain loop is done before numba is loaded."""


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    try:
        import numba
    except ImportError:
        return None
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True)(function)
    except RuntimeError:  # no directory to keep it in
        compiled = numba.njit(function)
    return compiled


def run(
    kernel: Callable[..., None],
    columns: list[NDArray[np.int64]],
    *,
    result: int,
    size: int,
) -> NDArray[np.int64]:
    """Run a kernel that fills one of its columns.

    Args:
        kernel: plain Python over integers, indexing its arguments.
        columns: its arguments; it may write to any.
        result: which of them to return.
        size: roughly how many steps it takes; decides whether to compile it.
    """
    compiled = _compiled(kernel) if size >= COMPILE_FROM else None
    if compiled is not None:
        compiled(*columns)
        return columns[result]
    lists = [column.tolist() for column in columns]  # ten times as fast to index
    kernel(*lists)
    return np.array(lists[result], dtype=np.int64)


def levels(
    nodes: int, before: NDArray[np.int64], after: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Longest-path level of each node of a graph, by Kahn's algorithm.

    Args:
        nodes: how many there are.
        before: the nodes that edges leave.
        after: the nodes that they enter.

    Returns:
        int64 per node; -1 for nodes on a cycle or behind one.
    """
    from pipeproof.sched.deps import csr

    offsets, targets = csr(nodes, before, after)
    columns = [
        offsets,
        targets,
        np.bincount(after, minlength=nodes),
        np.full(nodes, -1, dtype=np.int64),
        np.zeros(nodes, dtype=np.int64),
        np.empty(nodes, dtype=np.int64),
    ]
    return run(_levels, columns, result=3, size=nodes + len(before))


def _levels(
    offsets: Any, targets: Any, waiting: Any, level: Any, reached: Any, queue: Any
) -> None:
    filled = 0
    for node in range(len(waiting)):
        if waiting[node] == 0:
            queue[filled] = node
            filled += 1
    head = 0
    while head < filled:
        node = queue[head]
        head += 1
        depth = reached[node]
        level[node] = depth
        for edge in range(offsets[node], offsets[node + 1]):
            target = targets[edge]
            if reached[target] <= depth:
                reached[target] = depth + 1
            waiting[target] -= 1
            if waiting[target] == 0:
                queue[filled] = target
                filled += 1
