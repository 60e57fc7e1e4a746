"""Which processes of torch.distributed a group, or a mesh, stands for."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pipeproof.sched.errors import ParameterError

Along = dist.ProcessGroup | DeviceMesh
"""Processes of torch.distributed along one dimension."""


def processes_of(along: Along | bool) -> list[int]:
    """The processes of a group, of a mesh of one dimension, or all of them.

    Raises:
        ParameterError: torch.distributed is not initialised, or a mesh of several
            dimensions.
    """
    if not dist.is_initialized():
        raise ParameterError(
            "ranks need torch.distributed: call init_process_group first, or "
            "start the ranks with pipeproof.exec.launch"
        )
    if isinstance(along, bool):
        return list(range(dist.get_world_size()))
    if isinstance(along, DeviceMesh):
        if along.ndim != 1:
            raise ParameterError(
                f"a mesh of {along.ndim} dimensions is given for one: name it, as in "
                "mesh['pp']"
            )
        along = along.get_group()
    return dist.get_process_group_ranks(along)
