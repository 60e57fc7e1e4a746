"""What connects the ranks of a grid, made before the first step in one order.

messages     a communicator for each ordered pair of devices in a pipeline
lending      two for each device that keeps activations in another's memory
reductions   one for all ranks that hold a stage, in all pipelines
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from pipeproof.exec.grid import Grid
from pipeproof.exec.lending import LENDING, Borrower, Lender
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.transport import Across
from pipeproof.exec.wires import Incoming, Outgoing
from pipeproof.sched import Kind, Program, Schedule
from pipeproof.sched.instructions import StreamKind


class Links:
    """One rank's ends of them.

    Args:
        grid: of all ranks.
        program: of one pipeline.
        device: where this rank's tensors lie.
        apart: stages that sum their gradients by themselves.

    Attributes:
        messages: to and from the devices of this rank's pipeline.
        reducer: of the gradients.
        borrower: to another device's memory; None where this one offloads to none.
        lenders: of this one's memory.
    """

    def __init__(
        self,
        grid: Grid,
        program: Program,
        device: torch.device,
        apart: Collection[int] = (),
    ) -> None:
        self._grid, self._device = grid, device
        self.messages = self._connect(program)
        self.borrower: Borrower | None = None
        self.lenders: list[Lender] = []
        self._lend(program.schedule)
        self.reducer = self._reduce(program.schedule, apart)

    def _to(self, target: int, of: str = "") -> Outgoing:
        """To a device of this rank's pipeline."""
        return self._grid.ranks.outgoing(self._grid.row[target], self._device, of)

    def _from(self, source: int, of: str = "") -> Incoming:
        return self._grid.ranks.incoming(self._grid.row[source], self._device, of)

    def _connect(self, program: Program) -> Across:
        me, row, ranks = self._grid.device, self._grid.row, self._grid.ranks
        out: dict[int, Outgoing] = {}
        into: dict[int, Incoming] = {}
        for stream in program.streams:
            if stream.kind != StreamKind.SEND or stream.link is None:
                continue
            source, target = stream.link
            if source == me:
                out[target] = self._to(target)
            elif target == me:
                into[source] = self._from(source)
        headers = {
            device: ranks.headers[rank]
            for device, rank in enumerate(row)
            if rank != ranks.rank
        }
        return Across(program, out, into, headers, self._device, ranks.wait)

    def _lend(self, schedule: Schedule) -> None:
        me, row, ranks = self._grid.device, self._grid.row, self._grid.ranks
        for full, target in enumerate(schedule.offload_to):
            kinds = [op.kind for op in schedule.row(full)]
            orders = kinds.count(Kind.OFFLOAD) + kinds.count(Kind.RELOAD)
            if target is None or not orders or me not in (full, target):
                continue
            if me == full:
                there, back = self._to(target, LENDING), self._from(target, LENDING)
                texts = ranks.loans[row[target]]
                self.borrower = Borrower(there, back, texts, self._device, ranks.wait)
            else:
                come, given = self._from(full, LENDING), self._to(full, LENDING)
                wait, texts = ranks.wait_beside, ranks.loans[row[full]]
                lender = Lender(come, given, texts, orders, self._device, wait)
                self.lenders.append(lender)

    def _reduce(self, schedule: Schedule, apart: Collection[int]) -> Reducer:
        grid, groups = self._grid, {}
        for stage in range(schedule.stages):
            members = grid.holders(schedule, stage)
            if grid.ranks.rank in members and len(members) > 1 and stage not in apart:
                groups[stage] = grid.ranks.collective(members, self._device)
        return Reducer(groups, self._device, grid.ranks)
