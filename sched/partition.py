"""Where to cut a model's layers, so that the busiest device is least busy.

Devices are filled one after the other. What is placed of the model is then some
runs of consecutive stages, and all that the rest of the search needs to know of
them is where they begin and end; of all ways to come to the same ends, the one
whose busiest device is least busy is kept::

    looped, device 0 and 1 of 3      0 ███████ x ─────── a ███████ y ─────── n
    V                                0 ███████ x ─────────────── y ███████ n

So a linear placement is the well-known dynamic programme over one cut, V over two
and a looped one of two chunks over three. The search is run for a bound a little
above what no partition can beat, and for larger ones until there is a solution: a
tight bound leaves few states.
"""

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
from pipeproof.sched.layers import Layer

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

MOST_STATES = 4_000_000
"""Ways to fill some devices that are kept, before some are let go of."""
FIRST_SLACK = 1 / 512
"""Of the first bound, above what no partition can beat; then eight times as much."""
ROUNDING = 1e-9
"""Relative; what a prefix sum may be off by, with room to spare."""
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Partition:
    """A model's layers in stages.

    Attributes:
        sizes: layers in each stage.
        busy: time that each device computes in a step.
        bytes: weights and activations on each device when it has most.
        exact: whether no partition has a smaller bottleneck; False only where more
            than `MOST_STATES` ways to cut had to be compared.
        bound: time of the busiest device below which no partition comes: the
            bottleneck itself where that is exact.
    """

    sizes: tuple[int, ...]
    busy: tuple[float, ...]
    bytes: tuple[float, ...]
    exact: bool
    bound: float

    @property
    def bottleneck(self) -> float:
        """Time that the busiest device computes in a step."""
        return max(self.busy)


def partition(
    layers: Sequence[Layer],
    schedule: Schedule,
    *,
    speeds: Sequence[float] | None = None,
    memory: float | Sequence[float] | None = None,
) -> Partition:
    """The cuts into stages with the least busy busiest device.

    A device is busy with all its stages: with its share of the forwards,
    recomputations and backwards that the schedule gives it. Its memory is that of
    its stages' weights and of as many activations and stored inputs of each as the
    schedule keeps at once; tensors on their way between stages, and what an op needs
    only while it runs, are not counted. What a split backward keeps for W counts as
    the whole activation.

    Args:
        layers: in order, at least as many as stages.
        schedule: which device runs what, and how often.
        speeds: of each device, relative to that of the layers' times; default all 1.
        memory: bytes of each device, or of each single one; default no limit.

    Raises:
        ParameterError: fewer layers than stages, numbers that are none or negative,
            speeds or memory for another number of devices, or no partition fits.
    """
    question = _Question(layers, schedule, speeds, memory)
    cuts, exact = _Search(question.time, question.caps, question.least).best()
    if cuts is None and not exact:
        raise ParameterError(
            f"more than {MOST_STATES:,} ways to cut {len(layers)} layers would have to "
            "be compared, and none was found that fits: join layers, or give the "
            "devices more memory"
        )
    if cuts is None:
        raise ParameterError(question.too_small())
    sizes = tuple(int(size) for size in np.diff(cuts))
    busy = tuple(float(x) for x in question.time.of(cuts).max(axis=1))
    taken = tuple(float(x) for x in question.bytes.of(cuts).max(axis=1))
    return Partition(sizes, busy, taken, exact, max(busy) if exact else question.least)


def loads(
    layers: Sequence[Layer], schedule: Schedule, sizes: Sequence[int]
) -> tuple[list[float], list[float]]:
    """What given cuts ask of each device: its time in a step, and most bytes at once.

    Args:
        layers: as for `partition`.
        schedule: likewise.
        sizes: layers in each stage.

    Raises:
        ParameterError: sizes that are not those of the layers in the stages.
    """
    check_sizes(sizes, layers, schedule)
    question = _Question(layers, schedule, None, None)
    cuts = np.concatenate([[0], np.cumsum(sizes)])
    busy, taken = question.time.of(cuts), question.bytes.of(cuts)
    return busy.max(axis=1).tolist(), taken.max(axis=1).tolist()


def check_sizes(
    sizes: Sequence[int], layers: Sequence[Layer], schedule: Schedule
) -> None:
    """Refuse sizes of other stages than the schedule's, or of other layers.

    Raises:
        ParameterError: says what they must be.
    """
    if len(sizes) != schedule.stages or sum(sizes) != len(layers) or min(sizes) < 1:
        raise ParameterError(
            f"sizes must be {schedule.stages} numbers of at least 1, one for each "
            f"stage, that sum to {len(layers)} layers, got {list(sizes)}"
        )


class _Loads:
    """What a stage of some layers adds to quantities of the devices that hold it.

    Each quantity is linear: a factor for each property of the layers, summed over
    the stage, and one for those of its first layer.

    Attributes:
        prefix: of each property, its sums over the first 0, 1, … layers.
        first: of each property, of each layer if it is a stage's first.
        factors: [device, quantity, stage, property].
        firsts: likewise, for `first`.
    """

    def __init__(
        self, prefix: Floats, first: Floats, factors: Floats, firsts: Floats
    ) -> None:
        self.prefix, self.first = prefix, first
        self.factors, self.firsts = factors, firsts

    @property
    def quantities(self) -> int:
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
        return result

    def of(self, cuts: Index) -> Floats:
        """[device, quantity] of one partition."""
        total = np.zeros(self.factors.shape[:2])
        for device, stages in enumerate(self.held_by()):
            for stage in stages:
                ends = cuts[stage : stage + 1], cuts[stage + 1 : stage + 2]
                total[device] += self.of_stage(device, stage, *ends)[0]
        return total


class _Question:
    """Layers, schedule and devices, as numbers.

    Attributes:
        time: one quantity, the time that a device computes in a step.
        bytes: one for each moment at which a device may have most.
        caps: what `bytes` must not exceed, with its limit for each device; None
            where there is none.
        least: a time that no partition's busiest device goes below.
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
        self.caps: tuple[_Loads, Floats] | None = None
        if memory is not None:
            self.caps = self.bytes, _per_device("memory", memory, devices)
        self.least = self._least(forward, backward, counts, speed)

    def _times(
        self, forward: Floats, backward: Floats, counts: InFlight, speed: Floats
    ) -> _Loads:
        ran = np.stack([counts.forwards, counts.backwards], axis=-1)
        factors = ran[:, None].astype(float) / speed[:, None, None, None]
        nothing = np.zeros((1, len(forward)))
        firsts = np.zeros((*factors.shape[:3], 1))
        return _Loads(_prefix(forward, backward), nothing, factors, firsts)

    def _bytes(
        self,
        layers: Sequence[Layer],
        weights: Floats,
        activations: Floats,
        entry: Floats,
        counts: InFlight,
    ) -> _Loads:
        moments = max(len(peaks) for peaks in counts.peaks)
        size = self._schedule.devices, moments, self._schedule.stages, 2
        factors, firsts = np.zeros(size), np.zeros(size)
        holds = counts.forwards > 0
        factors[..., 0] = holds[:, None]
        for device, peaks in enumerate(counts.peaks):
            whole, stored, rebuilt = peaks.transpose(1, 0, 2)
            factors[device, : len(peaks), :, 1] = whole + rebuilt
            firsts[device, : len(peaks), :, 0] = whole + rebuilt
            # What an R adds to a stored input is all but that.
            firsts[device, : len(peaks), :, 1] = stored - rebuilt
        unkept = np.array([not layer.keeps_input for layer in layers])
        first = np.stack([np.where(unkept, entry, 0), entry])
        return _Loads(_prefix(weights, activations), first, factors, firsts)

    def _least(
        self, forward: Floats, backward: Floats, counts: InFlight, speed: Floats
    ) -> float:
        """All work on all devices, and the longest layer where it is shortest."""
        forwards, backwards = counts.forwards.sum(0), counts.backwards.sum(0)
        cost = np.outer(forwards, forward) + np.outer(backwards, backward)
        whole = float(cost.min(axis=0).sum() / speed.sum())
        fastest = np.where(counts.forwards.T > 0, speed, 0).max(axis=1)
        copies = (counts.forwards > 0).sum(0)
        one = (cost / (fastest * copies)[:, None]).min(axis=0)
        return max(whole, float(one.max())) * (1 - ROUNDING)

    def too_small(self) -> str:
        """Why no partition fits, with what would."""
        assert self.caps is not None
        loads, limits = self.caps
        per_byte = 1 / limits[:, None, None, None]
        factors, firsts = loads.factors * per_byte, loads.firsts * per_byte
        relative = _Loads(loads.prefix, loads.first, factors, firsts)
        cuts, _ = _Search(relative, None, 1.0).best()
        assert cuts is not None
        share = relative.of(cuts).max(axis=1)
        device = int(np.argmax(share))
        needed = float(loads.of(cuts)[device].max())
        return (
            f"no partition of {loads.prefix.shape[1] - 1} layers fits: the one that "
            f"comes closest needs {needed:,.0f} bytes on device {device}, which has "
            f"{limits[device]:,.0f}: use more devices, recomputation, or a schedule "
            "with fewer activations at once"
        )


class _Search:
    """Fills the devices in turn.

    Args:
        objective: the largest quantity of any device is to be smallest.
        caps: others, and what they must not exceed on each device.
        least: what the objective cannot go below.
    """

    def __init__(
        self, objective: _Loads, caps: tuple[_Loads, Floats] | None, least: float
    ) -> None:
        self._objective, self._caps, self._least = objective, caps, least
        self._layers = objective.prefix.shape[1] - 1
        self._stages = objective.factors.shape[2]
        self._held_by = objective.held_by()
        # Those that hold the same stages, in two pipes, follow each other.
        self._order = sorted(range(len(self._held_by)), key=self._held_by.__getitem__)
        self._exact = True

    def best(self) -> tuple[Index | None, bool]:
        """The cuts 0, …, layers; None where none keeps to the caps. Whether exact."""
        slack = FIRST_SLACK
        while True:
            limit = self._least * (1 + slack) if self._least > 0 else math.inf
            if slack > 1e6:  # nothing is left that a bound could rule out
                limit = math.inf
            found = self._within(limit)
            if found is not None or limit == math.inf:
                return found, self._exact
            slack *= 8

    def _within(self, limit: float) -> Index | None:
        """The best whose objective is at most `limit`."""
        cuts = np.full((1, self._stages + 1), UNKNOWN, dtype=np.int64)
        cuts[0, 0], cuts[0, -1] = 0, self._layers
        worst = np.zeros(1)
        placed = np.zeros(self._stages, dtype=bool)
        for place, device in enumerate(self._order):
            stages = self._held_by[device]
            cuts, worst = self._fill(device, stages, placed, cuts, worst, limit)
            placed[stages] = True
            others = self._order[place + 1 :]
            if others and self._held_by[others[0]] == stages:
                continue  # which needs all of these cuts
            cuts, worst = self._distinct(others, cuts, worst)
            if not len(cuts):
                return None
        best: Index = cuts[int(np.argmin(worst))]
        return best

    def _fill(
        self,
        device: int,
        stages: list[int],
        placed: NDArray[np.bool_],
        cuts: Index,
        worst: Floats,
        limit: float,
    ) -> tuple[Index, Floats]:
        """All ways to give a device its stages."""
        load = np.zeros((len(cuts), self._objective.quantities))
        held = None
        if self._caps is not None:
            held = np.zeros((len(cuts), self._caps[0].quantities))
        placed = placed.copy()
        for stage in stages:
            if not placed[stage]:
                placed[stage] = True
                source, cuts = self._expand(
                    device, stage, cuts, limit - load.max(axis=1)
                )
                load, worst = load[source], worst[source]
                held = None if held is None else held[source]
            ends = cuts[:, stage], cuts[:, stage + 1]
            load = load + self._objective.of_stage(device, stage, *ends)
            good = load.max(axis=1) <= limit
            if held is not None and self._caps is not None:
                loads, caps = self._caps
                held = held + loads.of_stage(device, stage, *ends)
                good &= held.max(axis=1) <= caps[device]
                held = held[good]
            cuts, load, worst = cuts[good], load[good], worst[good]
        return cuts, np.maximum(worst, load.max(axis=1, initial=0))

    def _expand(
        self, device: int, stage: int, cuts: Index, room: Floats
    ) -> tuple[Index, Index]:
        """Each state with all ways to choose the ends of a stage that are open."""
        source = np.arange(len(cuts))
        if len(cuts) and cuts[0, stage] == UNKNOWN:
            low, high = self._between(stage, cuts)
            if cuts[0, stage + 1] != UNKNOWN:
                end = cuts[:, stage + 1]
                low = np.maximum(low, self._reach(device, stage, end, room, -1))
            source, cuts = _chosen(cuts, stage, low, high)
        if len(cuts) and cuts[0, stage + 1] == UNKNOWN:
            low, high = self._between(stage + 1, cuts)
            start = cuts[:, stage]
            high = np.minimum(high, self._reach(device, stage, start, room[source], 1))
            again, cuts = _chosen(cuts, stage + 1, low, high)
            source = source[again]
        return source, cuts

    def _between(self, cut: int, cuts: Index) -> tuple[Index, Index]:
        """Where a cut may lie: each stage up to the next known cut needs a layer."""
        known = np.flatnonzero(cuts[0] != UNKNOWN)
        place = int(np.searchsorted(known, cut))
        before, after = int(known[place - 1]), int(known[place])
        return cuts[:, before] + (cut - before), cuts[:, after] - (after - cut)

    def _reach(
        self, device: int, stage: int, end: Index, room: Floats, direction: int
    ) -> Index:
        """How far a stage from one end can go, at most, within what room there is."""
        factors = self._objective.factors[device, :, stage]
        best = np.full(len(end), self._layers if direction > 0 else 0)
        for factor in factors:
            along = factor @ self._objective.prefix
            room_left = room + ROUNDING * (abs(room) + along[-1])
            if direction > 0:
                reach = np.searchsorted(along, along[end] + room_left, "right") - 1
                best = np.minimum(best, reach)
            else:
                reach = np.searchsorted(along, along[end] - room_left, "left")
                best = np.maximum(best, reach)
        return best

    def _distinct(
        self, others: Sequence[int], cuts: Index, worst: Floats
    ) -> tuple[Index, Floats]:
        """Of all that leave the same to the other devices, the best."""
        if not len(cuts):
            return cuts, worst
        beside = np.zeros(self._stages + 1, dtype=bool)
        for stages in map(self._held_by.__getitem__, others):
            beside[stages] = beside[np.array(stages, dtype=int) + 1] = True
        keys = cuts[:, beside & (cuts[0] != UNKNOWN)]
        order = np.lexsort((worst, *keys.T))
        keys = keys[order]
        new = np.ones(len(keys), dtype=bool)
        new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        kept = order[new]
        if len(kept) > MOST_STATES:
            kept = kept[np.argsort(worst[kept], kind="stable")[:MOST_STATES]]
            self._exact = False
        return cuts[kept], worst[kept]


def _chosen(cuts: Index, cut: int, low: Index, high: Index) -> tuple[Index, Index]:
    """Each state once for each place of a cut; which state, and the new ones."""
    count = np.maximum(high - low + 1, 0)
    source = np.repeat(np.arange(len(cuts)), count)
    offset = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    result = cuts[source]
    result[:, cut] = low[source] + offset
    return source, result


def _prefix(*columns: Floats) -> Floats:
    return np.stack([np.concatenate([[0.0], np.cumsum(column)]) for column in columns])


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
