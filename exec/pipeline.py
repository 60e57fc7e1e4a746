"""The user's object: a model in stages, a schedule and a loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeproof.exec.batch import LossScale, Value, check_scale, factors, rows_of, split
from pipeproof.exec.errors import BatchError, ModelError
from pipeproof.exec.rng import step_seed
from pipeproof.exec.runtime import LossFn, Runtime, Step
from pipeproof.exec.stage import Stage, StageModule
from pipeproof.exec.tensors import copied
from pipeproof.sched import (
    BufferKind,
    Kind,
    ParameterError,
    Program,
    Schedule,
    Trace,
    UnsupportedError,
    lower,
)
from pipeproof.sched.causes import SHARED_PROCESSOR
from pipeproof.sched.memory import Sizes

RUNS = {Kind.F, Kind.B, Kind.I, Kind.W, Kind.R}


class Pipeline:
    """Trains a model in stages as a schedule says, in one process.

    `step` does what this does, for one batch::

        loss = loss_fn(model(inputs), targets)
        loss.backward()

    Stage s of the schedule is `stages[s]`. What a stage returns is what the next
    one is called with: a tensor, or a tuple of tensors as one argument. A stage may
    be a sequence of units, the smallest pieces a partition may cut between (an
    `nn.Sequential` is one); dropout and other randomness depends on the unit
    and the micro-batch, not on the schedule or on where the cuts fall.

    Args:
        stages: one for each stage of the schedule; moved to their devices.
        schedule: checked before anything runs.
        loss_fn: (output of the last stage, targets) → scalar.
        devices: one for all, or one for each device of the schedule.
        loss_scale: how the micro-batches' losses add up to the batch's. `rows`:
            `loss_fn` is a mean over rows, and each counts with its rows. `sum`: it
            is a sum. A callable gives the weight of a micro-batch from its targets
            (how many tokens count, for a mean that ignores some).

    Raises:
        ScheduleError: `check` has findings.
        ModelError: another number of stages than the schedule's, an empty one, or
            one that shares a parameter across devices.
        ParameterError: another number of devices, or an unknown loss scale.
        UnsupportedError: ops that are not executed yet.

    Source:
        Huang et al. 2018, arXiv:1811.06965 (synchronous micro-batches).
    """

    def __init__(
        self,
        stages: Sequence[StageModule] | nn.Sequential,
        schedule: Schedule,
        loss_fn: LossFn,
        devices: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        loss_scale: LossScale = "rows",
    ) -> None:
        check_scale(loss_scale)
        _supported(schedule)
        if isinstance(devices, (str, torch.device)):
            devices = [devices]
        self.schedule = schedule
        self._loss_scale = loss_scale
        self._shared = len(devices) == 1
        # On one device nothing is under way: a boundary tensor is handed over
        # when its consumer is next, and lies nowhere meanwhile but in one place.
        self.program: Program = lower(
            schedule, receives="late" if self._shared else "early"
        )
        self._stages = _place(list(stages), schedule, devices)
        self._devices = list(dict.fromkeys(stage.device for stage in self._stages))
        self._runtime = Runtime(self.program, self._stages, loss_fn)
        self._trace: Trace | None = None

    @property
    def trace(self) -> Trace:
        """The measured trace of the last recorded step, in seconds.

        Raises:
            ParameterError: no step was recorded.
        """
        if self._trace is None:
            raise ParameterError("no step was recorded: call step(…, record=True)")
        return self._trace

    def step(self, inputs: Value, targets: Value, *, record: bool = False) -> Tensor:
        """Forward and backward of one batch, micro-batch by micro-batch.

        The batch is cut along its first dimension as `torch.tensor_split` does, so
        it need not divide. Gradients add up in `.grad`, as with `loss.backward()`;
        there is no optimizer step.

        Args:
            inputs: shape (rows, …), or a tuple of such.
            targets: likewise, of as many rows.
            record: measure a `trace`.

        Returns:
            The batch's loss, a detached scalar.

        Raises:
            BatchError: fewer rows than micro-batches, or targets of other rows.
            LossError: a loss that is not a scalar, or weights that are none.
            ModelError: a stage that changes its input in place, or returns what
                cannot cross to the next.
            StepError: the model or the loss raised; the cause is chained.
            ParameterError: called inside `torch.inference_mode`.
        """
        if torch.is_inference_mode_enabled():
            raise ParameterError(
                "step computes gradients, and torch.inference_mode forbids them: call "
                "it outside"
            )
        count = self.schedule.micro_batches
        batch = split("inputs", inputs, count)
        labels = split("targets", targets, count)
        rows, found = rows_of("inputs", inputs), rows_of("targets", targets)
        if rows != found:
            raise BatchError(
                f"targets have {found} rows and inputs {rows}: each row of the inputs "
                "needs its target"
            )
        scale = factors(batch, labels, self._loss_scale)
        with torch.enable_grad(), step_seed(self._devices) as seed:
            step = Step(
                seed,
                _to(batch, self._stages[0].device),
                _to(labels, self._stages[-1].device),
                scale,
            )
            if record:
                self._trace = self._timed(step)
            else:
                self._runtime.run(step)
            _pass_on(inputs, step.input_grads)
        losses = [loss for loss in step.losses if loss is not None]
        total = losses[0].clone()
        for loss in losses[1:]:
            total += loss
        return total

    def _timed(self, step: Step) -> Trace:
        start, end = self._runtime.run_timed(step)
        notes = (SHARED_PROCESSOR,) if self._shared else ()
        times = np.array(start), np.array(end)
        return Trace(self.program, *times, "measured", _shares(self.program), notes)


def _supported(schedule: Schedule) -> None:
    schedule.report.raise_if_bad()
    kinds = {Kind(kind) for kind in np.unique(schedule.ops.kind).tolist()}
    if missing := sorted(kind.name for kind in kinds - RUNS):
        raise UnsupportedError(
            f"{schedule.summary}: {', '.join(missing)} can be simulated, but not "
            "executed yet"
        )
    if schedule.slices > 1:
        raise UnsupportedError(
            f"{schedule.summary}: sliced micro-batches can be simulated, but not "
            "executed yet"
        )


def _place(
    stages: list[StageModule],
    schedule: Schedule,
    devices: Sequence[str | torch.device],
) -> list[Stage]:
    if len(stages) != schedule.stages:
        hint = (
            "use a schedule of fewer stages, or cut the model into more"
            if len(stages) < schedule.stages
            else "join some, or use a schedule of more stages"
        )
        raise ModelError(
            f"{schedule.summary} runs {schedule.stages} stages, found a model of "
            f"{len(stages)}: {hint} (split_evenly cuts layers into stages)"
        )
    if len(devices) not in (1, schedule.devices):
        raise ParameterError(
            f"devices must name one device for all or {schedule.devices}, one for "
            f"each of the schedule's, got {len(devices)}"
        )
    placed: list[Stage] = []
    unit = 0
    for number, module in enumerate(stages):
        home = schedule.placement.pipes[0][number]
        device = torch.device(devices[home if len(devices) > 1 else 0])
        placed.append(Stage(number, module, unit, device))
        unit += len(placed[-1].units)
    _refuse_shared(placed)
    return placed


def _refuse_shared(stages: list[Stage]) -> None:
    home: dict[int, Stage] = {}
    for stage in stages:
        for parameter in stage.parameters:
            first = home.setdefault(id(parameter), stage)
            if first.device != stage.device:
                raise ModelError(
                    f"stages {first.number} and {stage.number} share a parameter of "
                    f"shape {tuple(parameter.shape)} across {first.device} and "
                    f"{stage.device}: put both on one device, or untie them"
                )


def _to(values: list[Value], device: torch.device) -> list[Value]:
    return [
        tuple(copied(tensor, device) for tensor in value)
        if isinstance(value, tuple)
        else copied(value, device)
        for value in values
    ]


def _pass_on(inputs: Value, grads: Sequence[Value | None]) -> None:
    """The gradient of the inputs, where they want one, as one backward."""
    if all(grad is None for grad in grads):
        return
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    parts = [grad if isinstance(grad, tuple) else (grad,) for grad in grads]
    for tensor, pieces in zip(tensors, zip(*parts)):
        if tensor.requires_grad:
            torch.autograd.backward(
                tensor, torch.cat([p.to(tensor.device) for p in pieces])
            )


def _shares(program: Program) -> Sizes:
    """Activations in micro-batches of a device's share; bytes are not known."""
    share = np.array(program.schedule.placement.shares()[0])
    whole = program.buffers[:, 0] == BufferKind.ACTIVATION
    weight = np.where(whole, 1 / share[program.buffers[:, 2]], 0)
    return Sizes(weight)
