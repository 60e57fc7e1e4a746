"""A pipeline whose devices are processes: what they agree on, and when.

    before the first step   schedule, versions, shapes of parameters
    at the start of each    the seed of rank 0, rows, whether shapes are new
    at the end of each      the losses of the micro-batches, so that all know the sum

Whatever is found wrong there, all ranks find, with the same message. Where one rank
alone has losses, it tells them, and waits for none of the others to come to their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec import clipping, scaling
from pipeproof.exec.agreement import agree, check_given
from pipeproof.exec.batch import (
    Batch,
    Value,
    Weights,
    no_targets,
    shares,
    size_of,
    split,
    split_keywords,
    total_of,
    weights,
)
from pipeproof.exec.errors import BatchError
from pipeproof.exec.forms import DTYPES
from pipeproof.exec.grid import Grid
from pipeproof.exec.homes import holders
from pipeproof.exec.links import Links
from pipeproof.exec.losses import check_learning
from pipeproof.exec.opening import Opening
from pipeproof.exec.rng import of_replica
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.sharded import Sharded, check_wrapped, is_sharded
from pipeproof.exec.stage import Stage
from pipeproof.exec.step import Step, ToldLosses
from pipeproof.exec.tensors import copied, placed
from pipeproof.exec.ties import tie_up
from pipeproof.exec.timetable import Ends, from_text, merged, to_text
from pipeproof.exec.training import Training
from pipeproof.exec.updating import in_words, updated_by
from pipeproof.sched import ParameterError, Program


class Ranked:
    """One rank's side of a pipeline.

    Args:
        grid: a rank for each device of the schedule, in each replica.
        program: what they run together.
        of: what they train; other ranks' stages may be None, or are left as they are.
        devices: the torch device of each of the schedule's.

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
        of: Training,
        devices: Sequence[torch.device],
    ) -> None:
        self.grid, self._program, self._of = grid, program, of
        self._ranks, stages = grid.ranks, of.stages
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
        last = grid.holders(schedule, schedule.stages - 1)
        check_learning(of.loss, stages, mine, last)
        optimizers, scale = of.optimizers, of.loss_scale
        steps = {n: in_words(optimizers[n]) for n in mine} if optimizers else {}
        first_unit = agree(
            grid, schedule, stages, mine, device.type, scale, of.messages, steps
        )
        self.homes: dict[tuple[int, int], Stage] = {}
        for number in mine:
            module = stages[number]
            assert module is not None
            stage = Stage(number, module, first_unit[number], device, of.routes)
            self.homes[number, grid.device] = stage
        self.optimizers = updated_by(optimizers, self.homes.values())
        self._first, self._last = (n in mine for n in (0, schedule.stages - 1))
        self._last_ranks = grid.holders(schedule, schedule.stages - 1)
        self._cuts = schedule.micro_batches, schedule.slices
        self._no_targets = no_targets(*self._cuts)
        self.sharded = {n: Sharded(stages[n]) for n in mine if is_sharded(stages[n])}
        self._opening = Opening(grid, schedule, self.homes.values(), device)
        self.links = Links(grid, program, device, apart=self.sharded)
        self.ties = tie_up(
            grid, schedule, stages, self.homes, of.shares, device, self.optimizers
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
    ) -> tuple[Step, Ends]:
        """As `step`; and when this pipeline's instructions started and ended."""
        step = self._opened(runtime, seed, batch, what="recorded step")
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
        text = to_text(list(times.values()))
        said = self._ranks.exchange(text, "the other ranks' times")
        row = [said[rank] for rank in self.grid.row]
        return step, lambda: merged(self._program, list(map(from_text, row)))

    def forward(
        self, runtime: Runtime, seed: int, batch: Batch, *, with_loss: bool
    ) -> Step:
        """The forwards alone of all ranks."""
        what = "evaluation" if with_loss else "prediction"
        step = self._opened(runtime, seed, batch, "forward", with_loss, what)
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
        last = self._schedule.stages - 1
        for (number, device), stage in sorted(self.homes.items()):
            if holders(self._schedule, number)[0] == device:
                of_loss = self._of.loss.parameters if number == last else []
                every = [*stage.parameters, *of_loss]
                own = [p for p in every if id(p) not in counted]
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
        what: str = "step",
    ) -> Step:
        """The step; all ranks have agreed on it when the first message is due.

        Rank 0 has the seed, and so, where nothing else is asked for, all that its
        first ops need: it waits for the others when it has something for them.
        """
        self._ranks.within(runtime.where)
        step, sizes, found = self._parts(seed, batch, with_loss=with_loss)
        untold = self._last and with_loss and "targets" not in sizes
        takes = runtime.takes_keywords
        opening, messages = self._opening, self.links.messages
        line = opening.line(kind, batch, sizes, found, takes)
        answers = self._ranks.ask(
            f"{step.seed} {line}", f"the other ranks' next {what}"
        )

        def agreed() -> bool:
            said = [text.split(" ", 1) for text in answers()]
            same = opening.heard([line for _, line in said])
            step.seed = of_replica(int(said[0][0]), self.grid.replica)
            counts = found
            if untold:
                counts = weights(step.targets, self._of.loss_scale, *opening.size)
            if counts is not None and (untold or len(self.grid.rows) > 1):
                step.factors = shares(counts, opening.weight)
            if mine := {n: v for n, v in batch.keywords.items() if n in takes}:
                further = split_keywords(mine, *opening.size, self._cuts)
                step.keywords = {self._device: placed(further, self._device)}
            return same

        messages.begin(agreed)
        for lender in self.links.lenders:
            lender.begin()
        known = not (self._ranks.rank or batch.keywords or takes or untold)
        if not known or len(self.grid.rows) > 1:
            messages.agree()
        return step

    def _parts(
        self, seed: int, batch: Batch, *, with_loss: bool
    ) -> tuple[Step, dict[str, list[int]], Weights | None]:
        """The step as far as it is known here, sizes by name, and the losses' weights.

        Their factors too, if no other replica has a part in them. Without targets,
        the inputs' rows tell both.
        """
        inputs: list[list[Value]] = []
        labels = self._no_targets
        found: Weights | None = None
        sizes: dict[str, list[int]] = {}
        if self._first:
            inputs, sizes["inputs"] = self._cut(batch.inputs, "inputs")
        value, loss = batch.targets, self._of.loss
        if self._last and with_loss and (value is not None or loss.needs_targets):
            loss.check(self._there(value, "targets"))
            labels, sizes["targets"] = self._cut(value, "targets")
            # Rows and positions are those of the inputs; that is made sure of.
            found = weights(labels, self._of.loss_scale, *sizes["targets"])
        factors: list[list[float | None]] = self._no_targets
        if found is not None and len(self.grid.rows) == 1:
            factors = shares(found, total_of(found))
        step = Step(seed, inputs, labels, factors)
        step.with_loss = with_loss
        step.scaler, step.accumulates = batch.scaler, batch.accumulate
        return step, sizes, found

    def _cut(
        self, value: Value | None, name: str
    ) -> tuple[list[list[Value]], list[int]]:
        """Each micro-batch's slices, on this rank's device; rows and positions."""
        value, device = self._there(value, name), self._device
        if isinstance(value, Tensor):  # nearly always, and moved as a whole
            value = copied(value, device)
            parts = split(name, value, *self._cuts)
        else:
            parts = placed(split(name, value, *self._cuts), device)
        return parts, list(size_of(name, value, self._cuts[1]))

    def _there(self, value: Value | None, name: str) -> Value:
        if value is None:
            rank = self._ranks.rank
            raise BatchError(
                f"rank {rank} got no {name}, and one of its stages needs them"
            )
        return value

    def _close(self, step: Step) -> None:
        """Tell each other the losses, and let go of what was sent."""
        messages = self.links.messages
        messages.agree()  # if there was nothing to send
        for lender in self.links.lenders:
            lender.end()
        what = "the other ranks' losses"
        if len(self._last_ranks) == 1:
            ours = _in_numbers(step) if self._last else None
            found = self._ranks.told(ours, self._last_ranks[0], what)
        else:
            found = self._merged(self._ranks.exchange(_each(step), what))
        self._ranks.end_if_failed()  # what a device had not to wait for is no number
        numbers, dtypes, total = found
        types = [DTYPES[dtype] for dtype in dtypes]
        step.told = ToldLosses(numbers, types, self._device, total)
        messages.end()

    def _merged(
        self, said: Sequence[Sequence[Any]]
    ) -> tuple[list[float], list[str], float | None]:
        """Of all ranks, in the order of the replicas and of their micro-batches."""
        in_order = [
            loss
            for row in self.grid.rows
            for loss in sorted(loss for rank in row for loss in said[rank])
        ]
        return [loss[2] for loss in in_order], [loss[3] for loss in in_order], None


def _each(step: Step) -> list[Any]:
    """The losses here: micro-batch and slice, number, type."""
    return [
        [*where, loss.item(), str(loss.dtype)] for where, loss in step.losses.items()
    ]


def _in_numbers(step: Step) -> tuple[list[float], list[str], float | None]:
    """All losses, which are here: the numbers, their types or their one, the total."""
    losses = step.all_losses
    dtypes = [str(loss.dtype) for loss in losses.parts]
    total = losses.total.item() if dtypes else None
    if len(set(dtypes)) == 1:
        dtypes = dtypes[:1]
    return [loss.item() for loss in losses.parts], dtypes, total
