"""What can be wrong with a model, a batch or a loss that we are handed."""

from __future__ import annotations

from pipeproof.sched.errors import PipeproofError


class ModelError(PipeproofError, ValueError):
    """Stages that do not fit the schedule, the devices or each other."""


class BatchError(PipeproofError, ValueError):
    """Inputs and targets that cannot be split into micro-batches."""


class LossError(PipeproofError, ValueError):
    """A loss, or a weight for it, that cannot be summed over micro-batches."""


class StepError(PipeproofError, RuntimeError):
    """A step that broke off; the cause is chained.

    Gradients of some micro-batches are in `.grad` by then and others are not:
    zero them before the next step.
    """


class RankError(PipeproofError, RuntimeError):
    """Ranks that do not agree, or that end because another one failed."""
