"""Which stage of a model lives on which torch device, and what may not be shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeproof.exec.errors import ModelError
from pipeproof.exec.replicas import Replica
from pipeproof.exec.skips import NO_ROUTES, Routes
from pipeproof.exec.stage import Stage
from pipeproof.exec.units import StageModule, check_sliced, units_of
from pipeproof.sched import ParameterError, Schedule


def torch_devices(
    devices: Sequence[str | torch.device], schedule: Schedule
) -> list[torch.device]:
    """One for each device of the schedule; the same where one is named for all.

    Raises:
        ParameterError: another number of them, or one that cannot be used.
    """
    if len(devices) not in (1, schedule.devices):
        raise ParameterError(
            f"devices must name one device for all or {schedule.devices}, one for "
            f"each of the schedule's, got {len(devices)}"
        )
    named = list(map(as_named, devices))
    return named * schedule.devices if len(named) == 1 else named


def as_named(device: str | torch.device) -> torch.device:
    """A device as the tensors on it name it: of several GPUs, which.

    Raises:
        ParameterError: torch knows no such device, or it is not there.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ParameterError(
            f"device {str(device)!r} cannot be used: {reason}"
        ) from None


def holders(schedule: Schedule, stage: int) -> list[int]:
    """The devices that hold a stage, in ascending order."""
    return sorted({pipe[stage] for pipe in schedule.placement.pipes})


def check_count(found: int, schedule: Schedule) -> None:
    """Refuse a model of another number of stages than the schedule's.

    Raises:
        ModelError: says which way to go.
    """
    if found != schedule.stages:
        hint = (
            "use a schedule of fewer stages, or cut the model into more"
            if found < schedule.stages
            else "join some, or use a schedule of more stages"
        )
        raise ModelError(
            f"{schedule.summary} runs {schedule.stages} stages, found a model of "
            f"{found}: {hint} (split_evenly cuts layers into stages)"
        )


def place(
    stages: list[StageModule | None],
    schedule: Schedule,
    devices: Sequence[torch.device],
    routes: Routes = NO_ROUTES,
) -> dict[tuple[int, int], Stage]:
    """By stage and device of the schedule, the stage where that device runs it."""
    homes: dict[tuple[int, int], Stage] = {}
    unit = 0
    for number, module in enumerate(stages):
        assert module is not None
        held_by = holders(schedule, number)
        original = Stage(number, module, unit, devices[held_by[0]], routes)
        unit += len(original.units)
        there = {original.device: original}
        for holder in held_by:
            device = devices[holder]
            if device not in there:
                there[device] = Replica(original, module, device)
            homes[number, holder] = there[device]
        if schedule.slices > 1:
            check_sliced(original.units)
    refuse_shared(homes)
    return homes


def originals(homes: Mapping[tuple[int, int], Stage]) -> list[Stage]:
    """The stages as the user has them, in order."""
    found = {stage.number: stage.original for stage in homes.values()}
    return [found[number] for number in sorted(found)]


def tell_of_others(
    homes: Mapping[tuple[int, int], Stage],
    stages: Sequence[StageModule | None],
    loss: Sequence[nn.Module],
) -> None:
    """Tell stages what modules run in them beside their own, and whose buffers are.

    Args:
        homes: the stages here.
        stages: all of the model's that are known here.
        loss: the modules of the loss, which the last stage runs; it may know the
            model, whose modules are their own stages' affair.
    """
    last = len(stages) - 1
    holders: dict[int, set[int]] = {}
    known: set[int] = set()
    for number, module in enumerate(stages):
        for unit in [] if module is None else units_of(module):
            known.update(map(id, unit.modules()))
            for buffer in unit.buffers():
                holders.setdefault(id(buffer), set()).add(number)
    for (number, _), stage in homes.items():
        if number == last:
            stage.buffers.also(part for part in loss if id(part) not in known)
        stage.buffers.shared = {
            where: " and ".join(map(str, sorted(those)))
            for where, buffer in stage.buffers
            if len(those := holders.get(id(buffer), ())) > 1
        }


def refuse_shared(homes: Mapping[tuple[int, int], Stage]) -> None:
    """Refuse a parameter of two stages that lie on different torch devices."""
    owner: dict[int, Stage] = {}
    for stage in homes.values():
        for parameter in stage.parameters:
            first = owner.setdefault(id(parameter), stage)
            if first is stage:
                continue
            if first.device != stage.device:
                raise ModelError(
                    f"stages {first.number} and {stage.number} share a parameter of "
                    f"shape {tuple(parameter.shape)} across {first.device} and "
                    f"{stage.device}: put both on one device, or untie them"
                )
