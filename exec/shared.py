"""The program's TIEs: sums of the gradients of parameters that stages share.

Each stage's gradient of one is summed by itself, in the order of its backwards, and
these sums once, so that the result does not depend on which stages run where::

    stage 0   B0 + B1 + B2 ──┐ device 0
    stage 2   B0 + B1 + B2 ──┘────┐
                                  ├──▶ sum ──▶ .grad
    stage 3   B0 + B1 + B2 ───────┘ device 1

First those of each device, in the order in which its TIE reads them, and then the
devices' in theirs. In one process the last TIE to come does all of it; between ranks
each hands what its device has to the others, as a REDUCE does.

Where a stage has replicas, or data-parallel peers, its REDUCE comes first: what that
sums of a shared parameter comes here instead of to `.grad`, and of all devices that
then have it one adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from pipeproof.exec.replicas import Accumulate, Reduction, Run, Sums, accumulate, total
from pipeproof.exec.stage import Stage
from pipeproof.exec.ties import NO_SHARES, Shares, in_words
from pipeproof.sched import Action, Program
from pipeproof.sched.instructions import Instruction


@dataclass(frozen=True)
class Part:
    """What a stage shares with others.

    Attributes:
        number: of the stage, or of several in words.
        parameters: each once.
    """

    number: int | str
    parameters: list[nn.Parameter]


class Shared:
    """The sums of all that the stages of this process share.

    Args:
        program: whose TIEs are run.
        homes: by stage and device of the schedule, the stages here.
        shares: of all stages, here and elsewhere.
        between: over ranks, by the number of a tie; None in one process.
        first: sums the gradients of stages over processes before, if any does.
    """

    def __init__(
        self,
        program: Program,
        homes: Mapping[tuple[int, int], Stage],
        shares: Shares = NO_SHARES,
        between: Reduction | None = None,
        first: Reduction | None = None,
    ) -> None:
        self._between, self._first = between, first
        self._sums: dict[tuple[int, int], Sums] = {}  # by tie and stage
        here = {stage: home.original for (stage, _), home in homes.items()}
        for number, tie in enumerate(program.schedule.ties):
            groups = shares.of(tie)
            for stage in sorted(here.keys() & set(tie)):
                places = [dict(reversed(group))[stage] for group in groups]
                own = [here[stage].parameters[place] for place in places]
                self._sums[number, stage] = Sums(Part(stage, own))
        devices = sorted({device for _, device in homes})
        ties = program.action == Action.TIE
        ties &= np.isin(program.device, devices)
        self._last: dict[int, int] = {}
        self._stages: dict[int, list[list[int]]] = {}
        for index in np.flatnonzero(ties).tolist():
            number, stages = _read(program[index])
            self._last[number] = index
            self._stages.setdefault(number, []).append(stages)

    def begin(self) -> None:
        """Nothing is summed yet."""
        for sums in self._sums.values():
            sums.begin()

    def around(self, stage: int, run: Run) -> Run:
        """What adds to a stage's gradients, and of those here to its own sums."""
        for (_, number), sums in self._sums.items():
            if number == stage:
                run = sums.around(run)
        return run

    def onto(self, stage: int) -> Accumulate:
        """What adds a stage's gradients, summed over all that hold it."""

        def add(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            self.around(stage, partial(accumulate, parameters, grads))()

        return add

    def bind(self, instruction: Instruction) -> Run | None:
        """What a TIE does; None for nothing."""
        number, stages = _read(instruction)
        if self._between is not None and number in self._between.stages:
            return partial(self._hand_over, instruction.index, number, stages)
        if self._last[number] != instruction.index:
            return None
        return partial(self._add_up, number)

    def complete(self, stage: int) -> None:
        """Return once `.grad` has all that a stage shares; its TIEs have begun."""
        for number, other in self._sums:
            if other == stage and self._between is not None:
                self._between.complete(number)

    def _add_up(self, number: int) -> None:
        """Of all devices of a tie, once to `.grad`."""
        own = self._own(number)
        # Where each device adds up all, the first does it for all of them.
        of_devices = [_taken(own, stages) for stages in self._stages[number]]
        parameters = next(iter(own.values())).stage.parameters
        accumulate(parameters, list(map(_chain, zip(*of_devices))))

    def _hand_over(self, index: int, number: int, stages: Sequence[int]) -> None:
        """What this device adds, to the sum of all."""
        assert self._between is not None
        own = self._own(number)
        words = in_words(tuple(own))
        sums = Sums(Part(words, next(iter(own.values())).stage.parameters))
        sums.grads = _taken(own, stages)
        _taken(own, list(own))  # of replicas, which others add
        self._between.begin(index, number, sums)

    def _own(self, number: int) -> dict[int, Sums]:
        """Of a tie's stages here, once what their REDUCEs sum is in it."""
        own = {stage: s for (tie, stage), s in self._sums.items() if tie == number}
        if self._first is not None:
            for stage in own:
                self._first.complete(stage)
        return own


def _taken(own: Mapping[int, Sums], stages: Sequence[int]) -> list[Tensor | None]:
    """The sums of some of a tie's stages, added up in this order; used up."""
    found = [own[stage].taken() for stage in stages]
    some = next(iter(own.values())).stage.parameters
    return list(map(_chain, zip(*found))) if found else [None] * len(some)


def _read(instruction: Instruction) -> tuple[int, list[int]]:
    """The number of a TIE's tie, and the stages whose gradients it reads."""
    (written,) = instruction.writes
    return written.stage, [buffer.stage for buffer in instruction.reads]


def _chain(grads: Iterable[Tensor | None]) -> Tensor | None:
    result: Tensor | None = None
    for grad in grads:
        if grad is not None:
            result = grad if result is None else total(result, grad)
    return result
