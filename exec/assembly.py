"""A pipeline, put together: who takes part in its steps, and what runs them here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeproof.exec.alone import Alone
from pipeproof.exec.grid import Grid
from pipeproof.exec.homes import originals, place, tell_of_others
from pipeproof.exec.instructions import Surroundings
from pipeproof.exec.ranked import Ranked
from pipeproof.exec.recomputed import recompute_only
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.sharded import check_wrapped
from pipeproof.exec.ties import check_alike, words_of
from pipeproof.exec.training import Training
from pipeproof.exec.units import check_sliced
from pipeproof.exec.updating import updated_by
from pipeproof.sched import Program


def alone(
    of: Training, program: Program, devices: Sequence[torch.device]
) -> tuple[Alone, Runtime]:
    """All devices of the schedule in this process.

    Args:
        of: what is trained.
        program: that is run.
        devices: the torch device of each of the schedule's.
    """
    schedule, stages = program.schedule, list(of.stages)
    check_wrapped(stages, schedule, None)
    homes = place(stages, schedule, devices, of.routes)
    tell_of_others(homes, stages, of.loss.modules)
    if of.recomputed is not None:
        recompute_only(homes, stages, schedule, of.recomputed)
    optimizers = updated_by(of.optimizers, originals(homes))
    if optimizers:
        check_alike(of.shares, words_of(originals(homes), optimizers))
    around = Surroundings(
        shares=of.shares,
        check_finite=of.check_finite,
        optimizers=optimizers,
        of_loss=of.loss.parameters,
    )
    runtime = Runtime(program, homes, of.loss.call, devices, around)
    return Alone(schedule, devices, of.loss_scale, of.loss), runtime


def among(
    grid: Grid, of: Training, program: Program, devices: Sequence[torch.device]
) -> tuple[Ranked, Runtime]:
    """One device's part in this process; the others are other ranks'.

    Args:
        grid: of all ranks.
        of: as for `alone`.
        program: likewise.
        devices: likewise.
    """
    ranked = Ranked(grid, program, of, devices)
    tell_of_others(ranked.homes, of.stages, of.loss.modules)
    for stage in ranked.homes.values():
        if program.schedule.slices > 1:
            check_sliced(stage.units)
    if of.recomputed is not None:
        recompute_only(
            ranked.homes, of.stages, program.schedule, of.recomputed, ranked.sharded
        )
    links = ranked.links
    around = Surroundings(
        mine=[grid.device],
        transport=links.messages,
        reduction=links.reducer,
        lend=None if links.borrower is None else links.borrower.loan,
        sharded=ranked.sharded,
        shares=of.shares,
        ties=ranked.ties.reducer,
        check_finite=of.check_finite,
        optimizers=ranked.optimizers,
        of_loss=of.loss.parameters,
    )
    return ranked, Runtime(program, ranked.homes, of.loss.call, devices, around)
