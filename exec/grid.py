"""Pipelines side by side: which rank runs which device of which replica.

                device 0   device 1            data parallel: each column holds
    replica 0   rank 0     rank 1      ─▶      the same stages, on other rows of the
    replica 1   rank 2     rank 3              batch, and sums their gradients

All of them are one company of ranks: a failure anywhere ends all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from pipeproof.exec.group import CONNECT_S, Ranks
from pipeproof.exec.homes import holders
from pipeproof.exec.processes import Along, processes_of
from pipeproof.sched import Schedule
from pipeproof.sched.errors import ParameterError


@dataclass(frozen=True)
class Grid:
    """All ranks that train one model.

    Attributes:
        ranks: the company.
        rows: of each replica, the rank of each device.
        replica, device: of this rank.
        peers: the processes of torch.distributed that run the same device in each
            replica; None where replicas are only numbered.
    """

    ranks: Ranks
    rows: tuple[tuple[int, ...], ...]
    replica: int
    device: int
    peers: tuple[int, ...] | None = None

    @property
    def row(self) -> tuple[int, ...]:
        """The ranks of this one's pipeline, by device."""
        return self.rows[self.replica]

    def holders(self, schedule: Schedule, stage: int) -> list[int]:
        """The ranks that hold a stage, in any replica, in ascending order."""
        devices = holders(schedule, stage)
        return sorted(row[device] for row in self.rows for device in devices)

    @classmethod
    def of(
        cls,
        ranks: Ranks | Along | bool,
        data_parallel: Along | int = 1,
    ) -> Grid:
        """What a pipeline was given.

        Args:
            ranks: of one pipeline, by device; all ranks of all pipelines, one pipeline
                after the other, where `data_parallel` is a number.
            data_parallel: those that run the same device in each pipeline, or how
                many pipelines there are.

        Raises:
            ParameterError: torch.distributed is not initialised, this process is not
                among them, or they are no grid.
        """
        if isinstance(data_parallel, int):
            return _cut(Ranks.of(ranks), data_parallel)
        if isinstance(ranks, (Ranks, bool)):
            raise ParameterError(
                "data_parallel is a process group, so ranks must be one too: those of "
                "one pipeline, as mesh['pp'] beside mesh['dp']"
            )
        return _crossing(processes_of(ranks), processes_of(data_parallel))


def _cut(company: Ranks, replicas: int) -> Grid:
    """Every so many ranks are one pipeline."""
    if replicas < 1 or company.size % replicas:
        raise ParameterError(
            f"{company.size} ranks cannot be {replicas} pipelines of the same size"
        )
    size = company.size // replicas
    rows = tuple(tuple(range(r * size, r * size + size)) for r in range(replicas))
    return Grid(company, rows, *divmod(company.rank, size))


def _crossing(row: list[int], column: list[int]) -> Grid:
    """A pipeline and its devices' peers, by what the peers say are their pipelines."""
    me = dist.get_rank()
    if me not in row or me not in column:
        raise ParameterError(
            f"process {me} must be in its pipeline, {row}, and among its data-parallel "
            f"peers, {column}"
        )
    rows = tuple(map(tuple, _said(row, column)))
    device = row.index(me)
    everyone = sorted(process for of in rows for process in of)
    if (
        len(set(everyone)) != len(everyone)
        or any(len(of) != len(row) for of in rows)
        or [of[device] for of in rows] != column
    ):
        raise ParameterError(
            f"the pipelines of the data-parallel peers {column} are {list(rows)}: "
            "expected pipelines of the same size without a process in common, each "
            "peer at the same place in its own"
        )
    company = Ranks.among(everyone)
    number = {process: rank for rank, process in enumerate(everyone)}
    numbered = tuple(tuple(number[process] for process in of) for of in rows)
    return Grid(company, numbered, column.index(me), device, tuple(column))


def _said(row: list[int], column: list[int]) -> list[list[int]]:
    """The pipelines of all peers."""
    prefix = f"pipeproof/{','.join(map(str, column))}/pipelines"
    store = PrefixStore(prefix, _get_default_store())
    store.set(str(dist.get_rank()), json.dumps(row))
    store.wait(list(map(str, column)), timedelta(seconds=CONNECT_S))
    return [json.loads(store.get(str(process))) for process in column]
