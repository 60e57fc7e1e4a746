"""A pipeline whose devices are processes: what they agree on, and when.

    before the first step   schedule, versions, shapes of parameters
    at the start of each    the seed of rank 0, rows, whether shapes are new
    at the end of each      the losses of the micro-batches, so that all know the sum

Whatever is found wrong there, all ranks find, with the same message. Where one rank
alone has losses, it tells them, and waits for none of the others to come to their end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec import clipping, scaling
from pipeproof.exec.agreement import agree, check_given
from pipeproof.exec.batch import (
    Batch,
    LossScale,
    Value,
    Weights,
    no_targets,
    no_unit_takes,
    shares,
    size_of,
    split,
    split_keywords,
    total_of,
    unmarked,
    weights,
)
from pipeproof.exec.bind import holders
from pipeproof.exec.errors import BatchError
from pipeproof.exec.forms import DTYPES
from pipeproof.exec.grid import Grid
from pipeproof.exec.links import Links
from pipeproof.exec.losses import Loss
from pipeproof.exec.rng import of_replica
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.sharded import Sharded, check_wrapped, is_sharded
from pipeproof.exec.skips import Routes
from pipeproof.exec.stage import Stage, StageModule
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import flat, placed
from pipeproof.exec.ties import Shares, tie_up
from pipeproof.exec.timetable import Array, merged
from pipeproof.exec.updating import Optimizers, in_words, updated_by
from pipeproof.sched import ParameterError, Program


class Ranked:
    """One rank's side of a pipeline.

    Args:
        grid: a rank for each device of the schedule, in each replica.
        program: what they run together.
        stages: those of this rank; others may be None, or are left as they are.
        devices: the torch device of each of the schedule's.
        loss_scale: as for `Pipeline`.
        routes: of the model's skip connections.
        shares: what its stages share.
        loss: of the last stage's output.
        optimizers: as for `Pipeline`.

    Attributes:
        grid: as given.
        homes: the stages that this rank runs, as for `Runtime`.
        sharded: those of them that torch shards.
        links: to the other ranks.
        ties: what is shared with them.
        optimizers: of the stages here.

    Raises:
        ParameterError: another number of ranks than of devices.
        ModelError: a stage of this rank is None, or shares a parameter with one of
            another.
        RankError: the ranks differ in what they run.
    """

    def __init__(
        self,
        grid: Grid,
        program: Program,
        stages: Sequence[StageModule | None],
        devices: Sequence[torch.device],
        loss_scale: LossScale,
        routes: Routes,
        shares: Shares,
        loss: Loss,
        optimizers: Optimizers | None = None,
    ) -> None:
        self._loss = loss
        self.grid, self._program = grid, program
        self._ranks, self._loss_scale = grid.ranks, loss_scale
        self._schedule = schedule = program.schedule
        if len(grid.row) != schedule.devices:
            raise ParameterError(
                f"{schedule.summary} runs on {schedule.devices} ranks, one for each "
                f"device, got {len(grid.row)}"
            )
        self._device = device = devices[grid.device]
        mine = [
            number
            for number in range(schedule.stages)
            if grid.device in holders(schedule, number)
        ]
        check_given(stages, mine, self._ranks.rank)
        check_wrapped(stages, schedule, grid.peers)
        kind = device.type
        steps = {n: in_words(optimizers[n]) for n in mine} if optimizers else {}
        first_unit = agree(grid, schedule, stages, mine, kind, loss_scale, steps)
        self.homes: dict[tuple[int, int], Stage] = {}
        for number in mine:
            module = stages[number]
            assert module is not None
            stage = Stage(number, module, first_unit[number], device, routes)
            self.homes[number, grid.device] = stage
        self.optimizers = updated_by(optimizers, self.homes.values())
        self._first, self._last = (n in mine for n in (0, schedule.stages - 1))
        self._last_device = holders(schedule, schedule.stages - 1)[0]
        self.sharded = {n: Sharded(stages[n]) for n in mine if is_sharded(stages[n])}
        self._signatures: list[str] = []
        self._decides: tuple[list[Any], str] = [], ""
        self.links = Links(grid, program, device, apart=self.sharded)
        self.ties = tie_up(
            grid, schedule, stages, self.homes, shares, device, self.optimizers
        )

    def step(self, runtime: Runtime, seed: int, batch: Batch) -> Step:
        """One step of all ranks.

        Args:
            runtime: of this one.
            seed: as drawn here; that of rank 0 counts.
            batch: inputs where a first stage is, targets with a last stage, keywords
                with a unit that takes them; ignored elsewhere.

        Returns:
            The step, with the losses of all ranks.
        """
        step = self._opened(runtime, seed, batch)
        runtime.run(step)
        self.links.reducer.finish()
        self.ties.reducer.finish()
        self._close(step)
        return step

    def timed_step(
        self, runtime: Runtime, seed: int, batch: Batch
    ) -> tuple[Step, Array, Array]:
        """As `step`; and when this pipeline's instructions started and ended."""
        step = self._opened(runtime, seed, batch)
        self.links.messages.agree()  # before anything else is exchanged
        offset = self._ranks.clock_offset()
        messages, reducers = (
            self.links.messages,
            (self.links.reducer, self.ties.reducer),
        )
        messages.recorded = True
        try:
            start, end = runtime.run_timed(step)
        finally:
            messages.recorded = False
        for reducer in reducers:
            reducer.finish()
        self._close(step)
        zero = runtime.clock.origin + offset
        times = {
            index: (index, zero + began, zero + ended)
            for index, began, ended in zip(runtime.here, start, end)
        }
        summed = [time for reducer in reducers for time in reducer.times()]
        for index, began, ended in messages.times() + summed:
            times[index] = index, began + offset, ended + offset
        said = self._ranks.exchange(list(times.values()), "the other ranks' times")
        return step, *merged(self._program, [said[rank] for rank in self.grid.row])

    def forward(
        self, runtime: Runtime, seed: int, batch: Batch, *, with_loss: bool
    ) -> Step:
        """The forwards alone of all ranks."""
        step = self._opened(runtime, seed, batch, "forward", with_loss)
        runtime.forward(step)
        self._close(step)
        return step

    def together(self, what: str) -> AbstractContextManager[None]:
        """Something that all ranks do; if one fails in it, all end it."""
        return self._ranks.together(what)

    def overflowed(self, runtime: Runtime, scaler: GradScaler) -> bool:
        """Whether any gradient of any rank is not finite."""
        scaling.ready(scaler, self._device)
        here = scaling.overflowed(runtime.parameters)
        said = self._ranks.exchange(here, "whether the other ranks' gradients overflow")
        return any(said)

    def norms(self, runtime: Runtime, norm_type: float) -> list[float]:
        """Of the gradient of each parameter of the model, once, in their order."""
        counted = set(self.ties.elsewhere)
        ours = []
        for (number, device), stage in sorted(self.homes.items()):
            if holders(self._schedule, number)[0] == device:
                own = [p for p in stage.parameters if id(p) not in counted]
                counted.update(map(id, own))
                ours.append([number, clipping.norms(own, norm_type)])
        said = self._ranks.exchange(ours, "the other ranks' norms")
        of_stages = sorted(of for rank in self.grid.row for of in said[rank])
        return [norm for _, found in of_stages for norm in found]

    def _opened(
        self,
        runtime: Runtime,
        seed: int,
        batch: Batch,
        kind: str = "step",
        with_loss: bool = True,
    ) -> Step:
        """The step; all ranks have agreed on it when the first message is due.

        Rank 0 has the seed, and so, where nothing else is asked for, all that its
        first ops need: it waits for the others when it has something for them.
        """
        step, own, found = self._parts(seed, batch, with_loss=with_loss)
        untold = self._last and with_loss and not (own.keys() & {"targets"})
        takes = runtime.takes_keywords
        names = sorted(batch.keywords), sorted(takes)
        signature = self._signature(kind, step, found, batch.keywords)
        answers = self._ranks.ask(
            [
                step.seed,
                own,
                signature,
                None if found is None else total_of(found),
                *names,
                step.accumulates,
            ],
            "the other ranks' next step",
        )

        def agreed() -> bool:
            said = answers()
            rows, positions = self._agreed(said)
            _check_keywords([of_rank[4:6] for of_rank in said])
            _check_alike([of_rank[6] for of_rank in said])
            step.seed = of_replica(said[0][0], self.grid.replica)
            counts = found
            if untold:
                counts = weights(step.targets, self._loss_scale, rows, positions)
            if counts is not None and (untold or len(self.grid.rows) > 1):
                of_rows = [self._weight(said, row) for row in self.grid.rows]
                step.factors = shares(counts, math.fsum(of_rows))
            if mine := {n: v for n, v in batch.keywords.items() if n in takes}:
                sizes = self._schedule.micro_batches, self._schedule.slices
                further = split_keywords(mine, rows, positions, sizes)
                step.keywords = {self._device: placed(further, self._device)}
            before = self._signatures
            self._signatures = [said[rank][2] for rank in self.grid.row]
            return before == self._signatures

        self.links.messages.begin(agreed)
        for lender in self.links.lenders:
            lender.begin()
        if self._ranks.rank or len(self.grid.rows) > 1 or any(names) or untold:
            self.links.messages.agree()
        return step

    def _parts(
        self, seed: int, batch: Batch, *, with_loss: bool
    ) -> tuple[Step, dict[str, list[int]], Weights | None]:
        """The step as far as it is known here, sizes by name, and the losses' weights.

        Their factors too, if no other replica has a part in them. Without targets,
        the inputs' rows tell both.
        """
        sizes = self._schedule.micro_batches, self._schedule.slices
        inputs: list[list[Value]] = []
        labels = no_targets(*sizes)
        found: Weights | None = None
        own: dict[str, list[int]] = {}
        if self._first:
            value = self._there(batch.inputs, "inputs")
            inputs = split("inputs", value, *sizes)
            own["inputs"] = list(size_of("inputs", value, sizes[1]))
        value = batch.targets
        if self._last and with_loss and (value is not None or self._loss.needs_targets):
            value = self._there(value, "targets")
            self._loss.check(value)
            labels = split("targets", value, *sizes)
            own["targets"] = list(size_of("targets", value, sizes[1]))
            # Rows and positions are those of the inputs; that is made sure of.
            found = weights(labels, self._loss_scale, *own["targets"])
        factors: list[list[float | None]]
        factors = [[None] * sizes[1] for _ in range(sizes[0])]
        if found is not None and len(self.grid.rows) == 1:
            factors = shares(found, total_of(found))
        step = Step(
            seed, placed(inputs, self._device), placed(labels, self._device), factors
        )
        step.with_loss = with_loss
        step.scaler, step.accumulates = batch.scaler, batch.accumulate
        return step, own, found

    def _agreed(self, said: Sequence[Any]) -> list[int]:
        """Rows and positions of this replica's batch."""
        first = holders(self._schedule, 0)[0]
        for row in self.grid.rows:
            wanted = said[row[first]][1]["inputs"]
            for rank in row:
                for name, found in said[rank][1].items():
                    if found != wanted:
                        raise BatchError(
                            f"the {name} of rank {rank} have {self._words(found)}, and "
                            f"the inputs {self._words(wanted)}: all ranks' parts must "
                            "be of one batch"
                        )
        size: list[int] = said[self.grid.row[first]][1]["inputs"]
        return size

    def _weight(self, said: Sequence[Any], row: Sequence[int]) -> float:
        """Of a replica's batch; without targets, of its rows and positions."""
        told: float | None = said[row[self._last_device]][3]
        first = holders(self._schedule, 0)[0]
        return math.prod(said[row[first]][1]["inputs"]) if told is None else told

    def _there(self, value: Value | None, name: str) -> Value:
        if value is None:
            rank = self._ranks.rank
            raise BatchError(
                f"rank {rank} got no {name}, and one of its stages needs them"
            )
        return value

    def _words(self, size: list[int]) -> str:
        sliced = self._schedule.slices > 1
        return f"{size[0]} rows" + (f" of {size[1]} positions" if sliced else "")

    def _signature(
        self, kind: str, step: Step, counts: Weights | None, keywords: Mapping[str, Any]
    ) -> str:
        """All on this rank that may decide what tensors cross to other ranks."""
        given = [value for slices in step.inputs for value in slices]
        parts: list[Any] = [
            (leaf.shape, leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in flat((given, unmarked(dict(keywords))))
        ]
        parts.append([weight == 0 for slices in counts or [] for weight in slices])
        for stage in self.homes.values():
            parts.append([p.requires_grad for p in stage.parameters])
            parts.append([m.training for m in stage.modules])
        parts.append(kind)
        if torch.is_autocast_enabled(device := self._device.type):
            parts.append(torch.get_autocast_dtype(device))
        if parts != self._decides[0]:
            self._decides = parts, hashlib.sha256(repr(parts).encode()).hexdigest()
        return self._decides[1]

    def _close(self, step: Step) -> None:
        """Tell each other the losses, and let go of what was sent."""
        messages = self.links.messages
        messages.agree()  # if there was nothing to send
        for lender in self.links.lenders:
            lender.end()
        ours = [
            [number, part, loss.item(), str(loss.dtype)]
            for number, slices in enumerate(step.losses)
            for part, loss in enumerate(slices)
            if loss is not None
        ]
        what = "the other ranks' losses"
        last = self.grid.holders(self._schedule, self._schedule.stages - 1)
        if len(last) == 1:
            in_order = self._ranks.told(ours, last[0], what)
        else:
            said = self._ranks.exchange(ours, what)
            in_order = [
                loss
                for row in self.grid.rows
                for loss in sorted(loss for rank in row for loss in said[rank])
            ]
        step.of_all = [
            torch.tensor(value, dtype=DTYPES[dtype], device=self._device)
            for _, _, value, dtype in in_order
        ]
        messages.end()


def _check_alike(accumulates: Sequence[bool]) -> None:
    """Refuse a step that some ranks take for one before their STEPs."""
    for rank, found in enumerate(accumulates):
        if found != accumulates[0]:
            raise BatchError(
                f"rank {rank} was called with accumulate={found}, and rank 0 with "
                f"accumulate={accumulates[0]}: give all the same"
            )


def _check_keywords(said: Sequence[Sequence[Sequence[str]]]) -> None:
    """Refuse keywords that no unit takes, or that a rank should have got.

    Args:
        said: of each rank, the names that it got and those that its units take.
    """
    given = sorted({name for got, _ in said for name in got})
    taken = {name for _, takes in said for name in takes}
    if unknown := [name for name in given if name not in taken]:
        raise BatchError(no_unit_takes(unknown, taken))
    for name in given:
        for rank, (got, takes) in enumerate(said):
            if name in takes and name not in got:
                raise BatchError(
                    f"rank {rank} got no keyword input {name!r}, which a unit of its "
                    "stages takes, and another rank did: give it to both"
                )
