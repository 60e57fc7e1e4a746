"""What a pipeline trains: the stages, the loss, and what is wanted of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeproof.exec.batch import LossScale
from pipeproof.exec.losses import Loss
from pipeproof.exec.recomputed import Recomputed
from pipeproof.exec.skips import Routes
from pipeproof.exec.ties import Shares
from pipeproof.exec.units import StageModule
from pipeproof.exec.updating import Optimizers
from pipeproof.sched.lower import Messages


@dataclass(frozen=True)
class Training:
    """As a `Pipeline` was given it, and what is found in it.

    Attributes:
        stages: as given; of other ranks they may be None.
        loss: of the last stage's output.
        loss_scale, messages, check_finite, optimizers, recomputed: as given.
        routes: of the stages' skip connections.
        shares: what stages share.
    """

    stages: Sequence[StageModule | None]
    loss: Loss
    loss_scale: LossScale
    messages: Messages
    check_finite: bool
    optimizers: Optimizers | None
    recomputed: Recomputed | None
    routes: Routes
    shares: Shares
