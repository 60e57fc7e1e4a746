"""Loops over millions of numbers, compiled where it pays.

What numpy would do in many passes, each through memory, is one loop in plain Python
that fills columns it is given; such a loop stands beside what it is for. Above
`COMPILE_FROM` elements numba compiles it, once per machine; where numba cannot be
imported the plain loop runs and gives the same result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPILE_FROM = 90_000
"""Below this the plain loop is done before numba is loaded."""

COMPILE_FROM_IF_LOADED = 500
"""Below this it is done before a compiled one is read from its file."""

COMPILE_AFTER = 500_000
"""Steps of plain loops in all after which numba is worth loading: whoever has done
so many, one small schedule after the other, will do more."""


@dataclass
class _Plain:
    """What this process has done in plain Python, where numba may be loaded once.

    Attributes:
        steps: of all loops together.
    """

    steps: int = 0

    def compiles_from(self) -> int:
        """How many steps are worth a compiled loop."""
        if sys.modules.get("numba") is not None or self.steps > COMPILE_AFTER:
            return min(COMPILE_FROM, COMPILE_FROM_IF_LOADED)
        return COMPILE_FROM


_plain = _Plain()


def compiled(function: Callable[..., Any], size: int) -> Callable[..., Any] | None:
    """A loop as machine code, where that pays for so many steps; else None."""
    if size >= _plain.compiles_from():
        return _compiled(function)
    _plain.steps += size
    return None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    try:
        import numba
    except ImportError:
        return None
    try:
        result: Callable[..., Any] = numba.njit(cache=True)(function)
    except RuntimeError:  # no directory to keep it in
        result = numba.njit(function)
    return result


def run(
    kernel: Callable[..., None],
    columns: list[NDArray[Any]],
    *,
    results: list[int],
    size: int,
) -> list[NDArray[Any]]:
    """Run a kernel that fills some of its columns, in place.

    Args:
        kernel: plain Python over numbers, indexing its arguments.
        columns: its arguments; it may write to any. Columns of objects, such as
            ints beyond 64 bits, are never compiled for.
        results: which of them to return.
        size: roughly how many steps it takes; decides whether to compile it.
    """
    numbers = all(column.dtype != object for column in columns)
    fast = compiled(kernel, size) if numbers else None
    if fast is not None:
        fast(*columns)
        return [columns[place] for place in results]
    lists = [column.tolist() for column in columns]  # ten times as fast to index
    kernel(*lists)
    for place in results:
        columns[place][:] = lists[place]
    return [columns[place] for place in results]


PAGE = 2 * 2**20
"""A large page of memory, in bytes."""

LINE = 64
"""Where columns begin: at a whole number of these bytes."""


def columns(*wanted: tuple[int, Any]) -> list[NDArray[Any]]:
    """New columns side by side in one piece of memory, to be filled.

    The first write to each page of memory costs more than what is written to it. Of
    4 MiB or more numpy asks for large pages, which cost an eighth of small ones; this
    asks for as much, though it touches less, and begins where a page does.

    Args:
        wanted: the length and the dtype of each.
    """
    kinds = [(length, np.dtype(kind)) for length, kind in wanted]
    sizes = [-(-length * kind.itemsize // LINE) * LINE for length, kind in kinds]
    if sum(sizes) < PAGE // 2 or any(kind.hasobject for _, kind in kinds):
        return [np.empty(length, dtype=kind) for length, kind in kinds]
    piece = np.empty(sum(sizes) + 2 * PAGE, dtype=np.uint8)
    at = -piece.__array_interface__["data"][0] % PAGE
    result = []
    for (length, kind), size in zip(kinds, sizes):
        result.append(piece[at : at + length * kind.itemsize].view(kind))
        at += size
    return result


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """The different ones, ascending: `np.unique` without what it imports."""
    ordered = np.sort(values)
    first = np.ones(len(ordered), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


FEW = 1 << 16
"""So many different numbers are found in a table of all."""


def numbered(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The different ones of some integers of at least 0, ascending, and which each is.

    As `np.unique` with its inverse. Large ones take a sort, small ones a table.
    """
    most = int(values.max(initial=0))
    if most >= max(FEW, len(values)):
        different = distinct(values)
        return different, np.searchsorted(different, values)
    there = np.zeros(most + 1, dtype=np.bool_)
    there[values] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[values]


def csr(
    rows: int, row: NDArray[Any], value: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values grouped by row, in their given order.

    Returns:
        Offsets, int32 where that suffices, and values: those of row i are
        `values[offsets[i]:offsets[i + 1]]`.
    """
    index = np.int32 if len(row) < 2**31 else np.int64
    group, count = compiled(_group, len(row)), compiled(_count, len(row))
    if group is None or count is None:
        offsets = np.zeros(rows + 1, dtype=index)
        np.cumsum(np.bincount(row, minlength=rows), out=offsets[1:])
        return offsets, value[np.argsort(row, kind="stable")]
    # One place further than in the end, where filling a row moves its offset to.
    offsets, result = columns((rows + 2, index), (len(value), value.dtype))
    offsets[:] = 0
    count(row, offsets)
    np.cumsum(offsets, out=offsets)
    group(row, value, offsets, result)
    return offsets[:-1], result


def _count(row: Any, offsets: Any) -> None:
    for i in range(len(row)):
        offsets[row[i] + 2] += 1


def _group(row: Any, value: Any, offsets: Any, result: Any) -> None:
    for i in range(len(row)):
        place = offsets[row[i] + 1]
        result[place] = value[i]
        offsets[row[i] + 1] = place + 1


def levels(nodes: int, before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.int64]:
    """Longest-path level of each node of a graph, by Kahn's algorithm.

    Args:
        nodes: how many there are.
        before: the nodes that edges leave.
        after: the nodes that they enter.

    Returns:
        int64 per node; -1 for nodes on a cycle or behind one.
    """
    offsets, targets = csr(nodes, before, after)
    columns = [
        offsets,
        targets,
        np.bincount(after, minlength=nodes),
        np.full(nodes, -1, dtype=np.int64),
        np.zeros(nodes, dtype=np.int64),
        np.empty(nodes, dtype=np.int64),
    ]
    return run(_levels, columns, results=[3], size=nodes + len(before))[0]


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
