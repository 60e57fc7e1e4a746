"""The search for the cuts with the least busy busiest device.

Devices are filled one after the other. What is placed of the model is then some
runs of consecutive stages, and all that the rest of the search needs to know of
them is where they begin and end; of all ways to come to the same ends, the one
whose busiest device is least busy is kept::

    looped, device 0 and 1 of 3      0 ███████ x ─────── a ███████ y ─────── n
    V                                0 ███████ x ─────────────── y ███████ n

So a linear placement is the well-known dynamic programme over one cut, V over two
and a looped one of two chunks over three. The search is run for a bound a little
above what no partition can beat, and for larger ones until there is a solution. A
tight bound leaves few states: no device may do more than it allows, and what is left
must not be more than the devices that are left can do, so none may do much less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.cut_loads import ROUNDING, Floats, Index, Loads, Work

MOST_STATES = 4_000_000
"""Ways to fill some devices that are kept, before some are let go of."""
FIRST_SLACK = 2.0**-16
"""Of the first bound, above what no partition can beat; then four times as much."""
UNKNOWN = -1


class Search:
    """Fills the devices in turn.

    Args:
        objective: the largest quantity of any device is to be smallest.
        caps: others, and what they must not exceed on each device.
        least: what the objective cannot go below.
        work: what it shares out, if it is a time: what is left must not be more than
            the devices that are left can do.
    """

    def __init__(
        self,
        objective: Loads,
        caps: tuple[Loads, Floats] | None,
        least: float,
        work: Work | None,
    ) -> None:
        self._objective, self._caps, self._least = objective, caps, least
        self._work = work
        self._layers = objective.layers
        self._stages = objective.factors.shape[2]
        self._held_by = objective.held_by()
        if caps is not None:  # of which some may hold what others park there
            both = zip(self._held_by, caps[0].held_by())
            self._held_by = [sorted({*ours, *more}) for ours, more in both]
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
            slack *= 4

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
            can = self._can_be_done(others, placed, cuts, limit)
            cuts, worst = self._distinct(others, cuts[can], worst[can])
            if not len(cuts):
                return None
        best: Index = cuts[int(np.argmin(worst))]
        return best

    def _can_be_done(
        self,
        others: Sequence[int],
        placed: NDArray[np.bool_],
        cuts: Index,
        limit: float,
    ) -> NDArray[np.bool_]:
        """Whether the other devices can do what is left, if it is shared out well."""
        if self._work is None or not len(cuts):
            return np.ones(len(cuts), dtype=bool)
        left = np.zeros(len(cuts))
        known = np.flatnonzero(cuts[0] != UNKNOWN).tolist()
        for before, after in pairwise(known):
            if not placed[before]:
                ends = cuts[:, after], cuts[:, before]
                left += self._work.prefix[ends[0]] - self._work.prefix[ends[1]]
        able = limit * self._work.speed[list(others)].sum()
        total = self._work.prefix[-1]
        result: NDArray[np.bool_] = left <= able + ROUNDING * (able + total)
        return result

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
        placed = placed.copy()
        for stage in stages:
            source = np.arange(len(cuts))
            if not placed[stage]:
                placed[stage] = True
                room = limit - load.max(axis=1)
                source, cuts = self._expand(device, stage, cuts, room)
            ends = cuts[:, stage], cuts[:, stage + 1]
            load = load[source] + self._objective.of_stage(device, stage, *ends)
            good = load.max(axis=1) <= limit
            source, cuts, load = source[good], cuts[good], load[good]
            worst = worst[source]
            if self._caps is not None:
                loads, caps = self._caps
                known = stages[: stages.index(stage) + 1]
                fits = loads.fit(device, known, cuts, caps[device])
                cuts, load, worst = cuts[fits], load[fits], worst[fits]
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
                low = np.maximum(
                    low, self._objective.reach(device, stage, end, room, -1)
                )
            source, cuts = _chosen(cuts, stage, low, high)
        if len(cuts) and cuts[0, stage + 1] == UNKNOWN:
            low, high = self._between(stage + 1, cuts)
            start = cuts[:, stage]
            high = np.minimum(
                high, self._objective.reach(device, stage, start, room[source], 1)
            )
            again, cuts = _chosen(cuts, stage + 1, low, high)
            source = source[again]
        return source, cuts

    def _between(self, cut: int, cuts: Index) -> tuple[Index, Index]:
        """Where a cut may lie: each stage up to the next known cut needs a layer."""
        known = np.flatnonzero(cuts[0] != UNKNOWN)
        place = int(np.searchsorted(known, cut))
        before, after = int(known[place - 1]), int(known[place])
        return cuts[:, before] + (cut - before), cuts[:, after] - (after - cut)

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
