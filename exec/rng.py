"""Randomness that does not depend on how a model is run.

Every unit (the smallest piece a partition may cut between) starts each of its
runs from a key of (step seed, unit, micro-batch, slice). So dropout masks are
the same whatever the schedule, with or without recomputation, wherever the cuts
between stages fall, and on whatever rank a stage runs. The step seed is one draw
from torch's default generator, whose own stream goes on after that draw.

What a backward draws has no key: it is refused where it is seen. Python's `random` and
numpy's generators are not keyed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from pipeproof.exec.errors import ModelError

_MASK = (1 << 64) - 1
LOOK_EVERY = 16
"""Steps, of which one looks whether backwards draw."""


def key(step_seed: int, unit: int, micro_batch: int, part: int = 0) -> int:
    """A 64-bit seed for one run of one unit; neighbours get unrelated ones.

    The finaliser is that of splitmix64 (Steele et al. 2014, OOPSLA, figure 15).

    Args:
        step_seed: from `step_seed`.
        unit: counted through the whole model; the loss is one more, the last.
        micro_batch: in the step.
        part: the slice of the micro-batch.
    """
    # Odd factors, so that no two (unit, micro-batch, slice) of any practical size
    # meet.
    z = step_seed + (unit + 1) * 0x9E3779B97F4A7C15
    z = z + (micro_batch + 1) * 0xD1B54A32D192ED03 + part * 0xABC98388FB8FAC03
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def of_replica(step_seed: int, replica: int) -> int:
    """The seed of one of several replicas of a pipeline, each with masks of its own.

    Args:
        step_seed: that all share; that of replica 0.
        replica: its number.
    """
    return step_seed if not replica else key(step_seed, -1, -1, replica)


def generators(*devices: torch.device) -> list[torch.Generator]:
    """The default generators that code on these devices draws from, each once."""
    result = [torch.default_generator]
    for device in devices:
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            here = torch.cuda.current_device() if device.index is None else device.index
            if (of := torch.cuda.default_generators[here]) not in result:
                result.append(of)
    return result


@contextmanager
def step_seed(sources: Sequence[torch.Generator]) -> Iterator[int]:
    """Draw the seed of a step, and leave these generators as that draw did."""
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    states = [(generator, generator.get_state()) for generator in sources]
    try:
        yield seed
    finally:
        for generator, state in states:
            generator.set_state(state)


def seed(sources: Sequence[torch.Generator], number: int) -> None:
    """Start every one of these generators from a key."""
    for generator in sources:
        generator.manual_seed(number)


class Draws:
    """Refuses backwards of a stage that draw random numbers.

    Looks at one in the first step, and again every so many: it takes as long as a small
    layer.

    Args:
        number: of the stage.
        sources: that its units draw from.
    """

    def __init__(self, number: int, sources: Sequence[torch.Generator]) -> None:
        self._number, self._sources = number, sources
        self._steps = 0
        self._known = False

    def begin(self) -> None:
        """Another step."""
        self._known = self._steps % LOOK_EVERY != 0
        self._steps += 1

    def refused(self) -> AbstractContextManager[None]:
        """To run a backward in.

        Raises:
            ModelError: it draws.
        """
        return _NOTHING if self._known else self._refused()

    @contextmanager
    def _refused(self) -> Iterator[None]:
        self._known = True
        states = [source.get_state() for source in self._sources]
        yield
        for source, state in zip(self._sources, states):
            if not torch.equal(source.get_state(), state):
                raise ModelError(
                    f"stage {self._number} draws random numbers in its backward, which "
                    "have no key and would depend on the schedule: draw them in "
                    "forward, and save them for the backward"
                )


_NOTHING = nullcontext()
