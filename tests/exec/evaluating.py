"""Jobs that evaluate, predict and clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jobs import Job, digest, grads_of

from pipeproof.exec import Pipeline
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gives, between two steps.

    Attributes:
        losses: of a step, the evaluation, and another step.
        predicted: where the last stage is; else empty.
    """

    losses: list[str]
    predicted: str


def evaluated(ranks: Ranks | bool, job: Job) -> Evaluated:
    """Evaluate and predict between two steps."""
    (batch,) = job.batches()
    pipeline = Pipeline(job.stages(), job.schedule, job.loss, ranks=ranks)
    torch.manual_seed(5)
    losses = [pipeline.step(*batch), pipeline.evaluate(*batch)]
    predicted = pipeline.predict(batch[0])
    losses.append(pipeline.step(*batch))
    return Evaluated(
        list(map(digest, losses)), "" if predicted is None else digest(predicted)
    )


@dataclass(frozen=True)
class Clipped:
    """The norm of all gradients, and those of the stages here when clipped."""

    norm: float
    grads: dict[int, str]


def clipped(ranks: Ranks | bool, job: Job) -> Clipped:
    """Clip after a step."""
    (batch,) = job.batches()
    stages, schedule = job.stages(), job.schedule
    mine = [
        n
        for n in range(schedule.stages)
        if not isinstance(ranks, Ranks) or ranks.rank in holders(schedule, n)
    ]
    pipeline = Pipeline(stages, schedule, job.loss, ranks=ranks)
    torch.manual_seed(5)
    pipeline.step(*batch)
    norm = pipeline.clip_grad_norm_(1e-2)
    return Clipped(norm, grads_of(stages, mine))
