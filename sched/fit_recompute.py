"""Which stages to recompute, so that a step fits into memory with the least time.

The devices are independent of each other: a device runs its ops in order, and an R on
one moves none on another. So each has all policies of its own stages to choose from,
and takes those that fit and add the least; devices that hold stages in common, in two
pipes, choose together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import Schedule
from pipeproof.sched.partition import Layer, loads
from pipeproof.sched.transforms import POLICIES, Policy, recompute

MOST_STAGES = 5
"""Of one device; of six there are 4,096 choices."""


def fit_recompute(
    schedule: Schedule,
    layers: Sequence[Layer],
    sizes: Sequence[int],
    memory: float | Sequence[float],
) -> Schedule:
    """The recomputation that fits with the least time.

    Memory is counted as `partition` does: weights and activations, without what is on
    its way between stages.

    Args:
        schedule: any; its own R, if it has some, give way.
        layers: of the model, as `partition` takes them.
        sizes: layers in each stage.
        memory: bytes of each device, or of each single one.

    Returns:
        The schedule with one of the `recompute` policies for each stage.

    Raises:
        ParameterError: no choice fits, sizes that are not those of the layers, memory
            for another number of devices, or more than five stages on a device.
    """
    limits = [memory] * schedule.devices if isinstance(memory, (int, float)) else memory
    if len(limits) != schedule.devices:
        raise ParameterError(
            f"memory must be one number for each of {schedule.devices} devices, got "
            f"{len(limits)}"
        )
    groups = _groups(schedule)
    most = max(len(stages) for _, stages in groups)
    if most > MOST_STAGES:
        raise ParameterError(
            f"devices of {schedule.summary} hold {most} stages, and policies are tried "
            f"for at most {MOST_STAGES}: give recompute a policy for each stage"
        )
    best: list[tuple[float, tuple[Policy, ...]] | None] = [None] * len(groups)
    least = [float("inf")] * len(groups)
    for choice in product(POLICIES, repeat=most):
        chosen = _of_stages(schedule, groups, choice)
        busy, taken = loads(layers, recompute(schedule, chosen), sizes)
        for number, (devices, _) in enumerate(groups):
            over = max(taken[d] / limits[d] for d in devices)
            least[number] = min(least[number], over)
            time = max(busy[d] for d in devices)
            before = best[number]
            if over <= 1 and (before is None or time < before[0]):
                best[number] = time, choice
    policies: list[Policy] = ["never"] * schedule.stages
    for (devices, stages), found, over in zip(groups, best, least):
        if found is None:
            needed = over * max(limits[d] for d in devices)
            raise ParameterError(
                f"no recomputation fits on device {devices[0]}: it needs at least "
                f"{needed:,.0f} bytes, and has {limits[devices[0]]:,.0f}: use more "
                "devices, or a schedule with fewer activations at once"
            )
        for stage, policy in zip(stages, found[1]):
            policies[stage] = policy
    return recompute(schedule, policies)


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


def _of_stages(
    schedule: Schedule,
    groups: Sequence[tuple[list[int], list[int]]],
    choice: Sequence[Policy],
) -> list[Policy]:
    """In each group, its first stage the first policy, and so on."""
    result: list[Policy] = ["never"] * schedule.stages
    for _, stages in groups:
        for stage, policy in zip(stages, choice):
            result[stage] = policy
    return result
