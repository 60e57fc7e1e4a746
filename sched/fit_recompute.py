"""Which stages, and which of their layers, to recompute, so that a step fits.

The devices are independent of each other: a device runs its ops in order, and an R on
one moves none on another. So each has all policies of its own stages to choose from,
and for each of these the layers that an R runs again; it takes what fits and adds the
least. Devices that hold stages in common, in two pipes, choose together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from pipeproof.sched.chosen_layers import Again, Choice, Floats, least_time
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.in_flight import InFlight, in_flight
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer, kept, stages_of, starts_of
from pipeproof.sched.partition import check_sizes
from pipeproof.sched.transforms import POLICIES, Policy, recompute

MOST_STAGES = 5
"""Of one device; of six there are 4,096 choices."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What is recomputed.

    Attributes:
        schedule: with an R wherever something of a stage runs again.
        layers: of each stage, the places of the layers that its R run again; all of
            them where that is the whole stage.
        busy: time that each device computes in a step.
        bytes: weights and activations on each device when it has most.
        exact: whether no choice fits with less time; False only where more ways to
            choose had to be compared than are kept.
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

    Memory is counted as `partition` does: weights and activations, without what is on
    its way between stages; what a split backward keeps for W counts as the whole
    activation.

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
    counts, stages = in_flight(schedule), list(stages_of(layers, sizes))
    found = list(map(kept, stages, again, starts_of(sizes)))
    whole = [len(set(chosen)) == len(of) for of, chosen in zip(stages, again)]
    runs_again = [
        sum(of[place].forward for place in chosen)
        + (_loss(of, "forward") if all_ else 0)
        for of, chosen, all_ in zip(stages, again, whole)
    ]
    busy = _base(stages, counts) + counts.recomputations @ np.array(runs_again)
    sizes_of = np.array([(b.full, b.stored, b.rebuilt) for b in found]).T
    taken = [
        float(weights + (peaks * sizes_of).sum(axis=(1, 2)).max(initial=0))
        for weights, peaks in zip(_weights(stages, counts), counts.peaks)
    ]
    return busy.tolist(), taken


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
        self._schedule, self._layers, self._sizes = schedule, list(layers), sizes
        self._stages, self._whole = list(stages_of(layers, sizes)), whole
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
        """Of all policies of each group the one that is fastest, with its layers."""
        groups = self._groups
        found: list[tuple[Sequence[Policy], Choice] | None] = [None] * len(groups)
        times = [float("inf")] * len(groups)
        for tried, counts in self._policies():
            for number, group in enumerate(groups):
                choice, time = self._of_group(group, counts, times[number])
                if choice is not None:
                    found[number], times[number] = (tried, choice), time
        policies: list[Policy] = ["never"] * self._schedule.stages
        chosen: list[tuple[int, ...]] = [()] * self._schedule.stages
        for (devices, stages), best in zip(groups, found):
            if best is None:
                raise ParameterError(self._too_small(devices, stages))
            of, choice = best
            for place, stage in enumerate(stages):
                if choice.layers[place]:
                    chosen[stage], policies[stage] = choice.layers[place], of[place]
        schedule = recompute(self._schedule, policies)
        loads = selective_loads(self._layers, schedule, self._sizes, chosen)
        busy, taken = map(tuple, loads)
        return Recomputation(schedule, tuple(chosen), busy, taken, self._exact)

    def _policies(self) -> Iterator[tuple[tuple[Policy, ...], InFlight]]:
        """Each choice for the stages of a group, the same in all groups, and counts."""
        for choice in product(POLICIES, repeat=self._most):
            of_stage: list[Policy] = ["never"] * self._schedule.stages
            for _, stages in self._groups:
                for stage, policy in zip(stages, choice):
                    of_stage[stage] = policy
            yield choice, in_flight(recompute(self._schedule, of_stage))

    def _of_group(
        self, group: tuple[list[int], list[int]], counts: InFlight, better_than: float
    ) -> tuple[Choice | None, float]:
        devices, _ = group
        stages, room = self._question(group, counts)
        base = _base(self._stages, counts)[devices]
        if (room < 0).any():
            return None, better_than
        choice, exact = least_time(stages, base, room, better_than)
        self._exact &= exact
        if choice is None:
            return None, better_than
        return choice, float((base + choice.times).max())

    def _question(
        self, group: tuple[list[int], list[int]], counts: InFlight
    ) -> tuple[list[Again], Floats]:
        """Its stages, and the bytes that are free for their R at each moment."""
        devices, numbers = group
        starts = starts_of(self._sizes)
        whole = np.array([kept(o, (), n).full for o, n in zip(self._stages, starts)])
        moments = np.concatenate([counts.peaks[d] for d in devices])
        owner = np.repeat(devices, [len(counts.peaks[d]) for d in devices])
        room = self._limits[owner] - _weights(self._stages, counts)[owner]
        room -= moments[:, 0] @ whole
        stages = [
            Again(
                self._stages[stage],
                starts[stage],
                counts.recomputations[devices, stage],
                moments[:, 1, stage],
                moments[:, 2, stage],
                self._whole,
            )
            for stage in numbers
        ]
        return stages, room

    def _too_small(self, devices: list[int], stages: list[int]) -> str:
        """Why none fits, with the bytes of the choice of whole stages closest to it."""
        least = float("inf")
        whole = [tuple(range(size)) for size in self._sizes]
        for choice in product(POLICIES, repeat=self._most):
            of_stage: list[Policy] = ["never"] * self._schedule.stages
            for stage, policy in zip(stages, choice):
                of_stage[stage] = policy
            tried = recompute(self._schedule, of_stage)
            _, taken = selective_loads(self._layers, tried, self._sizes, whole)
            least = min(least, max(taken[d] / self._limits[d] for d in devices))
        needed = least * max(self._limits[d] for d in devices)
        return (
            f"no recomputation fits on device {devices[0]}: with whole stages it needs "
            f"at least {needed:,.0f} bytes, and has {self._limits[devices[0]]:,.0f}: "
            "use more devices, or a schedule with fewer activations at once"
        )


def _base(stages: Sequence[Sequence[Layer]], counts: InFlight) -> Floats:
    """Time of each device without R."""
    forward, backward = (
        np.array([sum(getattr(x, way) for x in of) + _loss(of, way) for of in stages])
        for way in ("forward", "backward")
    )
    ran = counts.forwards - counts.recomputations
    result: Floats = ran @ forward + counts.backwards @ backward
    return result


def _loss(stage: Sequence[Layer], name: str) -> float:
    loss = stage[-1].loss
    return 0.0 if loss is None else float(getattr(loss, name))


def _weights(stages: Sequence[Sequence[Layer]], counts: InFlight) -> Floats:
    """Bytes that are always there, on each device."""
    of_stage = np.array([sum(x.weights for x in of) for of in stages])
    result: Floats = (counts.forwards > 0) @ of_stage
    return result


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
