"""Which layers of some stages to run again: those that fit with the least time.

A knapsack. Layer by layer, each is kept or run again; of what was decided so far only
the time matters, the bytes at each moment at which a device may have most, and which
memory that later layers use as well is counted already. Of all ways that are alike in
the last, those stay that no other beats in time and in bytes at every moment::

    time of R    0 ── 4 ── 7 ── 9
    bytes       90   60   55   20        8 and 60 is beaten by 7 and 55
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.layers import Layer, Memory, brought, with_memory

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
        runs: how many R of it each device has, in a step.
        stored: of each moment, how many micro-batches' stored parts are there.
        rebuilt: of each moment, how many have what an R adds.
        whole: whether it is all layers or none.
    """

    layers: list[Layer]
    start: int
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
            for layer in of.layers:
                yield of, layer
                if layer.loss is not None:
                    yield of, layer.loss

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
        memories = with_memory(of.layers)
        loss = of.layers[-1].loss
        behind = with_memory([loss]) if loss is not None else []
        later = _used_later([*memories, *behind])
        came = brought(of.layers, of.start)
        entry, size = frozenset(came), sum(came.values())
        values = values + self._added(of, 0, size, 0)
        start = _Seen(False, True, entry, frozenset())
        ways = {start: (values, chosen)}
        for place, (layer, memory) in enumerate(zip(of.layers, memories)):
            self._left -= _most(of, layer)
            following: dict[_Seen, _Ways] = {}
            for seen, (values, chosen) in ways.items():
                for again in self._options(of, seen):
                    added, after = _step(memory, seen, later[place], again=again)
                    more = self._added(of, layer.forward * again, *added)
                    into = following.setdefault(after, _Ways())
                    into.values.append(values + more)
                    bit = again << (shift + place)
                    into.chosen.append([mask | bit for mask in chosen])
            if not (ways := self._best(following)):
                return np.zeros((0, values.shape[1])), []
        if loss is not None:
            self._left -= _most(of, loss)
        last = _Ways()
        for seen, (values, chosen) in ways.items():
            if loss is not None:
                again = seen.every
                added, _ = _step(behind[0], seen, frozenset(), again=again)
                values = values + self._added(of, loss.forward * again, *added)
            last.values.append(values)
            last.chosen.append(chosen)
        only = self._best({start: last})
        return only.get(start, (np.zeros((0, values.shape[1])), []))

    @staticmethod
    def _options(of: Again, seen: _Seen) -> list[bool]:
        if not of.runs.any():
            return [False]
        return [True] if of.whole else [False, True]

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
        needed = memory.beside if seen.before else (*memory.input, *memory.beside)
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
        later |= {at for at, _ in (*memory.input, *memory.beside, *memory.kept)}
    return result[::-1]


def _most(of: Again, layer: Layer) -> Floats:
    (memory,) = with_memory([layer])
    kept = sum(size for _, size in memory.kept)
    entry = sum(size for _, size in (*memory.input, *memory.beside))
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
