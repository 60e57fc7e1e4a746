"""What forwards leave in a stage's modules, and how it is undone where they run again.

Running statistics count each micro-batch once, however often its forward runs. And a
module whose output depends on what earlier forwards left in its buffers or attributes,
such as torch's `spectral_norm` with its power iteration or one that counts its calls,
must find again what its first forward of a micro-batch found. So a forward that will
run again keeps what was there, and its recomputation starts from it::

    F0 │ u ─▶ u′     kept: u         R0 runs on u, and leaves what is there then alone
    F1 │ u′ ─▶ u″    kept: u′        R1 runs on u′

What torch's norms compute in training does not depend on their statistics: of these
nothing is kept. Of an attribute only the object is: what forwards change within a list,
say, stays changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeproof.exec.batch_norm import Deferred
from pipeproof.exec.copies import Copies, Once, Seen, Where, buffers_of, differing
from pipeproof.exec.errors import ModelError

_OWN_STATISTICS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    _InstanceNorm.forward,
    Deferred.forward,
)
"""Forwards that in training normalise by what they are given."""

Attributes = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Found:
    """What a forward found that will run again.

    Attributes:
        buffers: copies of those that it changes; None for one that it made.
        attributes: of the modules, by number, to which it gives others.
    """

    buffers: Mapping[Where, Tensor | None]
    attributes: Mapping[int, Attributes]


_NOTHING = _Found({}, {})


class Buffers:
    """A stage's buffers, and the other attributes of its modules.

    Args:
        number: of the stage.
        modules: all of its modules.

    Attributes:
        shared: of buffers that other stages have too, the stages in words.
    """

    def __init__(self, number: int, modules: Sequence[nn.Module]) -> None:
        self._number, self._modules = number, list(modules)
        self.shared: Mapping[Where, str] = {}
        self._modes: list[bool] = []
        self._learning = True
        self._changed: set[Where] = set()
        self._altered: set[int] = set()
        self._idle: frozenset[int] = frozenset()
        self._kept: dict[Hashable, _Found] = {}
        self._copies = Copies(self._modules)

    def __iter__(self) -> Iterator[tuple[Where, Tensor]]:
        return buffers_of(self._modules)

    def also(self, modules: Iterable[nn.Module]) -> None:
        """Modules that run in the stage without being its own: of the loss."""
        known = set(map(id, self._modules))
        self._modules += [module for module in modules if id(module) not in known]

    def begin(self) -> None:
        """Get ready for a step.

        Raises:
            ModelError: another stage has a norm's running statistics too.
        """
        self._kept.clear()
        modes = [module.training for module in self._modules]
        if modes != self._modes:
            self._modes, self._learning = modes, True
            self._changed.clear()
            self._altered.clear()
            self._copies.forget()
            self._idle = frozenset(
                number
                for number, module in enumerate(self._modules)
                if module.training and type(module).forward in _OWN_STATISTICS
            )
        self._refuse_shared(where for where in self.shared if where[0] in self._idle)

    def end(self) -> None:
        """A step is over."""
        self._copies.end()

    def keeping_graph(self, forward: Callable[[], T]) -> T:
        """Run a forward whose graph is kept, on copies of the buffers it changes.

        Raises:
            ModelError: another stage has one of these.
        """
        if self._copies.none:
            return forward()
        with self._copies.owned(self._idle) as changed:
            found = forward()
        self._refuse_shared(changed)
        return found

    @contextmanager
    def noting_changes(self, unit: Hashable) -> Iterator[None]:
        """Run a forward that will run again: note what it changes.

        The first forward compares values, since batch norm does not tell autograd
        that it writes to its statistics; later ones compare versions.

        Args:
            unit: whose forward it is.

        Raises:
            ModelError: it changes a buffer that the first forward left alone, or that
                another stage has too.
        """
        learning = self._learning
        once = Once()
        before: Seen = {
            where: (
                buffer,
                buffer._version,
                once.copy(buffer) if learning or self._matters(where) else None,
            )
            for where, buffer in self
        }
        numbers = range(len(self._modules)) if learning else self._altered
        attributes = {number: self._attributes(number) for number in numbers}
        yield
        if learning:
            self._changed = set(differing(self._modules, before, values=True))
            self._altered = {n for n in numbers if self._has_others(n, attributes[n])}
            self._learning = False
            self._refuse_shared(self._changed)
        else:
            self._refuse_late(before)
        self._kept[unit] = _Found(
            {
                where: before[where][2] if where in before else None
                for where in self._changed
                if self._matters(where)
            },
            {number: attributes[number] for number in self._altered},
        )

    def _refuse_late(self, before: Seen) -> None:
        if not before and not any(module._buffers for module in self._modules):
            return
        late = set(differing(self._modules, before, values=False)) - self._changed
        self._changed |= late
        for number, name in sorted(where for where in late if self._matters(where)):
            raise ModelError(
                f"stage {self._number} changes {name!r} of its "
                f"{type(self._modules[number]).__name__} in a forward and not in its "
                "first: what was there is lost, and nothing can be recomputed from it; "
                "change it in every forward or in none, or do not recompute the stage"
            )

    def _matters(self, where: Where) -> bool:
        """Whether forwards change it, and what they compute may depend on it."""
        return where in self._changed and where[0] not in self._idle

    def _attributes(self, number: int) -> Attributes:
        return dict(vars(self._modules[number]))

    def _has_others(self, number: int, before: Attributes) -> bool:
        """Whether a module has other attributes than before."""
        now = self._attributes(number)
        return now.keys() != before.keys() or any(
            now[name] is not before[name] for name in now
        )

    @contextmanager
    def refusing_changes(self) -> Iterator[None]:
        """Refuse a first forward that changes the stage's buffers.

        Raises:
            ModelError: it does.
        """
        if not self._learning:
            yield
            return
        with self.noting_changes(None):
            yield
        self._kept.clear()
        changed = self._changed | {
            (number, "running_mean")
            for number, module in enumerate(self._modules)
            if module.training and isinstance(module, Deferred)
        }
        for number, name in sorted(changed):
            owner = type(self._modules[number]).__name__
            raise ModelError(
                f"stage {self._number} has replicas on several devices, and its "
                f"{owner} changes {name!r} in forward: which micro-batches a replica "
                "sees depends on the schedule, and so would the result; freeze it "
                "(eval), or use a schedule of one pipe"
            )

    def _refuse_shared(self, changed: Iterable[Where]) -> None:
        for where in sorted(set(changed) & self.shared.keys()):
            owner = type(self._modules[where[0]]).__name__
            raise ModelError(
                f"stages {self.shared[where]} share a {owner}, which changes "
                f"{where[1]!r} in forward: in which order depends on the schedule, and "
                "so would the result; freeze it (eval), or give each stage its own"
            )

    @contextmanager
    def rewound(self, unit: Hashable) -> Iterator[None]:
        """Run a forward again on what it found, and without its effect.

        Args:
            unit: whose forward ran in `noting_changes`.
        """
        kept = self._kept.pop(unit, _NOTHING)
        now = {
            (number, name): self._modules[number]._buffers.get(name)
            for number, name in self._changed
        }
        attributes = {number: self._attributes(number) for number in kept.attributes}
        once = Once()
        copies = {
            where: once.copy(buffer)
            for where, buffer in now.items()
            if buffer is not None and where not in kept.buffers
        }
        self._put(kept.attributes, {**copies, **kept.buffers})
        try:
            yield
        finally:
            self._put(attributes, now)

    def _put(
        self,
        attributes: Mapping[int, Attributes],
        buffers: Mapping[Where, Tensor | None],
    ) -> None:
        """Have modules hold these, and nothing where a buffer is None."""
        for number, wanted in attributes.items():
            held = vars(self._modules[number])
            for name in held.keys() - wanted.keys():
                del held[name]
            held.update(wanted)
        for (number, name), buffer in buffers.items():
            there = self._modules[number]._buffers
            if buffer is None:
                there.pop(name, None)
            else:
                there[name] = buffer
