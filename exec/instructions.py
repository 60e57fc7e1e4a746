"""The program's instructions, bound: one function for each.

`bind.py` says what an operation does, `moving.py` what moves values. Around these, a
backward adds to sums where others have a part in its stage's gradient; REDUCE and TIE
add these sums up, and a STEP waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from pipeproof.exec.bind import Binder
from pipeproof.exec.finite import looked_at
from pipeproof.exec.homes import holders
from pipeproof.exec.moving import Lend, Moving, Transport
from pipeproof.exec.replicas import Reduction, Run, Sums, add_up
from pipeproof.exec.sharded import Sharded
from pipeproof.exec.shared import Shared
from pipeproof.exec.ties import NO_SHARES, Shares
from pipeproof.exec.updating import in_common, update
from pipeproof.exec.workspace import Workspace
from pipeproof.sched import Action, BufferKind, Kind, Op, Schedule
from pipeproof.sched.instructions import Instruction, Message, MessageKind

Runs = list[tuple[int, Run]]
"""Instructions, and what each does."""


@dataclass(frozen=True)
class Surroundings:
    """What a process runs its stages in.

    Attributes:
        mine: the schedule's devices that this process runs; None for all.
        transport: between processes; None where all devices are in this one.
        reduction: REDUCE, where others that hold the stage are in other processes.
        lend: where OFFLOADs to another device's memory go, where that is not in
            this process.
        sharded: by stage, those that torch shards.
        shares: what the program's stages share.
        ties: TIE, where others that share are in other processes.
        check_finite: look behind each op whether what it made is finite.
        optimizers: by stage, what its STEP steps.
        of_loss: parameters that the loss has.
    """

    mine: Collection[int] | None = None
    transport: Transport | None = None
    reduction: Reduction | None = None
    lend: Lend | None = None
    sharded: Mapping[int, Sharded] = field(default_factory=dict)
    shares: Shares = NO_SHARES
    ties: Reduction | None = None
    check_finite: bool = False
    optimizers: Mapping[int, Optimizer] = field(default_factory=dict)
    of_loss: Sequence[nn.Parameter] = ()


class Instructions:
    """Binds those of one process.

    Args:
        space: where values lie.
        loss_fn: (output of the last stage, targets) → scalar.
        devices: the torch device of each of the schedule's.
        around: what it runs in.

    Attributes:
        here: their numbers, in the program's order.
    """

    def __init__(
        self,
        space: Workspace,
        loss_fn: Callable[[Any, Any], Any],
        devices: Sequence[torch.device],
        around: Surroundings,
    ) -> None:
        program, homes = space.program, space.homes
        self._program, self._space, self._around = program, space, around
        self._binder = Binder(space, loss_fn)
        self._moving = Moving(space, devices, around.transport, around.lend)
        schedule, reduction = program.schedule, around.reduction
        self._last_backward = _last_backwards(schedule, around.sharded)
        # Where several devices hold a stage, each sums its gradients for itself.
        elsewhere = frozenset[int]() if reduction is None else reduction.stages
        self._sums = {
            (stage, device): Sums(home)
            for (stage, device), home in homes.items()
            if len(holders(schedule, stage)) > 1 or stage in elsewhere
        }
        self._shared = Shared(program, homes, around.shares, around.ties, reduction)
        reductions = np.flatnonzero(program.action == Action.REDUCE).tolist()
        self._last_reduce = {program[i].ops[0].stage: i for i in reductions}
        mine = range(schedule.devices) if around.mine is None else around.mine
        steps = np.flatnonzero(program.op_kind == Kind.STEP)
        steps = steps[np.isin(program.device[steps], list(mine))].tolist()
        self._last_step = {program[i].ops[0].stage: i for i in steps}
        originals = {stage.original for stage in homes.values()}
        self._common = in_common(originals, around.optimizers)
        self.here = np.flatnonzero(np.isin(program.device, list(mine))).tolist()

    def begin(self) -> None:
        """Nothing is summed yet."""
        for sums in self._sums.values():
            sums.begin()
        self._shared.begin()

    def bound(self) -> Runs:
        """All of them."""
        return [(index, self._bind(self._program[index])) for index in self.here]

    def bound_forwards(self) -> tuple[Runs, list[Message]]:
        """The part of the program that leads to outputs, and what is posted in groups.

        Nobody waits for what else a group has, so what was sent in one is waited for
        at the end.
        """
        program = self._program
        runs: Runs = []
        awaited = []
        for index in self.here:
            instruction = program[index]
            message = instruction.message
            run: Run
            match instruction.action:
                case Action.COMPUTE:
                    forwards = [op for op in instruction.ops if op.kind == Kind.F]
                    bound = [
                        self._binder.bind_output(op, instruction) for op in forwards
                    ]
                    if not bound:
                        continue
                    run = self._moving.taking_outputs(index, partial(_in_turn, bound))
                case Action.SEND | Action.RECV:
                    assert message is not None
                    if message.kind != MessageKind.ACTIVATION:
                        continue
                    run = self._bind_action(instruction)
                    if instruction.action == Action.SEND and any(
                        program.action[other] == Action.RECV
                        for other in program.posted_with(index)
                    ):
                        awaited.append(message)
                case Action.LOCAL:
                    if instruction.reads[0].kind != BufferKind.OUTPUT:
                        continue
                    run = self._moving.hand_over(instruction)
                case _:
                    continue
            runs.append((index, run))
        return runs, [] if self._around.transport is None else awaited

    def _bind(self, instruction: Instruction) -> Run:
        return self._moving.taking(instruction.index, self._bind_action(instruction))

    def _bind_action(self, instruction: Instruction) -> Run:
        match instruction.action:
            case Action.COMPUTE:
                runs = [self._bind_op(op, instruction) for op in instruction.ops]
                if len(runs) == 1:
                    return runs[0]
                return lambda: _in_turn(runs)
            case Action.SEND:
                return self._moving.send(instruction)
            case Action.RECV:
                return self._moving.receive(instruction) or nothing
            case Action.LOCAL:
                return self._moving.hand_over(instruction)
            case Action.COPY:
                return self._moving.copy(instruction)
            case Action.REDUCE:
                return self._bind_reduce(instruction)
            case Action.TIE:
                return self._shared.bind(instruction) or nothing
        raise AssertionError(f"not bound: {instruction.label}")

    def _bind_op(self, op: Op, instruction: Instruction) -> Run:
        if op.kind == Kind.STEP:
            return self._bind_step(op, instruction)
        run = self._binder.bind(op, instruction)
        if self._around.check_finite:
            stage = self._space.homes[op.stage, instruction.stream.device]
            run = looked_at(run, op, instruction, stage, self._space)
        if self._last_backward.get(op.stage) == op:
            return self._around.sharded[op.stage].before_last(run)
        if op.kind not in (Kind.B, Kind.I, Kind.W):
            return run
        device = instruction.stream.device
        sums = self._sums.get((op.stage, device))
        if sums is not None:
            return sums.around(run)
        return self._shared.around(op.stage, run)

    def _bind_reduce(self, instruction: Instruction) -> Run:
        """The last REDUCE of a stage sums; one device alone has nothing to sum."""
        (op,) = instruction.ops
        held_by = holders(self._program.schedule, op.stage)
        reduction = self._around.reduction
        if reduction is not None and op.stage in reduction.stages:
            sums = self._sums[op.stage, instruction.stream.device]
            add = self._shared.onto(op.stage)
            return partial(reduction.begin, instruction.index, op.stage, sums, add)
        last = self._last_reduce[op.stage] == instruction.index
        if len(held_by) == 1 or not last:
            return nothing
        parts = [self._sums[op.stage, device] for device in held_by]
        return partial(add_up, parts, self._shared.onto(op.stage))

    def _bind_step(self, op: Op, instruction: Instruction) -> Run:
        """The last STEP of a stage in this process, whose module the user has once."""
        optimizer = self._around.optimizers.get(op.stage)
        if optimizer is None or self._last_step[op.stage] != instruction.index:
            return nothing
        finish, common = partial(self._finish, op.stage), self._common[op.stage]
        return update(optimizer, self._space, finish, common)

    def _finish(self, stage: int) -> None:
        """Return once `.grad` has what others add to a stage's gradient."""
        if (reduction := self._around.reduction) is not None:
            reduction.complete(stage)
        self._shared.complete(stage)


def _last_backwards(schedule: Schedule, stages: Iterable[int]) -> dict[int, Op]:
    """The last B of each of these stages, which one device holds."""
    rows = [schedule.row(schedule.placement.pipes[0][stage]) for stage in stages]
    return {
        stage: [op for op in row if op.kind == Kind.B and op.stage == stage][-1]
        for stage, row in zip(stages, rows)
    }


def nothing() -> None:
    """Where an instruction has nothing left to do."""


def _in_turn(runs: Sequence[Run]) -> None:
    for run in runs:
        run()
