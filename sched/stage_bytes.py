"""What stages of a model's layers hold for one micro-batch, in bytes.

As the simulator has it: a stage's input and what skips bring it are buffers of their
own, and what goes to the next stage over a skip is beside the output.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.layers import Layer, kept, over_skips, stages_of, starts_of
from pipeproof.sched.skips import Skip

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of one stage.

    Attributes:
        kept: by a forward, beside what has come to the stage.
        left: of that, what W reads.
        input: what has come, but for skips from further off; nothing of the batch.
        stored: what a forward keeps which an R follows, this input included.
        again: what that R adds.
        output: what goes to the next stage.
    """

    kept: float
    left: float
    input: float
    stored: float
    again: float
    output: float

    @property
    def left_part(self) -> float:
        """The part of what is kept that W reads."""
        return self.left / self.kept if self.kept else 1.0

    def numbers(self, before: float) -> list[float]:
        """Of each of `Held`, given the output of the stage before."""
        part = self.left_part
        return [
            self.kept - self.left,
            self.left,
            self.again * (1 - part),
            self.again * part,
            self.input,
            self.stored,
            self.output,
            before,
        ]


def stage_bytes(
    layers: Sequence[Layer], sizes: Sequence[int], again: Sequence[Collection[int]]
) -> tuple[list[StageBytes], dict[Skip, float]]:
    """Of each stage; and of each pair of stages, what goes over a skip between them.

    Args:
        layers: of the whole model.
        sizes: layers in each stage.
        again: of each stage, the places of those that its R runs again.
    """
    over = over_skips(layers, sizes)
    beside = [over.pop(pair, 0.0) for pair in pairwise(range(len(sizes)))]
    found = []
    for number, stage in enumerate(stages_of(layers, sizes)):
        of = kept(stage, again[number], starts_of(sizes)[number])
        came = of.input + of.skips
        entry = of.input + beside[number - 1] if number else 0.0
        going = beside[number] if number < len(beside) else 0.0
        found.append(
            StageBytes(
                of.own,
                of.left,
                entry,
                of.stored - came + entry,
                of.rebuilt,
                stage[-1].output + going,
            )
        )
    return found, over


def numbers_of(stages: Sequence[StageBytes]) -> Floats:
    """[`Held`, stage]."""
    before = [0.0, *(of.output for of in stages)]
    return np.array([of.numbers(out) for of, out in zip(stages, before)]).T
