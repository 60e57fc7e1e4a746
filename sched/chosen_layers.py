"""Which layers of some stages to run again: those that fit with the least time.

A knapsack. Layer by layer, each is kept or run again; of what was decided so far only
the time matters, the bytes at each moment at which a device may have most, and which
memory that later layers use as well is counted already. Of all ways that are alike in
the last, those stay that no other beats in time and in bytes at every moment::

    time of R    0 ── 4 ── 7 ── 9
    bytes       90   60   55   20        8 and 60 is beaten by 7 and 55
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.layers import Layer, Memory, brought, kept, with_loss, with_memory

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

MOST_WAYS = 20_000
"""That are alike in what later layers see and are kept, before some are let go of."""


@dataclass(frozen=True, slots=True)
class Again:
    """A stage of which an R runs some layers again.

    Attributes:
        layers: of the stage.
        start: number of the first of them in the whole model.
        entry: bytes that have come to it, of those that count with what is stored.
        runs: how many R of it each device has, in a step.
        stored: of each moment, how many micro-batches' stored parts are there.
        rebuilt: of each moment, how many have what an R adds.
        whole: whether it is all layers or none.
    """

    layers: list[Layer]
    start: int
    entry: float
    runs: Floats
    stored: Floats
    rebuilt: Floats
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The layers that run again.

    Attributes:
        layers: of each stage, their places.
        times: what that adds on each device.
        bytes: at each moment, what is stored and rebuilt.
    """

    layers: list[tuple[int, ...]]
    times: Floats
    bytes: Floats


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decides on what further layers add; all ways with the same are alike.

    Attributes:
        before: whether the last layer runs again.
        every: whether all of the stage so far do.
        stored: memory that is stored, and that later layers use as well.
        region: likewise, what is there while the last layers run again.
    """

    before: bool
    every: bool
    stored: frozenset[int]
    region: frozenset[int]


@dataclass(slots=True)
class _Ways:
    """Those that are alike: [way, (time on each device, bytes at each moment)]."""

    values: list[Floats] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)


def least_time(
    stages: Sequence[Again], base: Floats, room: Floats, better_than: float
) -> tuple[Choice | None, bool]:
    """The choice that fits with the least time of the busiest device.

    Args:
        stages: that the devices hold.
        base: time of each device without R.
        room: bytes for what is stored and rebuilt, at each moment.
        better_than: a time that it must be below.

    Returns:
        None where no choice fits in less time; whether all ways were compared.
    """
    search = _Search(stages, base, room, better_than)
    return search.through(), search.exact


_START = _Seen(False, True, frozenset(), frozenset())


class _Search:
    def __init__(
        self,
        stages: Sequence[Again],
        base: Floats,
        room: Floats,
        better_than: float,
    ) -> None:
        self._stages, self._base, self._room = stages, base, room
        self._limit, self.exact = better_than, True
        self._left = np.zeros(len(room))
        """At most, what layers that are not decided on may add."""
        for of, layer in self._all():
            self._left += _most(of, layer)

    def _all(self) -> Iterator[tuple[Again, Layer]]:
        for of in self._stages:
            for layer in with_loss(of.layers):
                yield of, layer

    def through(self) -> Choice | None:
        size = len(self._base) + len(self._room)
        values, chosen = np.zeros((1, size)), [0]
        shift = 0
        for of in self._stages:
            values, chosen = self._stage(of, shift, values, chosen)
            if not chosen:
                return None
            shift += len(of.layers)
        devices = len(self._base)
        times = (self._base + values[:, :devices]).max(axis=1)
        best = int(np.argmin(times))
        layers, mask = [], chosen[best]
        for of in self._stages:
            places = range(len(of.layers))
            layers.append(tuple(place for place in places if mask >> place & 1))
            mask >>= len(of.layers)
        return Choice(layers, values[best, :devices], values[best, devices:])

    def _stage(
        self, of: Again, shift: int, values: Floats, chosen: list[int]
    ) -> tuple[Floats, list[int]]:
        """Each way so far with all ways to run some layers of a stage again."""
        values = values + self._added(of, 0, of.entry, 0)
        ends = _Ways()
        again = of.runs.any()
        for seen, (some, masks) in self._layer_by_layer(of, shift, values, chosen):
            if not (again and (of.whole or seen.every)):
                ends.values.append(some)
                ends.chosen.append(masks)
        if again:  # all of it, whose forward then makes no graph
            every = range(len(of.layers))
            time = sum(layer.forward for layer in with_loss(of.layers))
            rebuilt = kept(of.layers, every, of.start).rebuilt
            ends.values.append(values + self._added(of, time, 0, rebuilt))
            bits = ((1 << len(every)) - 1) << shift
            ends.chosen.append([mask | bits for mask in chosen])
        nothing = values[:0], list[int]()
        if not ends.values:
            return nothing
        return self._best({_START: ends}).get(_START, nothing)

    def _layer_by_layer(
        self, of: Again, shift: int, values: Floats, chosen: list[int]
    ) -> Iterable[tuple[_Seen, tuple[Floats, list[int]]]]:
        layers = with_loss(of.layers)
        memories = with_memory(layers)
        later = _used_later(memories)
        entry = frozenset(brought(memories, of.layers, of.start))
        ways = {replace(_START, stored=entry): (values, chosen)}
        options = (False, True) if of.runs.any() and not of.whole else (False,)
        for place, (layer, memory) in enumerate(zip(layers, memories)):
            self._left -= _most(of, layer)
            following: dict[_Seen, _Ways] = {}
            for seen, (some, masks) in ways.items():
                # The loss runs again where all of the stage does.
                for again in options if place < len(of.layers) else (seen.every,):
                    added, after = _step(memory, seen, later[place], again=again)
                    more = self._added(of, layer.forward * again, *added)
                    into = following.setdefault(after, _Ways())
                    into.values.append(some + more)
                    bit = again << (shift + place) if place < len(of.layers) else 0
                    into.chosen.append([mask | bit for mask in masks])
            ways = self._best(following)
        return ways.items()

    def _added(self, of: Again, time: float, stored: float, rebuilt: float) -> Floats:
        return np.concatenate(
            [of.runs * time, of.stored * stored + of.rebuilt * rebuilt]
        )

    def _best(self, of: dict[_Seen, _Ways]) -> dict[_Seen, tuple[Floats, list[int]]]:
        """Of ways that are alike, those that fit and that no other beats."""
        result = {}
        devices = len(self._base)
        # A sum of as many bytes may be off by a rounding.
        room = self._room + 1e-9 * abs(self._room)
        for seen, ways in of.items():
            values = np.concatenate(ways.values)
            chosen = [mask for masks in ways.chosen for mask in masks]
            times = (self._base + values[:, :devices]).max(axis=1)
            fits = (values[:, devices:] <= room).all(axis=1) & (times < self._limit)
            # Where the rest cannot exceed the room any more, all are equally good.
            compared = values.copy()
            compared[:, devices:] = np.maximum(values[:, devices:], room - self._left)
            kept = np.flatnonzero(fits)
            kept = kept[_unbeaten(compared[kept])]
            if len(kept) > MOST_WAYS:
                self.exact = False
                full = (values[kept, devices:] / room).max(axis=1, initial=0)
                by = np.argsort(full), np.argsort(times[kept])
                kept = kept[
                    np.unique(np.concatenate([o[: MOST_WAYS // 2] for o in by]))
                ]
            if len(kept):
                result[seen] = values[kept], [chosen[way] for way in kept.tolist()]
        return result


def _step(
    memory: Memory, seen: _Seen, later: frozenset[int], *, again: bool
) -> tuple[tuple[float, float], _Seen]:
    """What a layer adds to the stored bytes and to the rebuilt ones."""
    stored, region = seen.stored, seen.region
    added = rebuilt = 0.0
    if not again:
        added = _new(memory.kept, stored)
        stored |= {at for at, _ in memory.kept}
        region = frozenset()
    else:
        needed = memory.skips if seen.before else (*memory.input, *memory.skips)
        added = _new(needed, stored)
        stored |= {at for at, _ in needed}
        region = (region if seen.before else frozenset()) | {at for at, _ in needed}
        rebuilt = _new(memory.kept, region)
        region |= {at for at, _ in memory.kept}
    every = seen.every and again
    return (added, rebuilt), _Seen(again, every, stored & later, region & later)


def _new(pieces: Sequence[tuple[int, float]], there: frozenset[int]) -> float:
    return sum(size for at, size in pieces if at not in there)


def _used_later(memories: Sequence[Memory]) -> list[frozenset[int]]:
    """Of each layer, the memory that those behind it use."""
    result, later = [], frozenset[int]()
    for memory in reversed(memories):
        result.append(later)
        later |= {at for at, _ in (*memory.input, *memory.skips, *memory.kept)}
    return result[::-1]


def _most(of: Again, layer: Layer) -> Floats:
    (memory,) = with_memory([layer])
    kept = sum(size for _, size in memory.kept)
    entry = sum(size for _, size in (*memory.input, *memory.skips))
    result: Floats = of.stored * (kept + entry) + of.rebuilt * kept
    return result


def _unbeaten(values: Floats) -> Index:
    """The rows than which no other is as small in every column; of equals one."""
    if not len(values):
        return np.zeros(0, np.int64)
    varies = values.max(axis=0) > values.min(axis=0)
    values = values[:, varies]
    order: Index = np.arange(len(values))
    if values.shape[1] == 0:
        return order[:1]
    order = np.lexsort(values.T[::-1]).astype(np.int64)
    values = values[order]
    found: list[int] = [0]
    if values.shape[1] == 2:
        least = np.minimum.accumulate(values[:, 1])
        found += (1 + np.flatnonzero(values[1:, 1] < least[:-1])).tolist()
    elif values.shape[1] > 2:
        kept = values[:1]
        for row, value in enumerate(values):
            if not (kept <= value).all(axis=1).any():
                found.append(row)
                kept = values[found]
    result: Index = order[np.array(found)]
    return result
