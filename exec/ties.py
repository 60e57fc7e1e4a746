"""Parameters that stages share: which, and what ranks must agree on.

A pipeline finds them in its stages and writes the stages into its schedule's `ties`;
the program then says when their gradients are summed, and `shared` does it. Between
ranks each has a copy, and the sum goes to `.grad` of every copy::

    rank 0, the embedding    g of stage 0 ──┐
                                            ├──▶ sum ──▶ .grad on both
    rank 3, the head         g of stage 3 ──┘

Copies that start alike, with optimizers that are alike, so stay alike bit by bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeproof.exec.errors import ModelError, RankError
from pipeproof.exec.grid import Grid
from pipeproof.exec.homes import holders
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.sharded import is_sharded
from pipeproof.exec.stage import Stage, StageModule, units_of
from pipeproof.exec.updating import refuse_tied
from pipeproof.sched import Schedule
from pipeproof.sched.ties import Tie, format_ties

Place = tuple[int, int]
"""Stage, and which of its parameters."""

Group = tuple[Place, ...]
"""Of one parameter, its place in each stage that holds it."""


@dataclass(frozen=True)
class Shares:
    """What several stages hold.

    Attributes:
        groups: of each such parameter, its places, in order.
    """

    groups: tuple[Group, ...] = ()

    @property
    def ties(self) -> tuple[Tie, ...]:
        """The stages that share parameters, as a schedule has them."""
        return tuple(sorted(set(map(stages_of, self.groups))))

    def of(self, tie: Tie) -> list[Group]:
        """What exactly these stages share."""
        return [group for group in self.groups if stages_of(group) == tie]

    def onto(self, schedule: Schedule) -> Schedule:
        """The schedule, of a model whose stages share this.

        Raises:
            ModelError: it says others, or has replicas of a stage that shares.
        """
        if schedule.ties and schedule.ties != self.ties:
            raise ModelError(
                f"the schedule has the ties {format_ties(schedule.ties)}, and the "
                f"stages {format_ties(self.ties) or 'none'}: leave them out of the "
                "schedule, and it gets the stages'"
            )
        for tie in self.ties:
            refuse_tied(schedule, f"stages {in_words(tie)} share a parameter")
            if any(len(holders(schedule, stage)) > 1 for stage in tie):
                raise ModelError(
                    f"stages {in_words(tie)} share a parameter, and several devices "
                    "hold replicas of a stage: its gradient would be reduced twice; "
                    "untie them, or use a schedule of one pipe"
                )
        return schedule.with_ties(self.ties) if self.ties else schedule


NO_SHARES = Shares()


def shares_of(stages: Sequence[StageModule | None], grid: Grid | None) -> Shares:
    """What a model's stages share.

    Args:
        stages: as for `Pipeline`; it is enough if one rank is given both.
        grid: of all ranks, each of which may know some stages only.
    """
    places: dict[int, list[Place]] = {}
    for number, module in enumerate(stages):
        for place, parameter in enumerate(_parameters(module)):
            places.setdefault(id(parameter), []).append((number, place))
    groups = [found for found in places.values() if len(found) > 1]
    if grid is not None:
        what = "what the other ranks' stages share"
        said = grid.ranks.exchange(groups, what)
        groups = [[(s, p) for s, p in group] for of in said for group in of]
    return Shares(_joined(groups))


def stages_of(group: Group) -> Tie:
    """The stages that hold a parameter, ascending."""
    return tuple(sorted({stage for stage, _ in group}))


def in_words(tie: Tie) -> str:
    """Stages, as sentences name them."""
    return " and ".join(map(str, tie))


@dataclass(frozen=True)
class Ties:
    """What this rank shares with others.

    Attributes:
        reducer: over the ranks of each tie of several, by the tie's number.
        elsewhere: ids of copies here of what belongs to an earlier stage elsewhere.
    """

    reducer: Reducer
    elsewhere: frozenset[int]


def tie_up(
    grid: Grid,
    schedule: Schedule,
    stages: Sequence[StageModule | None],
    homes: Mapping[tuple[int, int], Stage],
    shares: Shares,
    device: torch.device,
) -> Ties:
    """Connect ranks whose stages share parameters, and compare these.

    Args:
        grid: of all ranks.
        schedule: that they run, with ties.
        stages: as for `Pipeline`.
        homes: the stages that this rank runs, as for `Runtime`.
        shares: of all stages.
        device: where this rank's tensors lie.

    Raises:
        ModelError: what is shared is sharded.
        RankError: copies with different values.
    """
    own = {number: stage.parameters for (number, _), stage in homes.items()}
    members, elsewhere = {}, set[int]()
    for number, tie in enumerate(schedule.ties):
        ranks = sorted({grid.row[holders(schedule, stage)[0]] for stage in tie})
        if len(ranks) == 1:
            continue
        _refuse_sharded(tie, stages)
        groups = shares.of(tie)
        here = [
            [own[stage][place] for stage, place in group if stage in own]
            for group in groups
        ]
        _compare(grid, tie, here)
        if grid.ranks.rank in ranks:
            members[number] = grid.ranks.collective(ranks, device)
            if tie[0] not in own:
                elsewhere.update(id(copy) for copies in here for copy in copies)
    return Ties(Reducer(members, device, grid.ranks), frozenset(elsewhere))


def _compare(grid: Grid, tie: Tie, here: Sequence[Sequence[nn.Parameter]]) -> None:
    values = [[_checksum(copy) for copy in copies] for copies in here]
    said = grid.ranks.exchange(values, "the values that they share")
    for of_ranks in zip(*said):
        if len({value for of_rank in of_ranks for value in of_rank}) > 1:
            raise RankError(
                f"stages {in_words(tie)} share a parameter, and its copies on the "
                "ranks have different values: load the same into all"
            )


def _refuse_sharded(tie: Tie, stages: Sequence[StageModule | None]) -> None:
    for stage in tie:
        if is_sharded(stages[stage]):
            raise ModelError(
                f"stages {in_words(tie)} share a parameter, and stage {stage} is "
                "sharded by fully_shard: untie them, or leave it whole"
            )


def _joined(groups: Sequence[Sequence[Place]]) -> tuple[Group, ...]:
    """Groups that have a place in common are one."""
    result: list[set[Place]] = []
    for group in groups:
        touching = [found for found in result if found & set(group)]
        result = [found for found in result if found not in touching]
        result.append(set(group).union(*touching))
    return tuple(sorted(tuple(sorted(found)) for found in result))


def _parameters(module: StageModule | None) -> list[nn.Parameter]:
    """Each once, in order."""
    if module is None:
        return []
    found = [p for unit in units_of(module) for p in unit.parameters()]
    return list({id(parameter): parameter for parameter in found}.values())


def _checksum(parameter: Tensor) -> int:
    data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())
