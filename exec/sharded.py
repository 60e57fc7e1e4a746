"""Stages that torch wraps for data parallelism: FSDP2's run, the others are refused.

`fully_shard` keeps of each parameter a part on each data-parallel peer, gathers it
around forward and backward, and scatters the sum of the gradients behind a backward.
Here that is the stage's last backward of a step; what the earlier ones find is kept.
It sums instead of taking the mean, because factors are on the losses::

    B0 B1 B2 B3 ─▶ reduce-scatter        instead of one behind each
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeproof.exec.errors import ModelError
from pipeproof.exec.replicas import Run
from pipeproof.exec.units import StageModule
from pipeproof.sched import Kind, Schedule
from pipeproof.sched.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def is_sharded(module: StageModule | None) -> bool:
    """Whether FSDP2 shards some of a stage."""
    return module is not None and bool(_roots(module))


def check_wrapped(
    stages: Sequence[StageModule | None],
    schedule: Schedule,
    peers: Sequence[int] | None,
) -> None:
    """Refuse stages whose gradients torch would reduce at the wrong time, or not.

    Args:
        stages: as for `Pipeline`.
        schedule: that they run in.
        peers: the processes of this one's data-parallel peers, itself included; None
            where there are no processes of torch.distributed.

    Raises:
        ModelError: naming the stage, and what to do.
    """
    for number, module in enumerate(stages):
        if module is None:
            continue
        for part in _modules(module):
            if (name := type(part).__name__) in WRAPPERS:
                raise ModelError(
                    f"stage {number} holds a {name}, which would reduce gradients at "
                    "every micro-batch's backward: give the module that it wraps, and "
                    "data_parallel= (or fully_shard it)"
                )
        if roots := _roots(module):
            _check_sharded(number, roots, schedule, peers)


def _check_sharded(
    number: int,
    roots: Sequence[Any],
    schedule: Schedule,
    peers: Sequence[int] | None,
) -> None:
    if schedule.has(Kind.W):
        raise ModelError(
            f"stage {number} is sharded by fully_shard, which reduces gradients when "
            "that of the input is there, and in a split backward (I, W) those of the "
            "weights are not yet: use a schedule with whole backwards (merge_backward)"
        )
    if len(schedule.placement.pipes) > 1:
        raise ModelError(
            f"stage {number} is sharded by fully_shard, and {schedule.summary} holds "
            "replicas of it on several devices: use a schedule of one pipe"
        )
    meshes = {
        tuple(parameter.device_mesh.mesh.flatten().tolist())
        for root in roots
        for parameter in root.parameters()
        if hasattr(parameter, "device_mesh")
    }
    if peers is None or meshes != {tuple(peers)}:
        found = ", ".join(str(list(mesh)) for mesh in sorted(meshes))
        wanted = "none" if peers is None else str(list(peers))
        raise ModelError(
            f"stage {number} is sharded by fully_shard over processes {found}, and "
            f"data_parallel peers are {wanted}: shard it over the mesh that is given "
            "as data_parallel"
        )


class Sharded:
    """One such stage, and when it reduces its gradients.

    Args:
        module: the stage.

    Raises:
        UnsupportedError: this torch can only average its gradients.
    """

    def __init__(self, module: StageModule | None) -> None:
        assert module is not None
        self._roots = _roots(module)
        for root in self._roots:
            if not hasattr(root, "set_force_sum_reduction_for_comms"):
                raise UnsupportedError(
                    f"fully_shard of torch {torch.__version__} averages gradients and "
                    "cannot be told to add them up, as newer ones can: give the "
                    "stages unsharded, and data_parallel="
                )
            root.set_gradient_divide_factor(1.0)
            root.set_force_sum_reduction_for_comms(True)

    def before_last(self, run: Run) -> Run:
        """The last backward of a step: it reduces all gradients."""

        def reducing() -> None:
            self._sync(True)
            run()

        return reducing

    def begin(self) -> None:
        """The backwards to come keep what they find."""
        self._sync(False)

    def _sync(self, now: bool) -> None:
        for root in self._roots:
            root.set_requires_gradient_sync(now)
            root.set_is_last_backward(now)


def _modules(module: StageModule) -> Iterable[nn.Module]:
    for part in module if isinstance(module, (list, tuple)) else [module]:
        if isinstance(part, nn.Module):  # anything else is refused where it is used
            yield from part.modules()


def _roots(module: StageModule) -> list[FSDPModule]:
    """The outermost of FSDP2's modules in a stage."""
    # Importing it takes most of a second, and who shards has done so.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    found: list[Any] = []
    inside: set[int] = set()
    for part in _modules(module) if fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule):
            if id(part) not in inside:
                found.append(part)
            inside |= set(map(id, part.modules()))
    return found
