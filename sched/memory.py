"""Live bytes and live activations over time, from a trace's buffers.

A buffer is born when the first instruction that writes it starts and dies when
the one that frees it ends. At equal times, births and deaths go in the
program's order, so what one op frees is gone before the next op's are born.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, plain
from pipeproof.sched.program import BufferKind, Program

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


@dataclass(frozen=True)
class Sizes:
    """What each buffer of a program weighs.

    Attributes:
        activations: per buffer, in micro-batches of its device's share.
        bytes: per buffer, or None where bytes are not known.
        resident: bytes that each device holds all the time, by class.
    """

    activations: NDArray[Any]
    bytes: NDArray[Any] | None = None
    resident: Mapping[str, list[Number]] | None = None

    def known_bytes(self) -> NDArray[Any]:
        """The bytes.

        Raises:
            ParameterError: there are none.
        """
        if self.bytes is None:
            raise ParameterError(
                "no bytes are known: give the Cost activation_bytes, boundary_bytes, "
                "weight_bytes, …"
            )
        return self.bytes


@dataclass(frozen=True)
class Curve:
    """How much is alive, over time.

    Attributes:
        time: of each change, ascending.
        by_class: for each class, what is alive from that time on.
    """

    time: NDArray[Any]
    by_class: Mapping[str, NDArray[Any]]

    @cached_property
    def total(self) -> NDArray[Any]:
        """All classes together, but for what lies on the host."""
        columns = [line for name, line in self.by_class.items() if name != HOST]
        return sum(columns[1:], start=columns[0])

    @property
    def peak(self) -> Number:
        """The most alive at once."""
        return plain(max(self.total.tolist()))

    def at_peak(self) -> dict[str, Number]:
        """Each class when the total first is at its peak."""
        where = int(np.argmax(self.total))
        return {name: plain(line[where]) for name, line in self.by_class.items()}


HOST = BufferKind.HOST.name.lower()


def lifetimes(program: Program) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each buffer its first writer and its freer; -1 if nothing frees it."""
    born = np.full(len(program.buffers), len(program), dtype=np.int64)
    np.minimum.at(born, program.writes.values, program.writes.owner)
    died = np.full(len(program.buffers), -1, dtype=np.int64)
    died[program.frees.values] = program.frees.owner
    return born, died


class Ledger:
    """Every birth and death of a trace's buffers, in order of time.

    A GRADIENT is left out: gradients outlive the step, and are resident.

    Args:
        trace: when instructions ran.
        weight: per buffer, what it counts.
        resident: what each device holds all the time, by class.
    """

    def __init__(
        self,
        trace: Trace,
        weight: NDArray[Any],
        resident: Mapping[str, list[Number]] | None = None,
    ) -> None:
        program = trace.program
        kind, device = program.buffers[:, 0], program.buffers[:, 1]
        counted = (kind != BufferKind.GRADIENT) & (weight != 0).astype(np.bool_)
        buffers = np.flatnonzero(counted)
        born, died = lifetimes(program)
        dying = buffers[died[buffers] >= 0]
        time = np.concatenate([trace.start[born[buffers]], trace.end[died[dying]]])
        order = np.concatenate([2 * born[buffers], 2 * died[dying] + 1])
        sorting = np.lexsort((order, _sortable(time)))
        self._time = time[sorting]
        self._change = np.concatenate([weight[buffers], -weight[dying]])[sorting]
        self._kind = np.concatenate([kind[buffers], kind[dying]])[sorting]
        self._device = np.concatenate([device[buffers], device[dying]])[sorting]
        self._resident = resident or {}
        self._devices = program.schedule.devices

    def curve(self, device: int | None = None) -> Curve:
        """What is alive over time, on one device or on all together."""
        mine = slice(None) if device is None else np.flatnonzero(self._device == device)
        time, change, kind = self._time[mine], self._change[mine], self._kind[mine]
        zero = np.zeros(1, dtype=change.dtype)
        lines: dict[str, NDArray[Any]] = {}
        for name, held in self._resident.items():
            constant = sum(held) if device is None else held[device]
            lines[name] = np.full(len(time) + 1, constant)
        for member in BufferKind:
            if member != BufferKind.GRADIENT:
                steps = np.where(kind == member, change, 0)
                lines[member.name.lower()] = np.cumsum(np.concatenate([zero, steps]))
        start = np.zeros(1, dtype=time.dtype)
        return Curve(np.concatenate([start, time]), lines)

    def peaks(self) -> list[Number]:
        """The most alive at once on each device, without what lies on the host."""
        here = np.flatnonzero(self._kind != BufferKind.HOST)
        device = self._device[here]
        by_device = here[np.argsort(device, kind="stable")]
        counts = np.bincount(device, minlength=self._devices)
        changes = np.split(self._change[by_device], np.cumsum(counts)[:-1])
        held = [
            sum(row[device] for row in self._resident.values())
            for device in range(self._devices)
        ]
        return [
            plain(base + max(np.cumsum(change).max(initial=0), 0))
            for base, change in zip(held, changes)
        ]


def _sortable(time: NDArray[Any]) -> NDArray[Any]:
    """Fractions as their ranks, since numpy sorts no objects by two keys."""
    if time.dtype != object:
        return time
    ranks = {value: rank for rank, value in enumerate(sorted(set(time.tolist())))}
    return np.array([ranks[value] for value in time.tolist()], dtype=np.int64)
