"""What cuts of a model's layers into stages ask of each device, in time and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.in_flight import InFlight, in_flight, largest, live_at_moments
from pipeproof.sched.in_transit import in_transit, stages_held
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer, with_memory

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

ROUNDING = 1e-9
"""Relative; what a prefix sum may be off by, with room to spare."""

BLOCK = 2048
"""Partitions that are looked at together: what is known of them stays in a cache."""


class Loads:
    """What a stage of some layers adds to quantities of the devices that hold it.

    Each quantity is linear: a factor for each property of the layers, summed over
    the stage, and one for those of the cuts at both of its ends.

    Attributes:
        prefix: of each property, its sums over the first 0, 1, … layers.
        first: of each property, of a cut where a stage begins, at 0, 1, … layers.
        last: likewise, where it ends.
        factors: [device, quantity, stage, property].
        firsts, lasts: likewise, for `first` and `last`.
        across: [start, end], what comes to a stage of these layers over skip
            connections from before it; None where the model has none.
        acrosses: [device, quantity, stage], its factors.
    """

    def __init__(
        self,
        prefix: Floats,
        factors: Floats,
        first: Floats | None = None,
        firsts: Floats | None = None,
        last: Floats | None = None,
        lasts: Floats | None = None,
        across: Floats | None = None,
        acrosses: Floats | None = None,
    ) -> None:
        self.prefix, self.factors = prefix, factors
        self.first, self.firsts = first, firsts
        self.last, self.lasts = last, lasts
        self.across, self.acrosses = across, acrosses

    @property
    def quantities(self) -> int:
        """How many."""
        return len(self.factors[0])

    def held_by(self) -> list[list[int]]:
        """Of each device, its stages."""
        held = np.asarray(self.factors.any(axis=(1, 3)))
        return [np.flatnonzero(held[device]).tolist() for device in range(len(held))]

    def of_stage(self, device: int, stage: int, start: Index, end: Index) -> Floats:
        """[case, quantity] of stages of these layers, start inclusive, end not."""
        inside = self.prefix[:, end] - self.prefix[:, start]
        result: Floats = (self.factors[device, :, stage] @ inside).T
        if self.first is not None and self.firsts is not None:
            result += (self.firsts[device, :, stage] @ self.first[:, start]).T
        if self.last is not None and self.lasts is not None:
            result += (self.lasts[device, :, stage] @ self.last[:, end]).T
        if self.across is not None and self.acrosses is not None:
            result += np.outer(self.across[start, end], self.acrosses[device, :, stage])
        return result

    def of(self, cuts: Index) -> Floats:
        """[device, quantity] of one partition."""
        total = np.zeros(self.factors.shape[:2])
        for device, stages in enumerate(self.held_by()):
            for stage in stages:
                ends = cuts[stage : stage + 1], cuts[stage + 1 : stage + 2]
                total[device] += self.of_stage(device, stage, *ends)[0]
        return total

    def fit(
        self, device: int, stages: Sequence[int], cuts: Index, limit: float
    ) -> NDArray[np.bool_]:
        """Of many partitions, where these stages' quantities are within a limit."""
        result = np.ones(len(cuts), dtype=np.bool_)
        for first in range(0, len(cuts), BLOCK):
            some = cuts[first : first + BLOCK]
            total = np.zeros((len(some), self.quantities), order="F")
            for stage in stages:
                total += self.of_stage(
                    device, stage, some[:, stage], some[:, stage + 1]
                )
            result[first : first + BLOCK] = total.max(axis=1) <= limit
        return result

    def relative_to(self, limits: Floats) -> Loads:
        """The same quantities as parts of each device's limit."""

        def divided(factors: Floats | None) -> Floats | None:
            if factors is None:
                return None
            shape = (len(limits), *[1] * (factors.ndim - 1))
            result: Floats = factors / limits.reshape(shape)
            return result

        factors = divided(self.factors)
        assert factors is not None
        return Loads(
            self.prefix,
            factors,
            self.first,
            divided(self.firsts),
            self.last,
            divided(self.lasts),
            self.across,
            divided(self.acrosses),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """All that the devices have to do together.

    Attributes:
        prefix: time that the first 0, 1, … layers take at least, of all their copies.
        speed: of each device.
    """

    prefix: Floats
    speed: Floats


class Question:
    """Layers, schedule and devices, as numbers.

    Attributes:
        time: one quantity, the time that a device computes in a step.
        bytes: one for each moment at which a device may have most.
        caps: what `bytes` must not exceed, with its limit for each device; None
            where there is none.
        least: a time that no partition's busiest device goes below.
        work: what is to be shared out.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        schedule: Schedule,
        speeds: Sequence[float] | None,
        memory: float | Sequence[float] | None,
    ) -> None:
        devices, stages = schedule.devices, schedule.stages
        if len(layers) < stages:
            raise ParameterError(
                f"{len(layers)} layers cannot fill {stages} stages: use fewer stages, "
                "or cut the model into smaller layers"
            )
        self._schedule = schedule
        speed = _per_device("speeds", 1 if speeds is None else speeds, devices)
        columns = [
            _numbers(layers, name)
            for name in ("forward", "backward", "weights", "activations", "input")
        ]
        forward, backward, weights, activations, entry = columns
        counts = in_flight(schedule)
        self.time = self._times(forward, backward, counts, speed)
        _leave_out_the_batch(layers, activations, entry)
        self.bytes = self._bytes(layers, weights, activations, entry, counts)
        self.caps: tuple[Loads, Floats] | None = None
        if memory is not None:
            self.caps = self.bytes, _per_device("memory", memory, devices)
        forwards, backwards = counts.forwards.sum(0), counts.backwards.sum(0)
        cost = np.outer(forwards, forward) + np.outer(backwards, backward)
        self.work = Work(_prefix(cost.min(axis=0))[0], speed)
        self.least = self._least(cost, counts, speed)

    def _times(
        self, forward: Floats, backward: Floats, counts: InFlight, speed: Floats
    ) -> Loads:
        ran = np.stack([counts.forwards, counts.backwards], axis=-1)
        factors = ran[:, None].astype(float) / speed[:, None, None, None]
        return Loads(_prefix(forward, backward), factors)

    def _bytes(
        self,
        layers: Sequence[Layer],
        weights: Floats,
        activations: Floats,
        entry: Floats,
        counts: InFlight,
    ) -> Loads:
        takes = any(layer.takes for layer in layers)
        peaks_of = list(_peaks(self._schedule, skips=takes))
        moments = max(len(peaks) for peaks in peaks_of)
        size = self._schedule.devices, moments, self._schedule.stages
        factors, firsts = np.zeros((*size, 2)), np.zeros((*size, 3))
        lasts, acrosses = np.zeros((*size, 1)), np.zeros(size)
        factors[..., 0] = (counts.forwards > 0)[:, None]
        for device, peaks in enumerate(peaks_of):
            here = device, slice(len(peaks))
            full, inputs, going, returned, *held = peaks.swapaxes(0, 1)
            factors[here][..., 1] = full
            firsts[here][..., 0] = full
            firsts[here][..., 1] = inputs - full  # which include theirs
            firsts[here][..., 2] = returned
            lasts[here][..., 0] = going
            acrosses[here] = held[0] if takes else 0
        unkept = np.array([not layer.keeps_input for layer in layers])
        output = np.array([0.0, *_numbers(layers, "output")])
        first = np.stack([np.where(unkept, entry, 0), entry, output[:-1]])
        across = _across(layers) if takes else None
        prefix = _prefix(weights, activations)
        return Loads(
            prefix, factors, first, firsts, output[None], lasts, across, acrosses
        )

    def _least(self, cost: Floats, counts: InFlight, speed: Floats) -> float:
        """All work on all devices, and the longest layer where it is shortest."""
        whole = float(self.work.prefix[-1] / speed.sum())
        fastest = np.where(counts.forwards.T > 0, speed, 0).max(axis=1)
        copies = (counts.forwards > 0).sum(0)
        one = (cost / (fastest * copies)[:, None]).min(axis=0)
        return max(whole, float(one.max())) * (1 - ROUNDING)


def _peaks(schedule: Schedule, *, skips: bool) -> Iterator[Floats]:
    """Of each device, [moment, class, stage] that it holds when it may have most.

    The classes are all activations; all inputs, of these and of what is stored or has
    arrived; outputs and their gradients; gradients of inputs; and, with skips, what
    is kept of micro-batches, whole or stored. A stage with one more of any takes more.
    """
    columns = stages_held(schedule), live_at_moments(schedule), in_transit(schedule)
    for stages, kept, beside in zip(*columns):
        whole, stored, rebuilt = kept.swapaxes(0, 1)
        arriving, going, returned = beside.swapaxes(0, 1)
        held = whole + stored
        classes = [whole + rebuilt, held + arriving, going, returned]
        found = largest(np.stack([*classes, *([held] if skips else [])], axis=1))
        peaks = np.zeros((*found.shape[:2], schedule.stages))
        peaks[..., stages] = found
        yield peaks


def _leave_out_the_batch(
    layers: Sequence[Layer], activations: Floats, entry: Floats
) -> None:
    """The first stage's input is a view of the batch, and weighs nothing.

    Raises:
        ParameterError: a first layer that keeps its input, and less than that.
    """
    with_memory(layers[:1])
    if layers[0].keeps_input:
        activations[0] -= entry[0]
    entry[0] = 0


def _prefix(*columns: Floats) -> Floats:
    return np.stack([np.concatenate([[0.0], np.cumsum(column)]) for column in columns])


def _across(layers: Sequence[Layer]) -> Floats:
    """[start, end]: bytes that skips bring to a stage of these from layers before.

    Not of what a layer's activations count already, since its backward reads it.
    """
    count = len(layers)
    of_layer = np.zeros((count + 1, count))
    for number, layer in enumerate(layers):
        (memory,) = with_memory([layer])
        read = {at for at, _ in memory.kept}
        for (source, _), pieces in zip(layer.takes, memory.beside):
            size = sum(bytes_ for at, bytes_ in pieces if at not in read)
            of_layer[source + 1 : number + 1, number] += size
    return np.concatenate([np.zeros((count + 1, 1)), np.cumsum(of_layer, axis=1)], 1)


def _numbers(layers: Sequence[Layer], name: str) -> Floats:
    result = np.array([getattr(layer, name) for layer in layers], dtype=float)
    if (loss := layers[-1].loss) is not None and name not in ("input", "output"):
        result[-1] += getattr(loss, name)
    for number, value in enumerate(result.tolist()):
        if not (math.isfinite(value) and value >= 0):
            raise ParameterError(
                f"layer {number}: {name} must be a finite number of at least 0, got "
                f"{value}"
            )
    return result


def _per_device(name: str, value: Any, devices: int) -> Floats:
    result = np.array(value, dtype=float)
    if result.ndim == 0:
        result = np.full(devices, result)
    if result.shape != (devices,):
        raise ParameterError(
            f"{name} must be one number for each of {devices} devices, got "
            f"{len(result)}"
        )
    if not (np.isfinite(result) & (result > 0)).all():
        raise ParameterError(
            f"{name} must be finite and above 0, got {result.tolist()}"
        )
    return result
