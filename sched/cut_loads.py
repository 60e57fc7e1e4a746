"""What cuts of a model's layers into stages ask of each device, in time and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.in_flight import InFlight, in_flight
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer, with_memory

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

ROUNDING = 1e-9
"""Relative; what a prefix sum may be off by, with room to spare."""


class Loads:
    """What a stage of some layers adds to quantities of the devices that hold it.

    Each quantity is linear: a factor for each property of the layers, summed over
    the stage, and one for those of its first layer.

    Attributes:
        prefix: of each property, its sums over the first 0, 1, … layers.
        first: of each property, of each layer if it is a stage's first.
        factors: [device, quantity, stage, property].
        firsts: likewise, for `first`.
        across: [start, end], what comes to a stage of these layers over skip
            connections from before it; None where the model has none.
        acrosses: [device, quantity, stage], its factors.
    """

    def __init__(
        self,
        prefix: Floats,
        first: Floats,
        factors: Floats,
        firsts: Floats,
        across: Floats | None = None,
        acrosses: Floats | None = None,
    ) -> None:
        self.prefix, self.first = prefix, first
        self.factors, self.firsts = factors, firsts
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
        result += (self.firsts[device, :, stage] @ self.first[:, start]).T
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
        nothing = np.zeros((1, len(forward)))
        firsts = np.zeros((*factors.shape[:3], 1))
        return Loads(_prefix(forward, backward), nothing, factors, firsts)

    def _bytes(
        self,
        layers: Sequence[Layer],
        weights: Floats,
        activations: Floats,
        entry: Floats,
        counts: InFlight,
    ) -> Loads:
        moments = max(len(peaks) for peaks in counts.peaks)
        size = self._schedule.devices, moments, self._schedule.stages, 2
        factors, firsts = np.zeros(size), np.zeros(size)
        acrosses = np.zeros(size[:3])
        holds = counts.forwards > 0
        factors[..., 0] = holds[:, None]
        for device, peaks in enumerate(counts.peaks):
            whole, stored, rebuilt = peaks.transpose(1, 0, 2)
            factors[device, : len(peaks), :, 1] = whole + rebuilt
            firsts[device, : len(peaks), :, 0] = whole + rebuilt
            # What an R adds to a stored input is all but that.
            firsts[device, : len(peaks), :, 1] = stored - rebuilt
            acrosses[device, : len(peaks)] = whole + stored
        unkept = np.array([not layer.keeps_input for layer in layers])
        first = np.stack([np.where(unkept, entry, 0), entry])
        across = _across(layers) if any(layer.takes for layer in layers) else None
        prefix = _prefix(weights, activations)
        return Loads(prefix, first, factors, firsts, across, acrosses)

    def _least(self, cost: Floats, counts: InFlight, speed: Floats) -> float:
        """All work on all devices, and the longest layer where it is shortest."""
        whole = float(self.work.prefix[-1] / speed.sum())
        fastest = np.where(counts.forwards.T > 0, speed, 0).max(axis=1)
        copies = (counts.forwards > 0).sum(0)
        one = (cost / (fastest * copies)[:, None]).min(axis=0)
        return max(whole, float(one.max())) * (1 - ROUNDING)


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
    if (loss := layers[-1].loss) is not None and name != "input":
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
