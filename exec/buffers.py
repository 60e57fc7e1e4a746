"""What forwards do to a stage's buffers, and how it is undone where they run again.

Running statistics count each micro-batch once, however often its forward runs. And a
module whose output depends on what earlier forwards left in its buffers, such as
torch's `spectral_norm` with its power iteration, must find again what its first forward
of a micro-batch found. So a forward that will run again keeps what was in the buffers
that it changes, and its recomputation starts from there::

    F0 │ u ─▶ u′     kept: u         R0 runs on u, and leaves what is there then alone
    F1 │ u′ ─▶ u″    kept: u′        R1 runs on u′

What torch's norms compute in training does not depend on their statistics: of these
nothing is kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeproof.exec.batch_norm import Deferred
from pipeproof.exec.errors import ModelError

Where = tuple[int, str]
"""The number of a module, and the name of one of its buffers."""

_OWN_STATISTICS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    _InstanceNorm.forward,
    Deferred.forward,
)
"""Forwards that in training normalise by what they are given."""


class Buffers:
    """A stage's buffers.

    Args:
        number: of the stage.
        modules: all of its modules.
    """

    def __init__(self, number: int, modules: Sequence[nn.Module]) -> None:
        self._number, self._modules = number, modules
        self._any = any(module._buffers for module in modules)
        self._modes: list[bool] = []
        self._learning = True
        self._changed: set[Where] = set()
        self._idle: frozenset[int] = frozenset()
        self._kept: dict[Hashable, dict[Where, Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[Where, Tensor]]:
        for number, module in enumerate(self._modules):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield (number, name), buffer

    def begin(self) -> None:
        """Get ready for a step."""
        if not self._any:
            return
        self._kept.clear()
        modes = [module.training for module in self._modules]
        if modes != self._modes:
            self._modes, self._learning = modes, True
            self._changed.clear()
            self._idle = frozenset(
                number
                for number, module in enumerate(self._modules)
                if module.training and type(module).forward in _OWN_STATISTICS
            )

    @contextmanager
    def noting_changes(self, unit: Hashable) -> Iterator[None]:
        """Run a forward that will run again: note which buffers it changes.

        The first forward compares values, since batch norm does not tell autograd
        that it writes to its statistics; later ones compare versions.

        Args:
            unit: whose forward it is.

        Raises:
            ModelError: it changes a buffer that the first forward left alone.
        """
        if not self._any:
            yield
            return
        learning = self._learning
        before = {
            where: (
                buffer,
                buffer._version,
                buffer.clone() if learning or self._matters(where) else None,
            )
            for where, buffer in self
        }
        yield
        found = set(self._differing(before, learning))
        if learning:
            self._changed, self._learning = found, False
        late, self._changed = found - self._changed, self._changed | found
        for number, name in sorted(where for where in late if self._matters(where)):
            raise ModelError(
                f"stage {self._number} changes {name!r} of its "
                f"{type(self._modules[number]).__name__} in a forward and not in its "
                "first: what was there is lost, and nothing can be recomputed from it; "
                "change it in every forward or in none, or do not recompute the stage"
            )
        self._kept[unit] = {
            where: copy
            for where, (_, _, copy) in before.items()
            if copy is not None and self._matters(where)
        }

    def _matters(self, where: Where) -> bool:
        """Whether forwards change it, and what they compute may depend on it."""
        return where in self._changed and where[0] not in self._idle

    def _differing(
        self, before: dict[Where, tuple[Tensor, int, Tensor | None]], values: bool
    ) -> Iterator[Where]:
        for where, buffer in self:
            earlier, version, copy = before.get(where, (None, 0, None))
            other = buffer is not earlier or buffer._version != version
            if other or (values and copy is not None and not torch.equal(buffer, copy)):
                yield where

    @contextmanager
    def refusing_changes(self) -> Iterator[None]:
        """Refuse a first forward that changes the stage's buffers.

        Raises:
            ModelError: it does.
        """
        if not self._any or not self._learning:
            yield
            return
        with self.noting_changes(None):
            yield
        self._kept.clear()
        for number, name in sorted(self._changed):
            owner = type(self._modules[number]).__name__
            raise ModelError(
                f"stage {self._number} has replicas on several devices, and its "
                f"{owner} changes {name!r} in forward: which micro-batches a replica "
                "sees depends on the schedule, and so would the result; freeze it "
                "(eval), or use a schedule of one pipe"
            )

    @contextmanager
    def rewound(self, unit: Hashable) -> Iterator[None]:
        """Run a forward again on what it found, and without its effect.

        Args:
            unit: whose forward ran in `noting_changes`.
        """
        kept = self._kept.pop(unit, {})
        originals = []
        for number, name in self._changed:
            buffers = self._modules[number]._buffers
            original = buffers[name]
            if original is not None:
                originals.append((buffers, name, original))
                found = kept.get((number, name))
                buffers[name] = original.clone() if found is None else found
        try:
            yield
        finally:
            for buffers, name, original in originals:
                buffers[name] = original
