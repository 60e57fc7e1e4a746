"""A pipeline whose devices are processes: what they agree on, and when.

    before the first step   schedule, versions, shapes of parameters
    at the start of each    the seed of rank 0, rows, whether shapes are new
    at the end of each      the losses of the micro-batches, so that all know the sum

Whatever is found wrong there, all ranks find, with the same message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from pipeproof.exec.agreement import agree, check_given
from pipeproof.exec.batch import (
    LossScale,
    Value,
    Weights,
    positions_of,
    rows_of,
    shares,
    split,
    total_of,
    weights,
)
from pipeproof.exec.bind import holders
from pipeproof.exec.errors import BatchError
from pipeproof.exec.forms import DTYPES
from pipeproof.exec.grid import Grid
from pipeproof.exec.links import Links
from pipeproof.exec.rng import of_replica
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.sharded import Sharded, check_wrapped, is_sharded
from pipeproof.exec.stage import Stage, StageModule
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import copied, flat
from pipeproof.exec.timetable import Array, merged
from pipeproof.sched import ParameterError, Program


class Ranked:
    """One rank's side of a pipeline.

    Args:
        grid: a rank for each device of the schedule, in each replica.
        program: what they run together.
        stages: those of this rank; others may be None, or are left as they are.
        devices: the torch device of each of the schedule's.
        loss_scale: as for `Pipeline`.

    Attributes:
        grid: as given.
        homes: the stages that this rank runs, as for `Runtime`.
        sharded: those of them that torch shards.
        links: to the other ranks.

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
    ) -> None:
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
        first_unit = agree(grid, schedule, stages, mine, kind, loss_scale)
        self.homes: dict[tuple[int, int], Stage] = {}
        for number in mine:
            module = stages[number]
            assert module is not None
            stage = Stage(number, module, first_unit[number], device)
            self.homes[number, grid.device] = stage
        self._first, self._last = (n in mine for n in (0, schedule.stages - 1))
        self.sharded = {n: Sharded(stages[n]) for n in mine if is_sharded(stages[n])}
        self._signatures: list[str] = []
        self._decides: tuple[list[Any], str] = [], ""
        self.links = Links(grid, program, device, apart=self.sharded)

    def step(
        self,
        runtime: Runtime,
        seed: int,
        inputs: Value | None,
        targets: Value | None,
    ) -> Step:
        """One step of all ranks.

        Args:
            runtime: of this one.
            seed: as drawn here; that of rank 0 counts.
            inputs: the batch, where a first stage is; ignored elsewhere.
            targets: likewise, with a last stage.

        Returns:
            The step, with the losses of all ranks.
        """
        step = self._begun(seed, inputs, targets)
        runtime.run(step)
        self.links.reducer.finish()
        self._close(step)
        return step

    def timed_step(
        self,
        runtime: Runtime,
        seed: int,
        inputs: Value | None,
        targets: Value | None,
    ) -> tuple[Step, Array, Array]:
        """As `step`; and when this pipeline's instructions started and ended."""
        step = self._begun(seed, inputs, targets)
        offset = self._ranks.clock_offset()
        messages, reducer = self.links.messages, self.links.reducer
        messages.recorded = True
        try:
            start, end = runtime.run_timed(step)
        finally:
            messages.recorded = False
        reducer.finish()
        self._close(step)
        zero = runtime.clock.origin + offset
        times = {
            index: (index, zero + began, zero + ended)
            for index, began, ended in zip(runtime.here, start, end)
        }
        for index, began, ended in messages.times() + reducer.times():
            times[index] = index, began + offset, ended + offset
        said = self._ranks.exchange(list(times.values()), "the other ranks' times")
        return step, *merged(self._program, [said[rank] for rank in self.grid.row])

    def _begun(self, seed: int, inputs: Value | None, targets: Value | None) -> Step:
        """The step, when all ranks have agreed on it."""
        sizes = self._schedule.micro_batches, self._schedule.slices
        batch: list[list[Value]] = []
        labels: list[list[Value]] = []
        found: Weights | None = None
        if self._first:
            batch = split("inputs", self._there(inputs, "inputs"), *sizes)
        if self._last:
            labels = split("targets", self._there(targets, "targets"), *sizes)
            # Rows and positions are those of the inputs; that is made sure of.
            found = weights(labels, labels, self._loss_scale)
        factors: list[list[float | None]]
        factors = [[None] * sizes[1] for _ in range(sizes[0])]
        step = Step(seed, self._moved(batch), self._moved(labels), factors)
        total = self._open(step, found, inputs, targets)
        if found is not None:
            step.factors = shares(found, total)
        return step

    def _there(self, value: Value | None, name: str) -> Value:
        if value is None:
            rank = self._ranks.rank
            raise BatchError(
                f"rank {rank} got no {name}, and one of its stages needs them"
            )
        return value

    def _moved(self, parts: list[list[Value]]) -> list[list[Value]]:
        device = self._device
        return [
            [
                tuple(copied(tensor, device) for tensor in value)
                if isinstance(value, tuple)
                else copied(value, device)
                for value in slices
            ]
            for slices in parts
        ]

    def _open(
        self,
        step: Step,
        counts: Weights | None,
        inputs: Value | None,
        targets: Value | None,
    ) -> float:
        """Agree on the seed, on the batch's rows, and on whether shapes are new.

        Returns:
            What all micro-batches of all replicas weigh.
        """
        sizes = {}
        if self._first:
            sizes["inputs"] = self._size("inputs", self._there(inputs, "inputs"))
        if self._last:
            sizes["targets"] = self._size("targets", self._there(targets, "targets"))
        said = self._ranks.exchange(
            [step.seed, sizes, self._signature(step, counts), total_of(counts)],
            "the other ranks' next step",
        )
        first, last = (
            holders(self._schedule, n)[0] for n in (0, self._schedule.stages - 1)
        )
        for row in self.grid.rows:
            wanted = said[row[first]][1]["inputs"]
            for rank in row:
                for name, found in said[rank][1].items():
                    if found != wanted:
                        raise BatchError(
                            f"the {name} of rank {rank} have {found}, and the inputs "
                            f"{wanted}: all ranks' parts must be of one batch"
                        )
        step.seed = of_replica(said[0][0], self.grid.replica)
        signatures = [said[rank][2] for rank in self.grid.row]
        self.links.messages.begin(announced=signatures == self._signatures)
        self._signatures = signatures
        for lender in self.links.lenders:
            lender.begin()
        return math.fsum(said[row[last]][3] for row in self.grid.rows)

    def _size(self, name: str, value: Value) -> str:
        rows = f"{rows_of(name, value)} rows"
        if self._schedule.slices == 1:
            return rows
        return f"{rows} of {positions_of(name, value)} positions"

    def _signature(self, step: Step, counts: Weights | None) -> str:
        """All on this rank that may decide what tensors cross to other ranks."""
        parts: list[Any] = [
            [(t.shape, t.dtype, t.requires_grad) for t in flat(value)]
            for slices in step.inputs
            for value in slices
        ]
        parts.append([weight == 0 for slices in counts or [] for weight in slices])
        for stage in self.homes.values():
            parts.append([p.requires_grad for p in stage.parameters])
            parts.append([m.training for m in stage.modules])
        if torch.is_autocast_enabled(kind := self._device.type):
            parts.append(torch.get_autocast_dtype(kind))
        if parts != self._decides[0]:
            self._decides = parts, hashlib.sha256(repr(parts).encode()).hexdigest()
        return self._decides[1]

    def _close(self, step: Step) -> None:
        """Tell each other the losses; when all have, all is received."""
        ours = [
            [number, part, loss.item(), str(loss.dtype)]
            for number, slices in enumerate(step.losses)
            for part, loss in enumerate(slices)
            if loss is not None
        ]
        for lender in self.links.lenders:
            lender.end()
        said = self._ranks.exchange(ours, "the other ranks' losses")
        in_order = [
            loss
            for row in self.grid.rows
            for loss in sorted(loss for rank in row for loss in said[rank])
        ]
        step.of_all = [
            torch.tensor(value, dtype=DTYPES[dtype], device=self._device)
            for _, _, value, dtype in in_order
        ]
        self.links.messages.end()
