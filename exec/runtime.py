"""The program, bound to tensors: one function for each instruction.

Binding happens once. A step is a walk over the functions in the program's
order, which waits for nothing: that order has every instruction after all it
needs. `bind.py` says what an operation does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim import Optimizer

from pipeproof.exec import tensors
from pipeproof.exec.bind import Binder
from pipeproof.exec.clock import Clock
from pipeproof.exec.errors import BatchError, RankError, StepError
from pipeproof.exec.finite import check_before, looked_at
from pipeproof.exec.homes import holders
from pipeproof.exec.replicas import Reduction, Run, Sums, add_up
from pipeproof.exec.sharded import Sharded
from pipeproof.exec.shared import Shared
from pipeproof.exec.stash import Copies, Place
from pipeproof.exec.step import Step
from pipeproof.exec.ties import NO_SHARES, Shares
from pipeproof.exec.updating import HALF_UPDATED, in_common, update
from pipeproof.exec.workspace import Homes, Workspace
from pipeproof.sched import Action, BufferKind, Kind, Op, Program, Schedule
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.instructions import Instruction, Message, MessageKind
from pipeproof.sched.ir import STAGE_KINDS

HALF_DONE = (
    "\nGradients of some micro-batches are in .grad and others are not: zero them "
    "before the next step."
)


class Transport(Protocol):
    """Takes what a device hands to one in another process."""

    def send(self, message: Message, value: Any) -> None:
        """Take a value, or a value's gradients."""

    def post(self, message: Message) -> None:
        """Get ready to receive: its slot is free."""

    def take(self, message: Message) -> Any:
        """The same on the target's device, as leaves where they want gradients."""

    def finish(self, message: Message) -> None:
        """Return once a message that was sent is through."""

    def forget(self) -> None:
        """Let go of everything of a step."""


Lend = Callable[[str], Place]
"""Gives a place in another process's memory for what the text says."""


class Runtime:
    """Runs the steps of a program.

    Args:
        program: lowered.
        homes: by stage and device of the schedule, the stages; all that the
            devices in `mine` hold.
        loss_fn: (output of the last stage, targets) → scalar.
        devices: the torch device of each of the schedule's.
        mine: the schedule's devices that this process runs; default all.
        transport: between processes; None where all devices are in this one, and a
            send puts the tensor where the receive wants it.
        reduction: REDUCE, where others that hold the stage are in other processes.
        sharded: by stage, those that torch shards.
        lend: where OFFLOADs to another device's memory go, where that is not in
            this process.
        shares: what the program's stages share.
        ties: TIE, where others that share are in other processes.
        check_finite: look behind each op whether what it made is finite.
        optimizers: by stage, what its STEP steps.

    Attributes:
        here: the instructions that this process runs.
        stages: that run here.
        parameters: of these, each once; the user's own.
        takes_keywords: names of keyword inputs that any unit here takes.
        clock: of the last timed step.
        ran_s: seconds that the last one took which was not timed.
    """

    def __init__(
        self,
        program: Program,
        homes: Homes,
        loss_fn: Callable[[Any, Any], Any],
        devices: Sequence[torch.device],
        *,
        mine: Collection[int] | None = None,
        transport: Transport | None = None,
        reduction: Reduction | None = None,
        lend: Lend | None = None,
        sharded: Mapping[int, Sharded] | None = None,
        shares: Shares = NO_SHARES,
        ties: Reduction | None = None,
        check_finite: bool = False,
        optimizers: Mapping[int, Optimizer] | None = None,
    ) -> None:
        self._optimizers = optimizers or {}
        self._program = program
        self._devices = devices
        self.stages = list({id(stage): stage for stage in homes.values()}.values())
        self.parameters = list(
            {id(p): p for s in self.stages for p in s.original.parameters}.values()
        )
        self.takes_keywords = frozenset[str]().union(
            *(stage.takes_keywords for stage in self.stages)
        )
        self._kinds = sorted({stage.device.type for stage in self.stages})
        self._transport = transport
        self._reduction, self._lend = reduction, lend
        self._sharded = sharded or {}
        self._check_finite = check_finite
        self._last_backward = _last_backwards(program.schedule, self._sharded)
        self.clock: Clock
        self.ran_s = 0.0
        schedule = program.schedule
        # Where several devices hold a stage, each sums its gradients for itself.
        elsewhere = frozenset[int]() if reduction is None else reduction.stages
        self._sums = {
            (stage, device): Sums(home)
            for (stage, device), home in homes.items()
            if len(holders(schedule, stage)) > 1 or stage in elsewhere
        }
        self._shared = Shared(program, homes, shares, ties, reduction)
        self._space = Workspace(program, homes)
        self._binder = Binder(self._space, loss_fn)
        self._reader = {} if transport is None else readers(program)
        reductions = np.flatnonzero(program.action == Action.REDUCE).tolist()
        self._last_reduce = {program[i].ops[0].stage: i for i in reductions}
        mine = range(schedule.devices) if mine is None else mine
        steps = np.flatnonzero(program.op_kind == Kind.STEP)
        steps = steps[np.isin(program.device[steps], list(mine))].tolist()
        self._last_step = {program[i].ops[0].stage: i for i in steps}
        originals = {stage.original for stage in self.stages}
        self._common = in_common(originals, self._optimizers)
        self.here = np.flatnonzero(np.isin(program.device, list(mine))).tolist()
        self._runs: list[tuple[int, Run]] = [
            (index, self._bind(program[index])) for index in self.here
        ]
        self._busy = [(i, run) for i, run in self._runs if run is not _nothing]
        self._forwards: tuple[list[tuple[int, Run]], list[Message]] | None = None

    def run(self, step: Step) -> None:
        """All instructions, in the program's order.

        Raises:
            StepError: something in the model or the loss failed; the cause is
                chained.
        """
        index, began = -1, perf_counter()
        self._begin(step)
        try:
            self._shared.begin()
            for index, run in self._busy:  # noqa: B007
                run()
            self._complete()
            self.ran_s = perf_counter() - began
        except (RankError, BatchError):  # say where by themselves
            raise
        except Exception as error:
            raise self._broken(index, error) from error
        finally:
            self._end()

    def run_timed(self, step: Step) -> tuple[list[float], list[float]]:
        """As `run`; when each instruction started and ended, in seconds."""
        index = -1
        clock = self.clock = Clock([stage.device for stage in self.stages])
        device_of = [self._device(i) for i in range(len(self._program))]
        self._begin(step)
        try:
            self._shared.begin()
            for index, run in self._runs:
                clock.mark(device_of[index])
                run()
                clock.mark(device_of[index])
            self._complete()
        except (RankError, BatchError):  # say where by themselves
            raise
        except Exception as error:
            raise self._broken(index, error) from error
        finally:
            self._end()
        return clock.read()

    def _begin(self, step: Step) -> None:
        if self._check_finite and torch.is_grad_enabled():
            check_before(self.stages)
        self._space.step = step
        self._space.autocast = any(map(torch.is_autocast_enabled, self._kinds))
        for stage in self.stages:
            stage.begin()
        for sharded in self._sharded.values():
            sharded.begin()

    def _complete(self) -> None:
        for stage in self.stages:
            stage.complete()

    def forward(self, step: Step) -> None:
        """The forwards alone, without gradients; outputs go into the step.

        Raises:
            StepError: as `run`.
        """
        if self._forwards is None:
            self._forwards = self._bind_forwards()
        forwards, awaited = self._forwards
        index = -1
        self._begin(step)
        try:
            with torch.no_grad():
                for index, run in forwards:  # noqa: B007
                    run()
                for message in awaited:
                    assert self._transport is not None
                    self._transport.finish(message)
        except (RankError, BatchError):  # say where by themselves
            raise
        except Exception as error:
            raise self._broken(index, error, "") from error
        finally:
            self._end()

    def _bind_forwards(self) -> tuple[list[tuple[int, Run]], list[Message]]:
        """The part of the program that leads to outputs, and what is posted in groups.

        Nobody waits for what else a group has, so what was sent in one is waited for
        at the end.
        """
        program = self._program
        runs: list[tuple[int, Run]] = []
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
                    run = partial(_in_turn, bound)
                    if not bound:
                        continue
                    if self._transport is not None and index in self._reader:
                        run = self._taking_outputs(self._reader[index], run)
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
                    run = self._bind_handing_over(instruction)
                case _:
                    continue
            runs.append((index, run))
        return runs, awaited if self._transport is not None else []

    def _taking_outputs(self, arriving: list[int], run: Run) -> Run:
        transport, values = self._transport, self._space.values
        assert transport is not None
        messages = map(self._program.message_at, arriving)
        pairs = [
            (message, self._program.writes[message.recv][0])
            for message in messages
            if message.kind == MessageKind.ACTIVATION
        ]

        def taking() -> None:
            for message, write in pairs:
                values[write] = transport.take(message)
            run()

        return taking

    def _end(self) -> None:
        """Let go of every tensor of the step, whether or not it came to its end."""
        self._space.forget()
        if self._transport is not None:
            self._transport.forget()
        for sums in self._sums.values():
            sums.begin()
        self._shared.begin()

    def _device(self, index: int) -> torch.device:
        return self._devices[int(self._program.device[index])]

    def _broken(self, index: int, error: Exception, then: str = HALF_DONE) -> Exception:
        instruction = self._program[index]
        if instruction.ops:
            op = instruction.ops[0]
            where = f"{op} (stage {op.stage}"
            if op.kind not in STAGE_KINDS:
                where += f", micro-batch {op.micro_batch}"
        else:
            where = f"{instruction.label} ("
        if then and self._program.schedule.has(Kind.STEP):
            then = HALF_UPDATED
        where += f"{', ' if instruction.ops else ''}device {self._device(index)})"
        text = f"the step broke off at {where}: {type(error).__name__}: {error}{then}"
        return (
            type(error)(text) if isinstance(error, PipeproofError) else StepError(text)
        )

    def _bind(self, instruction: Instruction) -> Run:
        run = self._bind_action(instruction)
        if self._transport is None or instruction.index not in self._reader:
            return run
        return self._taking(self._transport, self._reader[instruction.index], run)

    def _taking(self, transport: Transport, arriving: list[int], run: Run) -> Run:
        """With what its first reader waits for: the messages that arrive.

        And those sent in one group with them, once these are there: both sides of
        an exchange take first, so neither waits for a receive that comes later.
        """
        program = self._program
        values, take, finish = self._space.values, transport.take, transport.finish
        recvs = program.recv_of[arriving].tolist()
        pairs = [
            (program.message_at(message), program.writes[recv][0])
            for message, recv in zip(arriving, recvs)
        ]
        sent = [
            program.message_at(int(program.message[other]))
            for recv in recvs
            for other in program.posted_with(recv)
            if program.action[other] == Action.SEND
        ]

        def taking() -> None:
            for message, write in pairs:
                values[write] = take(message)
            for message in sent:
                finish(message)
            run()

        return taking

    def _bind_action(self, instruction: Instruction) -> Run:
        match instruction.action:
            case Action.COMPUTE:
                runs = [self._bind_op(op, instruction) for op in instruction.ops]
                if len(runs) == 1:
                    return runs[0]
                return lambda: _in_turn(runs)
            case Action.SEND:
                return self._bind_send(instruction)
            case Action.RECV:
                if self._transport is None:
                    return _nothing
                assert instruction.message is not None
                return partial(self._transport.post, instruction.message)
            case Action.LOCAL:
                return self._bind_handing_over(instruction)
            case Action.COPY:
                return self._bind_copy(instruction)
            case Action.REDUCE:
                return self._bind_reduce(instruction)
            case Action.TIE:
                return self._shared.bind(instruction) or _nothing
        raise AssertionError(f"not bound: {instruction.label}")

    def _bind_op(self, op: Op, instruction: Instruction) -> Run:
        if op.kind == Kind.STEP:
            return self._bind_step(op, instruction)
        run = self._binder.bind(op, instruction)
        if self._check_finite:
            stage = self._space.homes[op.stage, instruction.stream.device]
            run = looked_at(run, op, instruction, stage, self._space)
        if self._last_backward.get(op.stage) == op:
            return self._sharded[op.stage].before_last(run)
        if op.kind not in (Kind.B, Kind.I, Kind.W):
            return run
        device = instruction.stream.device
        sums = self._sums.get((op.stage, device))
        if sums is not None:
            return sums.around(run)
        return self._shared.around(op.stage, run)

    def _bind_send(self, instruction: Instruction) -> Run:
        values, message = self._space.values, instruction.message
        assert message is not None
        read = instruction.reads[0].index
        if self._transport is None:
            return self._bind_putting(message, read)
        send = self._transport.send

        def hand_to_link() -> None:
            send(message, values[read])
            values[read] = None

        return hand_to_link

    def _bind_putting(self, message: Message, read: int) -> Run:
        """To another device of this process."""
        values, write = self._space.values, self._program.writes[message.recv][0]
        target = self._devices[message.target]
        if self._devices[message.source] == target:

            def put() -> None:
                values[write], values[read] = values[read], None

            return put

        def copy_over() -> None:
            values[write], values[read] = tensors.moved(values[read], target), None

        return copy_over

    def _bind_handing_over(self, instruction: Instruction) -> Run:
        """What is in the buffers that it reads, in turn, to those that it writes."""
        values = self._space.values
        pairs = [
            (read.index, write.index)
            for read, write in zip(instruction.reads, instruction.writes, strict=True)
        ]

        def hand_over() -> None:
            for read, write in pairs:
                values[write], values[read] = values[read], None

        return hand_over

    def _bind_copy(self, instruction: Instruction) -> Run:
        """OFFLOAD and RELOAD of all that a forward stored, and of its leaves."""
        (op,), device = instruction.ops, instruction.stream.device
        of, stashes = (op.stage, op.micro_batch, op.slice), self._space.stashes
        hand_over = self._bind_handing_over(instruction)
        target = self._program.schedule.offload_to[device]
        place: Callable[[], Place]
        if target is not None and self._lend is not None:
            place = partial(self._lend, instruction.label)
        else:
            away = torch.device("cpu") if target is None else self._devices[target]
            place = partial(Copies, self._devices[device], away)

        def offload() -> None:
            stashes[of].offload(place(), self._space.leaves(op, instruction))
            hand_over()

        def reload() -> None:
            stashes.pop(of).reload()
            hand_over()

        return offload if op.kind == Kind.OFFLOAD else reload

    def _bind_reduce(self, instruction: Instruction) -> Run:
        """The last REDUCE of a stage sums; one device alone has nothing to sum."""
        (op,) = instruction.ops
        held_by = holders(self._program.schedule, op.stage)
        reduction = self._reduction
        if reduction is not None and op.stage in reduction.stages:
            sums = self._sums[op.stage, instruction.stream.device]
            add = self._shared.onto(op.stage)
            return partial(reduction.begin, instruction.index, op.stage, sums, add)
        last = self._last_reduce[op.stage] == instruction.index
        if len(held_by) == 1 or not last:
            return _nothing
        parts = [self._sums[op.stage, device] for device in held_by]
        return partial(add_up, parts, self._shared.onto(op.stage))

    def _bind_step(self, op: Op, instruction: Instruction) -> Run:
        """The last STEP of a stage in this process, whose module the user has once."""
        optimizer = self._optimizers.get(op.stage)
        if optimizer is None or self._last_step[op.stage] != instruction.index:
            return _nothing
        finish, common = partial(self._finish, op.stage), self._common[op.stage]
        return update(optimizer, self._space, finish, common)

    def _finish(self, stage: int) -> None:
        """Return once `.grad` has what others add to a stage's gradient."""
        if self._reduction is not None:
            self._reduction.complete(stage)
        self._shared.complete(stage)


def _last_backwards(schedule: Schedule, stages: Iterable[int]) -> dict[int, Op]:
    """The last B of each of these stages, which one device holds."""
    rows = [schedule.row(schedule.placement.pipes[0][stage]) for stage in stages]
    return {
        stage: [op for op in row if op.kind == Kind.B and op.stage == stage][-1]
        for stage, row in zip(stages, rows)
    }


def _nothing() -> None:
    """Where an instruction has nothing left to do."""


def readers(program: Program) -> dict[int, list[int]]:
    """Of each instruction, the messages of which it is the first reader."""
    written = {
        program.writes[recv][0]: i for i, recv in enumerate(program.recv_of.tolist())
    }
    result: dict[int, list[int]] = {}
    for index, reads in enumerate(program.reads.to_lists()):
        for buffer in reads:
            message = written.pop(buffer, None)
            if message is not None:
                result.setdefault(index, []).append(message)
    return result


def _in_turn(runs: Sequence[Run]) -> None:
    for run in runs:
        run()
