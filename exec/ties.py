"""Parameters that stages on different ranks share: each rank has a copy.

A step leaves on each copy the gradient of its own stage; these are summed over the
ranks, in their order, and the sum added to `.grad` of every copy, which is REDUCE
once more::

    rank 0, the embedding    g of stage 0 ──┐
                                            ├──▶ sum ──▶ .grad on both
    rank 3, the head         g of stage 3 ──┘

Copies that start alike, with optimizers that are alike, so stay alike bit by bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeproof.exec.bind import holders
from pipeproof.exec.errors import ModelError, RankError
from pipeproof.exec.grid import Grid
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.replicas import Sums
from pipeproof.exec.sharded import is_sharded
from pipeproof.exec.stage import StageModule, units_of
from pipeproof.exec.updating import refuse_tied
from pipeproof.sched import Schedule

Place = tuple[int, int]
"""Stage, and which of its parameters."""


@dataclass(frozen=True)
class Tie:
    """One parameter of several stages, on this rank.

    Attributes:
        number: the stages, in words.
        parameters: the copy here.
        first: whether this rank holds the first of the stages.
    """

    number: str
    parameters: list[nn.Parameter]
    first: bool


class Ties:
    """What this rank shares with others, summed behind each step.

    Args:
        ties: in an order that all ranks have.
        reducer: its stages are the places of these.

    Attributes:
        elsewhere: ids of copies here of what belongs to an earlier stage elsewhere.
    """

    def __init__(self, ties: Sequence[Tie], reducer: Reducer) -> None:
        self._ties, self._reducer = ties, reducer
        self.elsewhere = {
            id(parameter)
            for tie in ties
            if not tie.first
            for parameter in tie.parameters
        }

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A step, whose gradients are summed at its end, before what was there."""
        before = [tie.parameters[0].grad for tie in self._ties]
        for tie in self._ties:
            tie.parameters[0].grad = None
        try:
            yield
            found = [tie.parameters[0].grad for tie in self._ties]
        finally:
            for tie, grad in zip(self._ties, before):
                tie.parameters[0].grad = grad
        for number, (tie, grad) in enumerate(zip(self._ties, found)):
            sums = Sums(tie)
            sums.grads[0] = grad
            self._reducer.begin(-1, number, sums)
        if self._ties:
            self._reducer.finish()

    def forget(self) -> None:
        """Let go of the sums of a step that broke off."""
        self._reducer.forget()


def tie_up(
    grid: Grid,
    schedule: Schedule,
    stages: Sequence[StageModule | None],
    mine: Sequence[int],
    device: torch.device,
) -> Ties:
    """Find what stages of different ranks share, and make it one.

    Args:
        grid: of all ranks.
        schedule: that they run.
        stages: as for `Pipeline`; it is enough if one rank is given both.
        mine: numbers of those that this rank runs.
        device: where this rank's tensors lie.

    Raises:
        ModelError: what is shared has replicas, or is sharded.
        RankError: copies with different values.
    """
    said = grid.ranks.exchange(_shared(stages), "what the other ranks' stages share")
    groups = _joined([[tuple(place) for place in group] for of in said for group in of])
    own = {n: _parameters(stages[n]) for n in mine}
    groups = [g for g in groups if len(_ranks_of(g, schedule, grid.row)) > 1]
    for group in groups:
        _check(group, schedule, stages)
    values = [
        [_checksum(own[stage][place]) for stage, place in group if stage in own]
        for group in groups
    ]
    all_values = grid.ranks.exchange(values, "the values that they share")
    ties: list[Tie] = []
    members = {}
    for number, group in enumerate(groups):
        words = " and ".join(str(stage) for stage, _ in group)
        if len({value for of_rank in all_values for value in of_rank[number]}) > 1:
            raise RankError(
                f"stages {words} share a parameter, and its copies on the ranks have "
                "different values: load the same into all"
            )
        ranks = _ranks_of(group, schedule, grid.row)
        here = [own[stage][place] for stage, place in group if stage in own]
        if here:
            members[len(ties)] = grid.ranks.collective(ranks, device)
            ties.append(Tie(words, here[:1], first=group[0][0] in own))
    return Ties(ties, Reducer(members, device, grid.ranks))


def _shared(stages: Sequence[StageModule | None]) -> list[list[Place]]:
    """Of each parameter in several stages that are known here, its places."""
    places: dict[int, list[Place]] = {}
    for number, module in enumerate(stages):
        for place, parameter in enumerate(_parameters(module)):
            places.setdefault(id(parameter), []).append((number, place))
    return [found for found in places.values() if len(found) > 1]


def _joined(groups: Sequence[Sequence[Place]]) -> list[list[Place]]:
    """Groups that have a place in common are one."""
    result: list[set[Place]] = []
    for group in groups:
        touching = [found for found in result if found & set(group)]
        result = [found for found in result if found not in touching]
        result.append(set(group).union(*touching))
    return sorted(sorted(found) for found in result)


def _ranks_of(
    group: Sequence[Place], schedule: Schedule, row: Sequence[int]
) -> list[int]:
    return sorted({row[d] for stage, _ in group for d in holders(schedule, stage)})


def _check(
    group: Sequence[Place], schedule: Schedule, stages: Sequence[StageModule | None]
) -> None:
    words = " and ".join(str(stage) for stage, _ in group)
    refuse_tied(schedule, f"stages {words} share a parameter")
    if any(len(holders(schedule, stage)) > 1 for stage, _ in group):
        raise ModelError(
            f"stages {words} share a parameter, and several devices hold replicas of a "
            "stage: its gradient would be reduced twice; untie them, or use a schedule "
            "of one pipe"
        )
    for stage, _ in group:
        if is_sharded(stages[stage]):
            raise ModelError(
                f"stages {words} share a parameter, and stage {stage} is sharded by "
                "fully_shard: untie them, or leave it whole"
            )


def _parameters(module: StageModule | None) -> list[nn.Parameter]:
    """Each once, in order."""
    if module is None:
        return []
    found = [p for unit in units_of(module) for p in unit.parameters()]
    return list({id(parameter): parameter for parameter in found}.values())


def _checksum(parameter: Tensor) -> int:
    data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())
