"""All devices of a schedule in one process: what `Ranked` is among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec import clipping, scaling
from pipeproof.exec.batch import (
    Batch,
    LossScale,
    Value,
    check_pairs,
    factors,
    no_targets,
    no_unit_takes,
    size_of,
    split,
    split_keywords,
)
from pipeproof.exec.errors import BatchError
from pipeproof.exec.losses import Loss
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import placed
from pipeproof.exec.timetable import Ends
from pipeproof.sched import Schedule


class Alone:
    """Runs steps of all devices.

    Args:
        schedule: with the skips and ties of the stages.
        devices: the torch device of each of the schedule's.
        loss_scale: as for `Pipeline`.
        loss: likewise.
    """

    def __init__(
        self,
        schedule: Schedule,
        devices: Sequence[torch.device],
        loss_scale: LossScale,
        loss: Loss,
    ) -> None:
        self._schedule, self._devices = schedule, devices
        self._loss_scale, self._loss = loss_scale, loss

    def together(self, what: str) -> AbstractContextManager[None]:
        """Nobody else takes part."""
        return nullcontext()

    def step(self, runtime: Runtime, seed: int, batch: Batch) -> Step:
        """One step, as drawn by its seed."""
        step = self._opened(runtime, seed, batch, with_loss=True)
        runtime.run(step)
        return step

    def timed_step(
        self, runtime: Runtime, seed: int, batch: Batch
    ) -> tuple[Step, Ends]:
        """As `step`; and when instructions started and ended."""
        step = self._opened(runtime, seed, batch, with_loss=True)
        start, end = map(np.array, runtime.run_timed(step))
        return step, lambda: (start, end)

    def forward(
        self, runtime: Runtime, seed: int, batch: Batch, *, with_loss: bool
    ) -> Step:
        """The forwards alone."""
        step = self._opened(runtime, seed, batch, with_loss=with_loss)
        runtime.forward(step)
        return step

    def overflowed(self, runtime: Runtime, scaler: GradScaler) -> bool:
        """Whether any gradient is not finite."""
        return scaling.overflowed(runtime.parameters)

    def norms(self, runtime: Runtime, norm_type: float) -> list[float]:
        """Of the gradient of each parameter of the model, once, in their order."""
        return clipping.norms(runtime.parameters, norm_type)

    def _opened(
        self, runtime: Runtime, seed: int, batch: Batch, *, with_loss: bool
    ) -> Step:
        """The batch in parts, each where it is needed."""
        parts = self._schedule.micro_batches, self._schedule.slices
        inputs = split("inputs", batch.inputs, *parts)
        labels = no_targets(*parts)
        scale: list[list[float | None]] = [[None] * parts[1] for _ in range(parts[0])]
        if with_loss:
            self._loss.check(batch.targets)
        if batch.targets is None:
            size = size_of("inputs", batch.inputs, parts[1])
        else:
            size = check_pairs(batch.inputs, batch.targets, parts[1])
            labels = split("targets", batch.targets, *parts)
        if with_loss:
            scale = factors(labels, self._loss_scale, *size)
        step = Step(seed, self._sent(inputs, 0), self._sent(labels, -1), scale)
        step.with_loss = with_loss
        step.keywords = self._keywords(runtime, batch.keywords, size)
        step.scaler, step.accumulates = batch.scaler, batch.accumulate
        return step

    def _keywords(
        self, runtime: Runtime, keywords: Mapping[str, Any], size: tuple[int, int]
    ) -> dict[torch.device, list[list[dict[str, Any]]]]:
        """On each device, those of each slice."""
        if not keywords:
            return {}
        taken = runtime.takes_keywords
        if unknown := sorted(keywords.keys() - taken):
            raise BatchError(no_unit_takes(unknown, taken))
        parts = self._schedule.micro_batches, self._schedule.slices
        cut = split_keywords(keywords, *size, parts)
        return {device: placed(cut, device) for device in set(self._devices)}

    def _sent(self, batch: list[list[Value]], stage: int) -> list[list[Value]]:
        """Each micro-batch where the first or the last stage of its pipe runs."""
        pipes = self._schedule.placement.pipes
        homes = [pipes[pipe][stage] for pipe in self._schedule.pipe_of.tolist()]
        return [
            [placed(value, self._devices[home]) for value in slices]
            for home, slices in zip(homes, batch)
        ]
