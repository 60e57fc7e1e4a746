"""Layers in stages, and what a schedule of these asks of devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.foretold import Times, foretold
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer, stages_of, starts_of, with_loss
from pipeproof.sched.lower import lower
from pipeproof.sched.runs import Runs, runs_of
from pipeproof.sched.stage_bytes import numbers_of, stage_bytes

Floats = NDArray[np.float64]
Places = Sequence[Sequence[int]]
"""Of each stage, those of the layers that its R runs again."""


class Staged:
    """Layers in the stages of a schedule, whatever it recomputes.

    Attributes:
        sizes, stages, starts: of each stage, how many layers, which, and the number of
            its first.
        found: what each holds where nothing runs again.
        weights: bytes that are always there, on each device.
    """

    def __init__(
        self, schedule: Schedule, layers: Sequence[Layer], sizes: Sequence[int]
    ) -> None:
        self._layers, self.sizes = layers, sizes
        self.stages, self.starts = list(stages_of(layers, sizes)), starts_of(sizes)
        nothing: list[tuple[int, ...]] = [()] * len(sizes)
        self.found, self._over = stage_bytes(layers, sizes, nothing)
        self._forward, self._backward = (
            [sum(getattr(x, way) for x in with_loss(of)) for of in self.stages]
            for way in ("forward", "backward")
        )
        weights = [sum(layer.weights for layer in of) for of in self.stages]
        self.weights = np.zeros(schedule.devices)
        for pipe in schedule.placement.pipes:
            np.add.at(self.weights, list(pipe), weights)

    def onto(self, schedule: Schedule) -> Schedule:
        """With the model's skips."""
        missing = self._over.keys() - set(schedule.skips)
        return schedule.with_skips([*schedule.skips, *missing]) if missing else schedule

    def going(self, schedule: Schedule) -> Floats:
        """Of each of the schedule's skips, the bytes that go over it."""
        return np.array([self._over.get(skip, 0.0) for skip in schedule.skips])

    def base(self, counts: Runs) -> Floats:
        """Time of each device without R."""
        ran = counts.forwards - counts.recomputations
        result: Floats = ran @ self._forward + counts.backwards @ self._backward
        return result

    def busy(self, schedule: Schedule, again: Places) -> list[float]:
        """Time of each device, with these layers recomputed."""
        counts = runs_of(schedule)
        more: Floats = counts.recomputations @ np.array(self._again(again))
        result: list[float] = (self.base(counts) + more).tolist()
        return result

    def bytes(self, schedule: Schedule, again: Places) -> list[float]:
        """Most bytes of each device, likewise, links being free.

        Raises:
            UnsupportedError: as `lower`.
        """
        program = lower(self.onto(schedule))
        found, _ = stage_bytes(self._layers, self.sizes, again)
        times = Times(self._forward, self._backward, self._again(again))
        going = self.going(program.schedule)
        passing = foretold(program, times, numbers_of(found), going)
        return [float(a + b) for a, b in zip(self.weights, passing)]

    def _again(self, again: Places) -> list[float]:
        """Time of each stage's R."""
        return [
            forward
            if len(set(places)) == len(of)
            else sum(of[place].forward for place in places)
            for of, forward, places in zip(self.stages, self._forward, again)
        ]
