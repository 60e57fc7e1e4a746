"""The steps of a program: a walk over the functions of its instructions.

Binding them happens once (`instructions.py`). The walk is in the program's order, which
waits for nothing: that order has every instruction after all it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch

from pipeproof.exec.clock import Clock
from pipeproof.exec.errors import BatchError, ModelError, RankError, StepError
from pipeproof.exec.failure import in_words
from pipeproof.exec.finite import check_before
from pipeproof.exec.instructions import Instructions, Runs, Surroundings, nothing
from pipeproof.exec.replicas import Run
from pipeproof.exec.slot import changed_in_place
from pipeproof.exec.step import Step
from pipeproof.exec.updating import HALF_UPDATED
from pipeproof.exec.workspace import Homes, Workspace
from pipeproof.sched import Kind, Program
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.instructions import Message
from pipeproof.sched.ir import STAGE_KINDS

HALF_DONE = (
    "\nGradients of some micro-batches are in .grad and others are not: zero them "
    "before the next step."
)
ALONE = Surroundings()
_CHANGED = re.compile(r"modified by an inplace operation: \[\S+ \[([\d, ]*)\]")
"""What autograd says where it finds a saved tensor changed."""


class Runtime:
    """Runs the steps of a program.

    Args:
        program: lowered.
        homes: by stage and device of the schedule, the stages; all that this
            process's devices hold.
        loss_fn: (output of the last stage, targets) → scalar.
        devices: the torch device of each of the schedule's.
        around: what this process runs them in.

    Attributes:
        here: the instructions that this process runs.
        stages: that run here.
        parameters: of these and of the loss, if it is here, each once; the user's own.
        takes_keywords: names of keyword inputs that any unit here takes.
        needs_keywords: those of them that it has no default for.
        clock: of the last timed step.
        ran_s: seconds that the last one took which was not timed.
    """

    def __init__(
        self,
        program: Program,
        homes: Homes,
        loss_fn: Callable[[Any, Any], Any],
        devices: Sequence[torch.device],
        around: Surroundings = ALONE,
    ) -> None:
        self._program, self._devices, self._around = program, devices, around
        self.stages = list({id(stage): stage for stage in homes.values()}.values())
        own = [p for stage in self.stages for p in stage.original.parameters]
        last = program.schedule.stages - 1
        if any(stage.number == last for stage in self.stages):
            own += around.of_loss
        self.parameters = list({id(p): p for p in own}.values())
        self.takes_keywords = frozenset[str]().union(
            *(stage.takes_keywords for stage in self.stages)
        )
        self.needs_keywords = frozenset[str]().union(
            *(stage.needs_keywords for stage in self.stages)
        )
        kinds = {stage.device.type for stage in self.stages}
        self._kinds = sorted(filter(torch.amp.is_autocast_available, kinds))
        self.clock: Clock
        self.ran_s, self._at = 0.0, -1
        self._space = Workspace(program, homes)
        self._instructions = Instructions(self._space, loss_fn, devices, around)
        self.here = self._instructions.here
        self._runs = self._instructions.bound()
        self._busy = [(i, run) for i, run in self._runs if run is not nothing]
        self._forwards: tuple[Runs, list[Message]] | None = None

    def run(self, step: Step) -> None:
        """All instructions, in the program's order.

        Raises:
            StepError: something in the model or the loss failed; the cause is
                chained.
        """
        began = perf_counter()
        self._walk(step, self._busy, self._complete)
        self.ran_s = perf_counter() - began

    def run_timed(self, step: Step) -> tuple[list[float], list[float]]:
        """As `run`; when each instruction started and ended, in seconds."""
        clock = self.clock = Clock([stage.device for stage in self.stages])

        def timed(run: Run, device: torch.device) -> None:
            clock.mark(device)
            run()
            clock.mark(device)

        runs: Runs = [
            (i, partial(timed, run, self._device(i))) for i, run in self._runs
        ]
        self._walk(step, runs, self._complete)
        return clock.read()

    def where(self) -> str:
        """The instruction under way, for messages."""
        return "" if self._at < 0 else self._program[self._at].label

    def forward(self, step: Step) -> None:
        """The forwards alone, without gradients; outputs go into the step.

        Raises:
            StepError: as `run`.
        """
        if self._forwards is None:
            self._forwards = self._instructions.bound_forwards()
        forwards, awaited = self._forwards

        def finish() -> None:
            for message in awaited:
                assert self._around.transport is not None
                self._around.transport.finish(message)

        with torch.no_grad():
            self._walk(step, forwards, finish, "")

    def _walk(self, step: Step, runs: Runs, then: Run, left: str = HALF_DONE) -> None:
        """Run these, and then that; what a broken step leaves is said, if anything."""
        self._begin(step)
        try:
            for self._at, run in runs:
                run()
            then()
        except (RankError, BatchError):  # say where by themselves
            raise
        except Exception as error:
            raise self._broken(self._at, error, left) from error
        finally:
            self._at = -1
            self._end()

    def _begin(self, step: Step) -> None:
        if self._around.check_finite and torch.is_grad_enabled():
            check_before(self.stages)
        self._space.step = step
        self._space.autocast = any(map(torch.is_autocast_enabled, self._kinds))
        for stage in self.stages:
            stage.begin()
        for sharded in self._around.sharded.values():
            sharded.begin()

    def _complete(self) -> None:
        for stage in self.stages:
            stage.complete()

    def _end(self) -> None:
        """Let go of every tensor of the step, whether or not it came to its end."""
        for stage in self.stages:
            stage.end()
        self._space.forget()
        if self._around.transport is not None:
            self._around.transport.forget()
        self._instructions.begin()

    def _device(self, index: int) -> torch.device:
        return self._devices[int(self._program.device[index])]

    def _broken(self, index: int, error: Exception, left: str) -> Exception:
        if found := _CHANGED.search(in_words(error)):
            shape = tuple(map(int, found[1].split(","))) if found[1] else ()
            error = ModelError(changed_in_place(shape))
        instruction = self._program[index]
        if instruction.ops:
            op = instruction.ops[0]
            where = f"{op} (stage {op.stage}"
            if op.kind not in STAGE_KINDS:
                where += f", micro-batch {op.micro_batch}"
        else:
            where = f"{instruction.label} ("
        if left and self._program.schedule.has(Kind.STEP):
            left = HALF_UPDATED
        where += f"{', ' if instruction.ops else ''}device {self._device(index)})"
        text = f"the step broke off at {where}: {in_words(error)}{left}"
        return (
            type(error)(text) if isinstance(error, PipeproofError) else StepError(text)
        )
