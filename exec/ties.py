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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeproof.exec.errors import ModelError, RankError
from pipeproof.exec.grid import Grid
from pipeproof.exec.homes import holders
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.sharded import is_sharded
from pipeproof.exec.stage import Stage, StageModule, units_of
from pipeproof.exec.updating import how_updated
from pipeproof.sched import Kind, Schedule
from pipeproof.sched.ties import Tie, format_ties, held_by, meets_nobody
from pipeproof.sched.transforms.step import steps_behind_sums

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

        Its STEPs are moved to where they can wait for the sums.

        Raises:
            ModelError: it says others.
        """
        if schedule.ties and schedule.ties != self.ties:
            raise ModelError(
                f"the schedule has the ties {format_ties(schedule.ties)}, and the "
                f"stages {format_ties(self.ties) or 'none'}: leave them out of the "
                "schedule, and it gets the stages'"
            )
        if schedule.ties or not self.ties:
            return schedule
        return steps_behind_sums(schedule.with_ties(self.ties))


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


def check_alike(shares: Shares, words: Mapping[int, Sequence[str]]) -> None:
    """Refuse what the optimizers of the stages that share it would update apart.

    Args:
        shares: of all stages.
        words: for each stage, what updates each of its parameters.

    Raises:
        ModelError: it is not the same for all of them.
    """
    for group in shares.groups:
        if len(different := sorted({words[stage][n] for stage, n in group})) > 1:
            raise ModelError(
                f"stages {in_words(stages_of(group))} share a parameter, and their "
                f"optimizers would update it differently: {' or '.join(different)}; "
                "give both the same kind, with the same numbers"
            )


def words_of(
    stages: Iterable[Stage], optimizers: Mapping[int, Optimizer]
) -> dict[int, list[str]]:
    """What updates each parameter of these stages, for `check_alike`."""
    return {
        stage.number: [
            how_updated(parameter, optimizers.get(stage.number))
            for parameter in stage.parameters
        ]
        for stage in stages
    }


def tie_up(
    grid: Grid,
    schedule: Schedule,
    stages: Sequence[StageModule | None],
    homes: Mapping[tuple[int, int], Stage],
    shares: Shares,
    device: torch.device,
    optimizers: Mapping[int, Optimizer],
) -> Ties:
    """Connect ranks whose stages share parameters, and compare these.

    Args:
        grid: of all ranks.
        schedule: that they run, with ties.
        stages: as for `Pipeline`.
        homes: the stages that this rank runs, as for `Runtime`.
        shares: of all stages.
        device: where this rank's tensors lie.
        optimizers: of the stages here, where there are STEPs.

    Raises:
        ModelError: what is shared is sharded, is several parameters on this rank, or
            has optimizers that differ.
        RankError: copies with different values.
    """
    own = {number: stage.parameters for (number, _), stage in homes.items()}
    members, elsewhere = {}, set[int]()
    for number, tie in enumerate(schedule.ties):
        _refuse_sharded(tie, stages)
        here = [
            [own[stage][place] for stage, place in group if stage in own]
            for group in shares.of(tie)
        ]
        _refuse_several(grid, tie, here)
        held = held_by(schedule, tie)
        ranks = [grid.row[home] for home in held]
        if len(ranks) == 1:
            continue
        _compare(grid, tie, here)
        if grid.device not in held:
            continue
        if holders(schedule, tie[0])[0] != grid.device:
            elsewhere.update(id(copy) for copies in here for copy in copies)
        if not meets_nobody(schedule, tie):
            members[number] = grid.ranks.collective(ranks, device)
    if schedule.ties and schedule.has(Kind.STEP):
        words = words_of(homes.values(), optimizers)
        said = grid.ranks.exchange(list(words.items()), "how the others update them")
        check_alike(shares, dict(of for of_rank in said for of in of_rank))
    return Ties(Reducer(members, device, grid.ranks), frozenset(elsewhere))


def _refuse_several(
    grid: Grid, tie: Tie, here: Sequence[Sequence[nn.Parameter]]
) -> None:
    if any(len(set(map(id, copies))) > 1 for copies in here):
        raise ModelError(
            f"stages {in_words(tie)} share a parameter on another rank, and on rank "
            f"{grid.ranks.rank} each has its own: let them share it there too"
        )


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
