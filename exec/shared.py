"""Parameters that several stages of one process share.

Each stage's gradient of one is summed by itself, in the order of its backwards, and
these sums once, so that the result does not depend on which stages run where::

    stage 0   B0 + B1 + B2 ──┐ device 0
    stage 2   B0 + B1 + B2 ──┘────┐
                                  ├──▶ sum ──▶ .grad
    stage 3   B0 + B1 + B2 ───────┘ device 1

First those of each device, in the order of stages, and then the devices' in theirs.
Where these are ranks, `pipeproof.exec.ties` does the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from pipeproof.exec.replicas import Run, Sums, accumulate
from pipeproof.exec.stage import Stage


@dataclass(frozen=True)
class Part:
    """What a stage shares with others.

    Attributes:
        number: of the stage.
        parameters: each once.
    """

    number: int
    parameters: list[nn.Parameter]


class Shared:
    """The sums of all stages that share parameters, none of them with replicas.

    Args:
        homes: by stage and device of the schedule, the stages.
    """

    def __init__(self, homes: Mapping[tuple[int, int], Stage]) -> None:
        stages: dict[int, set[int]] = {}
        for (number, _), stage in homes.items():
            for parameter in stage.parameters:
                stages.setdefault(id(parameter), set()).add(number)
        common = {key for key, holders in stages.items() if len(holders) > 1}
        self._sums = {
            (device, number): Sums(Part(number, own))
            for (number, device), stage in homes.items()
            if (own := [p for p in stage.parameters if id(p) in common])
        }

    def begin(self) -> None:
        """Nothing is summed yet."""
        for sums in self._sums.values():
            sums.begin()

    def around(self, stage: int, device: int, run: Run) -> Run:
        """A backward of a stage that adds to its own sums."""
        sums = self._sums.get((device, stage))
        return run if sums is None else sums.around(run)

    def add_up(self) -> None:
        """All backwards have run: once to `.grad`."""
        parameters: dict[int, nn.Parameter] = {}
        found: dict[int, list[tuple[int, Tensor | None]]] = {}
        for (device, _), sums in sorted(self._sums.items(), key=lambda item: item[0]):
            for parameter, grad in zip(sums.stage.parameters, sums.taken()):
                parameters[id(parameter)] = parameter
                found.setdefault(id(parameter), []).append((device, grad))
        accumulate(list(parameters.values()), list(map(total, found.values())))


def total(grads: Iterable[tuple[int, Tensor | None]]) -> Tensor | None:
    """Of what stages on some devices have, in their order; None for nothing."""
    of_devices = (
        _chain(grad for _, grad in of) for _, of in groupby(grads, lambda pair: pair[0])
    )
    return _chain(of_devices)


def _chain(grads: Iterable[Tensor | None]) -> Tensor | None:
    result: Tensor | None = None
    for grad in grads:
        if grad is not None:
            result = grad if result is None else result + grad
    return result
