"""What cuts of a model's layers into stages ask of each device, in time and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.holdings import Held, holdings, largest, skips_between_any
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer
from pipeproof.sched.runs import Runs, runs_of
from pipeproof.sched.spans import LayerSpans, Spans

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

ROUNDING = 1e-9
"""Relative; what a prefix sum may be off by, with room to spare."""

FULL = ((Held.KEPT, Held.AGAIN), (Held.LEFT, Held.AGAIN_LEFT))
"""Without and with an R, which rebuilds all: until I, and until W."""

BYTES = ("activations", "input", "output")
"""Of a layer, beside its weights."""

BLOCK = 2048
"""Partitions that are looked at together: what is known of them stays in a cache."""


class Loads:
    """What a stage of some layers adds to quantities of the devices that hold it.

    Each quantity is linear: a factor for each property of the stage.

    Attributes:
        properties: of stages, by the layers at which they begin and end.
        factors: [device, quantity, stage, property].
    """

    def __init__(self, properties: Sequence[Spans], factors: Floats) -> None:
        self.properties, self.factors = properties, factors

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.properties[0].prefix) - 1

    @property
    def quantities(self) -> int:
        """How many."""
        return len(self.factors[0])

    def held_by(self) -> list[list[int]]:
        """Of each device, its stages."""
        held = np.asarray(self.factors.any(axis=(1, 3)))
        return [np.flatnonzero(held[device]).tolist() for device in range(len(held))]

    def reach(
        self, device: int, stage: int, end: Index, room: Floats, direction: int
    ) -> Index:
        """How far a stage from one end can go, at most, within what room there is."""
        best = np.full(len(end), self.layers if direction > 0 else 0)
        bounds = np.array([one.at_least() for one in self.properties])
        for to, begin in np.einsum(
            "qp,pel->qel", self.factors[device, :, stage], bounds
        ):
            room_left = room + ROUNDING * (abs(room) + to[-1])
            if direction > 0:
                reach = np.searchsorted(to, begin[end] + room_left, "right") - 1
                best = np.minimum(best, reach)
            else:
                first = np.maximum.accumulate(begin)
                reach = np.searchsorted(first, to[end] - room_left, "left")
                best = np.maximum(best, reach)
        return best

    def of_stage(self, device: int, stage: int, start: Index, end: Index) -> Floats:
        """[case, quantity] of stages of these layers, start inclusive, end not."""
        factors = self.factors[device, :, stage]
        used = np.flatnonzero(factors.any(axis=0)).tolist()
        if not used:
            return np.zeros((len(start), self.quantities))
        numbers = np.stack([self.properties[place].of(start, end) for place in used])
        result: Floats = (factors[:, used] @ numbers).T
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
        return Loads(self.properties, self.factors / limits[:, None, None, None])


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
            for name in ("forward", "backward", "weights", *BYTES)
        ]
        forward, backward, weights = columns[:3]
        counts = runs_of(schedule)
        spans = LayerSpans.of(layers)
        ran = np.stack([counts.forwards, counts.backwards], axis=-1)
        self.time = Loads(
            [_sums(forward), _sums(backward)], ran[:, None] / speed[:, None, None, None]
        )
        self.bytes = self._bytes(spans, _sums(weights), counts)
        self.caps: tuple[Loads, Floats] | None = None
        if memory is not None:
            self.caps = self.bytes, _per_device("memory", memory, devices)
        forwards, backwards = counts.forwards.sum(0), counts.backwards.sum(0)
        cost = np.outer(forwards, forward) + np.outer(backwards, backward)
        self.work = Work(_sums(cost.min(axis=0)).prefix, speed)
        self.least = self._least(cost, counts, speed)

    def _bytes(self, spans: LayerSpans, weights: Spans, counts: Runs) -> Loads:
        skips = spans.given.across is not None
        peaks_of = list(_peaks(self._schedule, skips=skips))
        moments = max(len(peaks) for _, peaks in peaks_of)
        properties = [weights, spans.kept, spans.left, spans.input, spans.output]
        properties += [spans.before, spans.brought, spans.given][: 3 if skips else 1]
        size = self._schedule.devices, moments, self._schedule.stages, len(properties)
        factors = np.zeros(size)
        factors[..., 0] = (counts.forwards > 0)[:, None]
        for device, (stages, peaks) in enumerate(peaks_of):
            for place, stage in enumerate(stages):
                factors[device, : len(peaks), stage, 1:] = peaks[:, :, place]
        return Loads(properties, factors)

    def _least(self, cost: Floats, counts: Runs, speed: Floats) -> float:
        """All work on all devices, and the longest layer where it is shortest."""
        whole = float(self.work.prefix[-1] / speed.sum())
        fastest = np.where(counts.forwards.T > 0, speed, 0).max(axis=1)
        copies = (counts.forwards > 0).sum(0)
        one = (cost / (fastest * copies)[:, None]).min(axis=0)
        return max(whole, float(one.max())) * (1 - ROUNDING)


def _peaks(schedule: Schedule, *, skips: bool) -> Iterator[tuple[list[int], Floats]]:
    """Of each device its stages, and [moment, property, stage] when it may have most.

    The properties are those of `LayerSpans`. Where there are skips, it has as many of
    what one brings, and takes along, as of the skip of which there are most.
    """
    over = skips_between_any(schedule) if skips else None
    for device, here in enumerate(holdings(schedule, more_skips=skips)):
        held = here.held.swapaxes(0, 1)
        first, left = (held[a] + held[b] for a, b in FULL)
        classes = [first, left - first, held[Held.INPUT] + held[Held.STORED]]
        classes += [held[Held.GOING], held[Held.RETURNED]]
        if over is not None:
            came = held[Held.INPUT] + held[Held.STORED] + held[Held.RETURNED]
            brought, given = over[device][:, :, here.stages]
            classes += [np.maximum(came, brought), np.maximum(held[Held.GOING], given)]
        rows = np.stack(classes, axis=1)
        found = largest(rows.reshape(len(rows), -1))
        yield here.stages, found.reshape(-1, *rows.shape[1:])


def _sums(column: Floats) -> Spans:
    found = Spans.none(len(column))
    found.prefix[1:] = np.cumsum(column)
    return found


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
