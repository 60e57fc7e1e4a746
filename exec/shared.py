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

Where data-parallel peers sum a stage's gradient first, that sum comes in `.grad`, from
which the TIE takes it: what was there before lies aside meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from pipeproof.exec.replicas import Reduction, Run, Sums, accumulate
from pipeproof.exec.stage import Stage
from pipeproof.exec.ties import NO_SHARES, Shares, in_words
from pipeproof.sched import Action, Program
from pipeproof.sched.program import Instruction


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
        first: sums the gradients of `reduced` stages before.
        reduced: those.
    """

    def __init__(
        self,
        program: Program,
        homes: Mapping[tuple[int, int], Stage],
        shares: Shares = NO_SHARES,
        between: Reduction | None = None,
        first: Reduction | None = None,
        reduced: Collection[int] = (),
    ) -> None:
        self._between, self._first = between, first
        self._sums: dict[tuple[int, int], Sums] = {}  # by tie and stage
        for number, tie in enumerate(program.schedule.ties):
            groups = shares.of(tie)
            for (stage, _), home in homes.items():
                if stage in tie:
                    places = [dict(reversed(group))[stage] for group in groups]
                    own = [home.parameters[place] for place in places]
                    self._sums[number, stage] = Sums(Part(stage, own))
        self._aside = [s for (_, stage), s in self._sums.items() if stage in reduced]
        self._is_aside = False
        self._last: dict[int, int] = {}
        self._stages: dict[int, list[list[int]]] = {}
        for index in np.flatnonzero(program.action == Action.TIE).tolist():
            number, stages = _read(program[index])
            self._last[number] = index
            self._stages.setdefault(number, []).append(stages)

    def begin(self) -> None:
        """Nothing is summed yet."""
        for sums in self._sums.values():
            sums.begin()
        self._lay_aside()

    def forget(self) -> None:
        """Let go of what a step that broke off has left."""
        if self._is_aside:
            self._lay_aside()
        for sums in self._sums.values():
            sums.begin()

    def _lay_aside(self) -> None:
        """`.grad` of what is reduced first, or put it back and take what came."""
        for sums in self._aside:
            sums.swap()
        self._is_aside = not self._is_aside

    def around(self, stage: int, run: Run) -> Run:
        """A backward of a stage that adds to its own sums."""
        for (_, number), sums in self._sums.items():
            if number == stage:
                run = sums.around(run)
        return run

    def bind(self, instruction: Instruction) -> Run | None:
        """What a TIE does; None for nothing."""
        number, stages = _read(instruction)
        if self._between is not None and number in self._between.stages:
            return partial(self._hand_over, instruction.index, number, stages)
        if self._last[number] != instruction.index:
            return None
        return partial(self._add_up, number)

    def _add_up(self, number: int) -> None:
        """Of all devices of a tie, once to `.grad`."""
        of_devices = [self._taken(number, s) for s in self._stages[number]]
        (first, *_), *_ = self._stages[number]
        parameters = self._sums[number, first].stage.parameters
        accumulate(parameters, list(map(_chain, zip(*of_devices))))

    def _hand_over(self, index: int, number: int, stages: Sequence[int]) -> None:
        """What this device has, to the sum of all."""
        assert self._between is not None
        if self._is_aside:
            assert self._first is not None
            self._first.finish()
            self._lay_aside()
        owner = self._sums[number, stages[0]].stage
        sums = Sums(Part(in_words(tuple(stages)), owner.parameters))
        sums.grads = self._taken(number, stages)
        self._between.begin(index, number, sums)

    def _taken(self, number: int, stages: Sequence[int]) -> list[Tensor | None]:
        """The sums of a tie's stages on one device, added up in this order."""
        found = [self._sums[number, stage].taken() for stage in stages]
        return list(map(_chain, zip(*found)))


def _read(instruction: Instruction) -> tuple[int, list[int]]:
    """The number of a TIE's tie, and the stages whose gradients it reads."""
    (written,) = instruction.writes
    return written.stage, [buffer.stage for buffer in instruction.reads]


def _chain(grads: Iterable[Tensor | None]) -> Tensor | None:
    result: Tensor | None = None
    for grad in grads:
        if grad is not None:
            result = grad if result is None else result + grad
    return result
