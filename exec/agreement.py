"""What ranks must have in common before their first step.

Each says what it is to run, and all find the same differences:

    ranks differ; give all the same:
      schedule:
        ranks 0, 1: 1f1b(devices=2, micro_batches=4) (…)
        ranks 2, 3: 1f1b(devices=2, micro_batches=8) (…)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import nn

from pipeproof.exec.batch import LossScale
from pipeproof.exec.errors import ModelError, RankError
from pipeproof.exec.grid import Grid
from pipeproof.exec.sharded import is_sharded
from pipeproof.exec.skips import Offer, Routes, gives_of, said_to_take
from pipeproof.exec.units import StageModule, modules_of, offers_of, units_of
from pipeproof.sched import Schedule
from pipeproof.sched.lower import Messages


def check_given(
    stages: Sequence[StageModule | None], mine: Sequence[int], rank: int
) -> None:
    """Refuse what is no module as one of this rank's stages.

    Args:
        stages: of all ranks; others' may be None.
        mine: numbers of those that this one runs.
        rank: this one.

    Raises:
        ModelError: one of them is None, or else no module or sequence of modules.
    """
    for number in mine:
        if stages[number] is None:
            raise ModelError(
                f"rank {rank} runs stage {number} and was given None for it"
            )
        modules_of(number, stages[number])


def routes_of(stages: Sequence[StageModule | None], grid: Grid | None) -> Routes:
    """The skip connections of a model.

    Args:
        stages: as for `Pipeline`.
        grid: of all ranks, each of which may know some stages only.

    Raises:
        ModelError: a stage that is none, or skips that are wrong.
    """
    known: dict[int, list[Offer]] = {}
    for number, stage in enumerate(stages):
        if stage is not None or grid is None:
            modules_of(number, stage)
        if stage is not None:
            known[number] = offers_of(stage)
    if grid is not None:
        said = grid.ranks.exchange(list(known.items()), "the other ranks' skips")
        for of_rank in reversed(said):  # the first that knows a stage counts
            known |= dict(of_rank)
    return Routes.of([known.get(number, []) for number in range(len(stages))])


def agree(
    grid: Grid,
    schedule: Schedule,
    stages: Sequence[StageModule | None],
    mine: Sequence[int],
    kind: str,
    loss_scale: LossScale,
    messages: Messages,
    optimizers: Mapping[int, str],
) -> list[int]:
    """Compare what the ranks run.

    Args:
        grid: of all.
        schedule: this rank's.
        stages: as for `check_given`.
        mine: likewise.
        kind: of device, such as cpu.
        loss_scale: as for `Pipeline`.
        messages: likewise; how they are posted decides their order on a link.
        optimizers: of this rank's stages, in words.

    Returns:
        The number of each stage's first unit in the whole model.

    Raises:
        RankError: they differ.
    """
    same = {
        "schedule": f"{schedule.summary} ({schedule.digest})",
        "loss_scale": "a callable" if callable(loss_scale) else loss_scale,
        "messages": messages,
        "kind of device": kind,
        "torch": torch.__version__,
        "pipeproof": version("pipeproof"),
    }
    shapes = {
        str(number): _shapes(module)
        for number, module in enumerate(stages)
        if module is not None
    }
    # Of those that several ranks hold, which must start alike.
    values = {
        str(number): _checksum(stages[number])
        for number in mine
        if len(grid.holders(schedule, number)) > 1 and not is_sharded(stages[number])
    }
    copies = {
        str(number): text
        for number, text in optimizers.items()
        if len(grid.holders(schedule, number)) > 1
    }
    said = grid.ranks.exchange(
        [same, shapes, values, copies], "what the other ranks are to run"
    )
    found = _differences(
        [
            {**same, **{f"stage {n}": text for n, text in shapes.items()}}
            | {f"values of stage {n}": text for n, text in values.items()}
            | {f"optimizer of stage {n}": text for n, text in steps.items()}
            for same, shapes, values, steps in said
        ]
    )
    if found:
        raise RankError("ranks differ; give all the same:\n" + "\n".join(found))
    known = {int(n): text for _, shapes, _, _ in said for n, text in shapes.items()}
    units = [int(known[n].partition(" ")[0]) for n in range(schedule.stages)]
    return [sum(units[:number]) for number in range(schedule.stages)]


def _parameters(module: StageModule) -> list[nn.Parameter]:
    return [p for unit in units_of(module) for p in unit.parameters()]


def _shapes(module: StageModule) -> str:
    """Its units, its skips and its parameters, in words."""
    shapes = [f"{list(p.shape)} {p.dtype}" for p in _parameters(module)]
    words = [f"{len(units_of(module))} units"]
    for unit in units_of(module):
        words += [f"gives {name!r}" for name in gives_of(unit)]
        words += [f"takes {name!r}" for name in said_to_take(unit).values()]
    return "; ".join([*words, ", ".join(shapes) or "no parameters"])


def _checksum(module: StageModule | None) -> str:
    """Of the values that replicas must start with alike."""
    assert module is not None
    total = 0
    for parameter in _parameters(module):
        data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        total = zlib.crc32(data.numpy().tobytes(), total)
    return f"{total:08x}"


def _differences(said: Sequence[Mapping[str, str]]) -> list[str]:
    """Where ranks say different things of the same, in words."""
    found = []
    for name in dict.fromkeys(name for of_rank in said for name in of_rank):
        by_text: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(said):
            if name in of_rank:
                by_text.setdefault(of_rank[name], []).append(rank)
        if len(by_text) > 1:
            lines = [
                f"    ranks {', '.join(map(str, ranks))}: {text}"
                for text, ranks in by_text.items()
            ]
            found.append("\n".join([f"  {name}:", *lines]))
    return found
