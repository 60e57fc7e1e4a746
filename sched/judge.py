"""What every rule of `check` reads, and how it says what it found."""

from __future__ import annotations

from dataclasses import dataclass

from pipeproof.sched.deps import OpTable
from pipeproof.sched.findings import Finding
from pipeproof.sched.ir import Op, Schedule


@dataclass(frozen=True)
class Judge:
    """A schedule whose numbers are in range, and its tables."""

    schedule: Schedule
    table: OpTable

    def name(self, index: int) -> str:
        """An op, as its device's row calls it."""
        op = self.schedule.ops[index]
        device = int(self.schedule.device_of_op[index])
        return op.short if self.schedule.only_stage[device] == op.stage else str(op)

    def at(
        self, rule: str, index: int, *, expected: str, found: str, remedy: str
    ) -> Finding:
        """A finding about an op."""
        device, step = self.schedule.locate(index)
        op = self.schedule.ops[index]
        return Finding(rule, device, step, op, expected, found, remedy)

    def home(self, op: Op) -> int:
        """Where the placement has an op of a micro-batch."""
        pipe = int(self.schedule.pipe_of[op.micro_batch])
        return self.schedule.placement.pipes[pipe][op.stage]
