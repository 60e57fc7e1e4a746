"""A lowered program's messages and buffers, worked out when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeproof.sched.buffers import Blocks
from pipeproof.sched.deps import Index
from pipeproof.sched.hops import Hops
from pipeproof.sched.instructions import MessageKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.layout import Layout
from pipeproof.sched.lists import Column, Lists
from pipeproof.sched.lists import table as new_table
from pipeproof.sched.touches import Touched

_F = int(Kind.F)
_ACTIVATION, _GRADIENT = int(MessageKind.ACTIVATION), int(MessageKind.GRADIENT)


@dataclass(frozen=True)
class LoweredStorage:
    """The `Storage` of a lowered schedule.

    Attributes:
        schedule: what was lowered.
        hops: its tensors under way.
        layout: its instructions.
        took: for each hop the one whose slot it takes over, or -1.
    """

    schedule: Schedule
    hops: Hops
    layout: Layout
    took: Index
    by_op: ClassVar[bool] = True

    @property
    def message_count(self) -> int:
        """As in `Storage`."""
        return self.hops.messages

    @cached_property
    def messages(self) -> Column:
        """As in `Storage`."""
        return _messages(self.schedule, self.hops, self.layout)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks.of(self.schedule, self.schedule.table, self.hops, self.took)

    @property
    def buffers(self) -> Column:
        """As in `Storage`."""
        return self._blocks.rows

    @property
    def buffer_skips(self) -> Column:
        """As in `Storage`."""
        return self._blocks.skips

    @cached_property
    def _touched(self) -> Touched:
        return Touched.of(
            self.schedule, self.schedule.table, self.hops, self.layout, self._blocks
        )

    @property
    def reads(self) -> Lists:
        """As in `Storage`."""
        return self._touched.reads

    @property
    def writes(self) -> Lists:
        """As in `Storage`."""
        return self._touched.writes

    @property
    def frees(self) -> Lists:
        """As in `Storage`."""
        return self._touched.frees


def _messages(schedule: Schedule, hops: Hops, layout: Layout) -> Column:
    """The messages, in columns as in `Program`."""
    ops = schedule.ops
    rows = new_table(hops.messages, 10)
    columns = [
        hops.source,
        hops.target,
        hops.message,
        layout.out,
        layout.into,
        ops.kind,
        ops.stage,
        ops.micro_batch,
        ops.slice,
        schedule.device_of_op,
        *rows.T,
    ]
    filled = run(_describe, columns, results=[*range(10, 20)], size=len(hops.source))
    for column, values in zip(rows.T, filled):
        column[:] = values
    return rows


def _describe(
    source: Any,
    target: Any,
    message: Any,
    out: Any,
    into: Any,
    op_kind: Any,
    stage: Any,
    micro_batch: Any,
    part: Any,
    device: Any,
    kind: Any,
    source_stage: Any,
    target_stage: Any,
    port: Any,
    its_micro_batch: Any,
    its_slice: Any,
    source_device: Any,
    target_device: Any,
    send: Any,
    recv: Any,
) -> None:
    for hop in range(len(source)):
        row = message[hop]
        if row < 0:
            continue
        before, after = source[hop], target[hop]
        kind[row] = _ACTIVATION if op_kind[before] == _F else _GRADIENT
        source_stage[row] = stage[before]
        target_stage[row] = stage[after]
        port[row] = 0  # all that one stage hands to another is one message
        its_micro_batch[row] = micro_batch[before]
        its_slice[row] = part[before]
        source_device[row] = device[before]
        target_device[row] = device[after]
        send[row] = out[hop]
        recv[row] = into[hop]
