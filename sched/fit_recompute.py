"""Which stages, and which of their layers, to recompute, so that a step fits.

What a device takes follows from what it recomputes itself, but for how long what it
receives has to wait. So a device has all policies of its own stages to choose from, and
for each of these the layers that an R runs again; it takes what fits and adds the
least. Devices that hold stages in common, in two pipes, choose together. Only where it
depends on the others whether it fits, is one choice of all held against the prediction
after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import numpy as np

from pipeproof.sched.chosen_layers import Again, Choice, Floats, least_time
from pipeproof.sched.cut_loads import ROUNDING
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.holdings import Held, Holdings, largest, least_and_most
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer
from pipeproof.sched.lower import lower
from pipeproof.sched.partition import check_sizes
from pipeproof.sched.runs import Runs, runs_of
from pipeproof.sched.stage_bytes import numbers_of
from pipeproof.sched.staged import Staged
from pipeproof.sched.transforms import POLICIES, Policy, recompute
from pipeproof.sched.ways import Way, together

MOST_STAGES = 5
"""Of one device; of six there are 4,096 choices."""
MOST_TRIES = 256
"""Choices of all devices that are held against the prediction."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of what may wait on a device: how much is counted."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What is recomputed.

    Attributes:
        schedule: with an R wherever something of a stage runs again.
        layers: of each stage, the places of the layers that its R run again; all of
            them where that is the whole stage.
        busy: time that each device computes in a step.
        bytes: on each device when it has most, as predicted with free links.
        exact: whether no choice fits with less time; False where more ways to choose
            had to be compared than are kept, or where it depends on how long inputs
            wait which layers fit.
    """

    schedule: Schedule
    layers: tuple[tuple[int, ...], ...]
    busy: tuple[float, ...]
    bytes: tuple[float, ...]
    exact: bool


def fit_recompute(
    schedule: Schedule,
    layers: Sequence[Layer],
    sizes: Sequence[int],
    memory: float | Sequence[float],
) -> Schedule:
    """The recomputation of whole stages that fits with the least time.

    As `fit_selective`, which may recompute parts of them.

    Args:
        schedule: any; its own R, if it has some, give way.
        layers: of the model, as `partition` takes them.
        sizes: layers in each stage.
        memory: bytes of each device, or of each single one.

    Returns:
        The schedule with one of the `recompute` policies for each stage.

    Raises:
        ParameterError: as `fit_selective`.
    """
    return _Fit(schedule, layers, sizes, memory, whole=True).best().schedule


def fit_selective(
    schedule: Schedule,
    layers: Sequence[Layer],
    sizes: Sequence[int],
    memory: float | Sequence[float],
) -> Recomputation:
    """The recomputation, of stages or of some of their layers, that fits fastest.

    For each stage one of the `recompute` policies, which says of which micro-batches
    something runs again, and the layers that do. Least is the time that the busiest of
    devices which hold stages in common computes in a step.

    Memory is what a simulation with free links predicts, for these times: weights,
    activations, and what is on its way between stages. Of its inputs a device has those
    that have come, and so it may depend on other devices' choices whether its own fits.

    Args:
        schedule: any; its own R, if it has some, give way.
        layers: of the model, as `profile_layers` finds them.
        sizes: layers in each stage.
        memory: bytes of each device, or of each single one.

    Returns:
        Schedule and layers, for `Pipeline(stages, found.schedule, …,
        recomputed=found.layers)`.

    Raises:
        ParameterError: no choice fits, sizes that are not those of the layers, memory
            for another number of devices, more than five stages on a device, or a layer
            whose activations are less than the input that they include.

    Source:
        Korthikanti et al. 2022, arXiv:2205.05198, for recomputing some of a layer;
        that it is a knapsack, Jain et al. 2020 (Checkmate), arXiv:1910.02653, solve as
        an integer programme.
    """
    return _Fit(schedule, layers, sizes, memory, whole=False).best()


def selective_loads(
    layers: Sequence[Layer],
    schedule: Schedule,
    sizes: Sequence[int],
    again: Sequence[Sequence[int]],
) -> tuple[list[float], list[float]]:
    """What a device takes with given layers recomputed: its time, and most bytes.

    Args:
        layers: as for `fit_selective`.
        schedule: likewise, with its R.
        sizes: likewise.
        again: of each stage, the places of the layers that an R runs again.

    Raises:
        ParameterError: as `fit_selective`.
    """
    check_sizes(sizes, layers, schedule)
    model = Staged(schedule, layers, sizes)
    return model.busy(schedule, again), model.bytes(schedule, again)


class _Fit:
    def __init__(
        self,
        schedule: Schedule,
        layers: Sequence[Layer],
        sizes: Sequence[int],
        memory: float | Sequence[float],
        *,
        whole: bool,
    ) -> None:
        if isinstance(memory, (int, float)):
            memory = [memory] * schedule.devices
        self._limits = np.array(memory, dtype=float)
        if len(self._limits) != schedule.devices:
            raise ParameterError(
                f"memory must be one number for each of {schedule.devices} devices, "
                f"got {len(self._limits)}"
            )
        check_sizes(sizes, layers, schedule)
        self._schedule, self._whole = schedule, whole
        self._model = Staged(schedule, layers, sizes)
        self._groups = _groups(schedule)
        self._most = max(len(stages) for _, stages in self._groups)
        if self._most > MOST_STAGES:
            raise ParameterError(
                f"devices of {schedule.summary} hold {self._most} stages, and policies "
                f"are tried for at most {MOST_STAGES}: give recompute a policy for "
                "each stage"
            )
        self._exact = True

    def best(self) -> Recomputation:
        """Of all ways of all groups those that fit together and are fastest."""
        groups = self._ways()
        for group, of_group in zip(self._groups, groups):
            if not of_group:
                raise ParameterError(self._too_small(*group))
        least = [ways[0].time for ways in groups]
        tries = 0
        for ways in islice(together(groups), MOST_TRIES):
            tries += 1
            if (found := self._if_it_fits(ways)) is not None:
                fastest = self._whole or [way.time for way in ways] == least
                return replace(found, exact=self._exact and fastest)
        for last in zip(*map(_last_resorts, groups)):
            if (found := self._if_it_fits(last)) is not None:
                return replace(found, exact=False)
        if self._whole and tries < MOST_TRIES:  # which were all that there are
            raise ParameterError(self._too_small(*self._groups[0]))
        raise ParameterError(
            f"no recomputation fits of {tries} that might, the fastest first, nor one "
            "that keeps as little as can be: use more devices, or a schedule with "
            "fewer activations at once"
        )

    def _if_it_fits(self, ways: Sequence[Way]) -> Recomputation | None:
        """What comes of these together."""
        policies: list[Policy] = ["never"] * self._schedule.stages
        chosen: list[tuple[int, ...]] = [()] * self._schedule.stages
        for (_, stages), way in zip(self._groups, ways):
            for stage, policy, layers in zip(stages, way.policies, way.layers):
                if layers:
                    policies[stage], chosen[stage] = policy, layers
        schedule, model = recompute(self._schedule, policies), self._model
        taken = model.bytes(schedule, chosen)
        if (np.array(taken) > self._limits * (1 + ROUNDING)).any():
            return None
        busy = tuple(model.busy(schedule, chosen))
        return Recomputation(schedule, tuple(chosen), busy, tuple(taken), True)

    def _ways(self) -> list[list[Way]]:
        """Those of each group that may fit, the fastest first.

        Of some layers, only those faster than what fits whatever is waited for.
        """
        found: list[dict[object, Way]] = [{} for _ in self._groups]
        limits = [math.inf] * len(self._groups)
        for policies, tried in self._tried():
            for number, group in enumerate(self._groups):
                for way in self._of_group(group, policies, tried, limits[number]):
                    found[number][way.policies, way.layers] = way
                    if way.share == 1 and not self._whole:
                        limits[number] = way.time
        return [sorted(of.values(), key=lambda way: way.time) for of in found]

    def _tried(self) -> Iterator[tuple[tuple[Policy, ...], _Tried]]:
        """Each choice for the stages of a group, the same in all groups."""
        bare = self._model.onto(self._schedule)
        for choice in product(POLICIES, repeat=self._most):
            of_stage: list[Policy] = ["never"] * self._schedule.stages
            for _, stages in self._groups:
                for stage, policy in zip(stages, choice):
                    of_stage[stage] = policy
            yield choice, _Tried.of(recompute(bare, of_stage))

    def _of_group(
        self,
        group: tuple[list[int], list[int]],
        policies: tuple[Policy, ...],
        tried: _Tried,
        limit: float,
    ) -> Iterator[Way]:
        """The fastest with given policies, with ever more counted of what may wait."""
        devices, _ = group
        base = self._model.base(tried.counts)[devices]
        asked = [self._asked(group, held) for held in (tried.least, tried.most)]
        alike = all(map(np.array_equal, *asked))
        for share in (1.0,) if alike else SHARES:
            moments = [(1 - share) * a + share * b for a, b in zip(*asked)]
            choice = self._chosen(group, tried, moments, base, limit)
            if choice is None:
                break
            time = float((base + choice.times).max())
            yield Way(time, policies, tuple(choice.layers), share)

    def _chosen(
        self,
        group: tuple[list[int], list[int]],
        tried: _Tried,
        moments: list[Floats],
        base: Floats,
        limit: float,
    ) -> Choice | None:
        devices, numbers = group
        rows = np.concatenate([largest(of_device) for of_device in moments])
        room = -rows[:, 0]
        if (room < 0).any():
            return None
        model = self._model
        stages = [
            Again(
                model.stages[stage],
                model.starts[stage],
                model.found[stage].input,
                tried.counts.recomputations[devices, stage],
                rows[:, 1 + 2 * place],
                rows[:, 2 + 2 * place],
                self._whole,
            )
            for place, stage in enumerate(numbers)
        ]
        choice, exact = least_time(stages, base, room, limit)
        self._exact &= exact
        return choice

    def _asked(
        self, group: tuple[list[int], list[int]], held: list[Holdings]
    ) -> list[Floats]:
        """Of each device, [moment, (bytes beyond what is free, stored, rebuilt, …)].

        The bytes are of all but what stages store where an R follows, and what that R
        adds; of each stage in turn, how many micro-batches have these.
        """
        devices, stages = group
        chosen = [Held.AGAIN, Held.AGAIN_LEFT, Held.STORED]
        numbers = numbers_of(self._model.found)
        numbers[chosen] = 0
        going = self._model.going(self._model.onto(self._schedule))
        free = self._limits - self._model.weights
        result = []
        for device in devices:
            here = held[device]
            rest = np.einsum("mhs,hs->m", here.held, numbers[:, here.stages])
            columns = [rest + here.skips @ going - free[device]]
            for stage in stages:
                again = left = stored = np.zeros(len(rest))
                if stage in here.stages:
                    place = here.stages.index(stage)
                    again, left, stored = here.held[:, chosen, place].T
                part = self._model.found[stage].left_part
                columns += [stored, again * (1 - part) + left * part]
            result.append(np.stack(columns, axis=1))
        return result

    def _too_small(self, devices: list[int], stages: list[int]) -> str:
        """Why none fits, with the bytes of the choice of whole stages closest to it."""
        least = float("inf")
        whole = [tuple(range(size)) for size in self._model.sizes]
        for choice in product(POLICIES, repeat=self._most):
            of_stage: list[Policy] = ["never"] * self._schedule.stages
            for stage, policy in zip(stages, choice):
                of_stage[stage] = policy
            tried = recompute(self._schedule, of_stage)
            taken = self._model.bytes(tried, whole)
            least = min(least, max(taken[d] / self._limits[d] for d in devices))
        needed = least * max(self._limits[d] for d in devices)
        return (
            f"no recomputation fits on device {devices[0]}: with whole stages it needs "
            f"at least {needed:,.0f} bytes, and has {self._limits[devices[0]]:,.0f}: "
            "use more devices, or a schedule with fewer activations at once"
        )


@dataclass(frozen=True, slots=True)
class _Tried:
    """What a schedule runs, and what its devices have at least and at most."""

    counts: Runs
    least: list[Holdings]
    most: list[Holdings]

    @classmethod
    def of(cls, schedule: Schedule) -> _Tried:
        return cls(runs_of(schedule), *least_and_most(lower(schedule)))


def _last_resorts(ways: Sequence[Way]) -> list[Way]:
    """Of a group what counts most of what waits, and what runs most again."""
    fullest = max(ways, key=lambda way: (way.share, -way.time))
    return [fullest, max(ways, key=lambda way: way.time)]


def _groups(schedule: Schedule) -> list[tuple[list[int], list[int]]]:
    """Devices that hold stages in common, and their stages."""
    groups: list[tuple[set[int], set[int]]] = []
    for stage, *held_by in _holders(schedule):
        touching = [group for group in groups if group[0] & set(held_by)]
        groups = [group for group in groups if group not in touching]
        devices = set(held_by).union(*(group[0] for group in touching))
        groups.append((devices, {stage}.union(*(group[1] for group in touching))))
    return sorted((sorted(devices), sorted(stages)) for devices, stages in groups)


def _holders(schedule: Schedule) -> Iterator[tuple[int, ...]]:
    """Each stage, and the devices that hold it."""
    for stage, held_by in enumerate(zip(*schedule.placement.pipes)):
        yield stage, *held_by
