"""Copies of buffers to work on, where a graph may still need what was in them.

A forward may save a buffer for its backward, and the next one change it in place: in
training without a pipeline that backward has run by then, here it has not. So where
forwards change a buffer in place, each works on a copy of its own, and the last one
goes back into the module's at the end of the step::

    F0 │ u₀ ─copy─▶ u₁      graph 0 may have saved u₁
    F1 │ u₁ ─copy─▶ u₂      graph 1 may have saved u₂ ──end of step──▶ u₀
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Where = tuple[int, str]
"""The number of a module, and the name of one of its buffers."""

Seen = dict[Where, tuple[Tensor, int, Tensor | None]]
"""Buffers, their versions, and copies of those whose values are to be compared."""


def buffers_of(modules: Sequence[nn.Module]) -> Iterator[tuple[Where, Tensor]]:
    """All of them, where they are."""
    for number, module in enumerate(modules):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield (number, name), buffer


class Once:
    """Copies each buffer once, for what two modules share stays shared."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def copy(self, buffer: Tensor) -> Tensor | None:
        """None of one that has no shape yet."""
        if is_lazy(buffer):
            return None
        if id(buffer) not in self._made:
            self._made[id(buffer)] = buffer.clone()
        return self._made[id(buffer)]


def differing(
    modules: Sequence[nn.Module], before: Seen, *, values: bool
) -> Iterator[Where]:
    """Buffers that are others than before, or changed.

    Args:
        modules: that hold them.
        before: what they held.
        values: compare them too, since not every operation counts as a version.
    """
    for where, buffer in buffers_of(modules):
        earlier, version, copy = before.get(where, (None, 0, None))
        other = buffer is not earlier or buffer._version != version
        if other or (values and copy is not None and not torch.equal(buffer, copy)):
            yield where


class Copies:
    """Those of one stage.

    Args:
        modules: of the stage; the list may grow.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._known = False
        self._owned: list[Where] = []
        self._originals: dict[Where, Tensor] = {}
        self._latest: dict[Where, Tensor] = {}

    @property
    def none(self) -> bool:
        """Whether it is known that no buffer is changed in place."""
        return self._known and not self._owned

    def forget(self) -> None:
        """Modules are in other modes than before."""
        self._known = False

    @contextmanager
    def owned(self, idle: Collection[int]) -> Iterator[set[Where]]:
        """Run a forward whose graph is kept.

        Args:
            idle: modules whose outputs do not depend on their buffers.

        Yields:
            What it changes, once it has run, if it is the first to be seen.
        """
        changed: set[Where] = set()
        if self._known:
            self._renew()
            yield changed
            return
        once = Once()
        before: Seen = {
            where: (buffer, buffer._version, once.copy(buffer))
            for where, buffer in buffers_of(self._modules)
            if where[0] not in idle
        }
        yield changed
        self._known = True
        after = dict(buffers_of(self._modules))
        for where in differing(self._modules, before, values=True):
            if where[0] not in idle:
                changed.add(where)
        self._owned = [
            where
            for where in sorted(changed)
            if where not in before or after[where] is before[where][0]
        ]

    def _renew(self) -> None:
        once = Once()
        for number, name in self._owned:
            buffers = self._modules[number]._buffers
            found = buffers.get(name)
            if found is not None and (copy := once.copy(found)) is not None:
                if self._latest.get((number, name)) is not found:
                    self._originals[number, name] = found
                self._latest[number, name] = buffers[name] = copy

    def end(self) -> None:
        """A step is over: what was worked on goes back, where it is still there."""
        for where, original in self._originals.items():
            buffers = self._modules[where[0]]._buffers
            if buffers.get(where[1]) is self._latest[where]:
                with torch.no_grad():
                    buffers[where[1]] = original.copy_(self._latest[where])
        self._originals.clear()
        self._latest.clear()
