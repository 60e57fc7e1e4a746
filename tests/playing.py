"""A slow second opinion on what a program computes, without `prove`'s code.

A program is played event by event, in a random order of all that streams, waits and
messages allow, on hashes of what was computed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from terms import into, of_loss, out_of, reference, term

from pipeproof.sched import Action, BufferKind, Kind, Op, Program
from pipeproof.sched.instructions import Buffer, Instruction, StreamKind
from pipeproof.sched.ir import Skip, Tie

ROLES = {
    "input": (BufferKind.INPUT, BufferKind.STORED_INPUT),
    "act": (BufferKind.ACTIVATION,),
    "stash": (BufferKind.WEIGHT_STASH,),
    "out": (BufferKind.OUTPUT,),
    "g": (BufferKind.OUTPUT_GRAD,),
    "dx": (BufferKind.INPUT_GRAD,),
    "grad": (BufferKind.GRADIENT,),
}

ADDED_TO = (BufferKind.GRADIENT, BufferKind.WEIGHT_STASH, BufferKind.TIED)
"""What an op changes where it lies, when it ends."""

Content = str | tuple[object, ...] | None
"""A term; of an accumulator, a tuple of terms; None for nothing there."""


@lru_cache(maxsize=8)
def instructions_of(program: Program) -> list[Instruction]:
    """All, spelled out once for many runs."""
    return list(program)


def slots_of(program: Program) -> list[int]:
    """For each buffer the first one of its slot.

    Raises:
        ValueError: there is none, as buffers take over from each other in a ring.
    """
    before = program.buffers[:, 5].tolist()
    result = []
    for buffer in range(len(before)):
        root, steps = buffer, 0
        while before[root] >= 0:
            root, steps = before[root], steps + 1
            if steps > len(before):
                raise ValueError(f"{program.buffer_at(buffer)} is in a ring of slots")
        result.append(root)
    return result


class Play:
    """One run in one random order; `contents` is what is left.

    `spoiled`: a buffer was touched while a send read it or another wrote it.
    `updates`: by stage and device, the gradient that each STEP read, and the sums of
    its ties, by their number.
    """

    def __init__(self, program: Program, dice: random.Random) -> None:
        self.program, self.dice = program, dice
        self.rendezvous = dice.random() < 0.5
        self.instructions = instructions_of(program)
        self.slot = slots_of(program)
        self.holder: dict[int, int] = {}
        self.contents: dict[int, Content] = {}
        self.carried: dict[tuple[object, ...], str] = {}
        self.updates: dict[
            tuple[int, int], list[tuple[Content, dict[int, Content]]]
        ] = {}
        self.spoiled = False
        self.started: set[int] = set()
        self.done: set[int] = set()
        self.operands: dict[int, list[Content]] = {}
        self.link_of: dict[int, tuple[tuple[int, int] | None, int]] = {}
        self.sent: dict[tuple[int, int] | None, list[int]] = defaultdict(list)
        self.received: dict[tuple[int, int] | None, list[int]] = defaultdict(list)
        self.losses: dict[str, str] = {}
        self.meets: dict[tuple[object, int], list[int]] = defaultdict(list)
        self.before: dict[int, int] = {}
        last: dict[int, int] = {}
        times: dict[tuple[object, int], int] = defaultdict(int)
        for i, instruction in enumerate(self.instructions):
            number = int(program.stream[i])
            if number in last:
                self.before[i] = last[number]
            last[number] = i
            stream = instruction.stream
            if stream.kind in (StreamKind.SEND, StreamKind.RECV):
                sends = stream.kind == StreamKind.SEND
                row = (self.sent if sends else self.received)[stream.link]
                self.link_of[i] = stream.link, len(row)
                row.append(i)
            if instruction.action in (Action.REDUCE, Action.TIE):
                of, stages = self.sum_of(i)
                key = of, stream.device
                if instruction.action == Action.TIE and self.has_all(stages):
                    of = of, stream.device  # needs nobody
                self.meets[of, times[key]].append(i)
                times[key] += 1
        self.needs = [self.needs_of(i) for i in range(len(self.instructions))]

    def run(self) -> bool:
        """Whether all instructions came to their end."""
        while len(self.done) < len(self.instructions):
            every = range(len(self.instructions))
            events = [(self.start, i) for i in every if self.may_start(i)]
            events += [
                (self.end, i) for i in self.started - self.done if self.may_end(i)
            ]
            if not events:
                return False
            event, i = self.dice.choice(events)
            event(i)
        return True

    def may_start(self, i: int) -> bool:
        return i not in self.started and self.needs[i] <= self.done

    def needs_of(self, i: int) -> set[int]:
        """What must be done before an instruction, or its group, starts."""
        group = self.group(i)
        needs: set[int] = set()
        for member in group:
            needs.update(self.instructions[member].waits_for)
            before = self.before.get(member)
            while before in group and before is not None:
                before = self.before.get(before)
            if before is not None:
                needs.add(before)
        return {other for need in needs for other in self.group(need)}

    def group(self, i: int) -> set[int]:
        """Those that start as one with an instruction."""
        return {i, *self.instructions[i].posted_with}

    def other(self, i: int) -> int | None:
        """The other side of a message, by its place on the link."""
        link, place = self.link_of[i]
        sends = self.instructions[i].action == Action.SEND
        row = (self.received if sends else self.sent)[link]
        return row[place] if place < len(row) else None

    def sum_of(self, i: int) -> tuple[object, tuple[int, ...]]:
        """What a REDUCE or a TIE sums, and the stages."""
        it = self.instructions[i]
        if it.action == Action.REDUCE:
            return it.ops[0].stage, (it.ops[0].stage,)
        (tie,) = [buffer.tie for buffer in it.writes]
        assert tie is not None
        return tie, tie

    def meeting(self, i: int) -> list[int]:
        """The REDUCEs or TIEs that meet an instruction, by device."""
        (group,) = [group for group in self.meets.values() if i in group]
        return sorted(group, key=lambda j: self.instructions[j].stream.device)

    def may_end(self, i: int) -> bool:
        match self.instructions[i].action:
            case Action.RECV:
                return self.other(i) in self.started
            case Action.SEND:
                return not self.rendezvous or self.other(i) in self.started
            case Action.REDUCE | Action.TIE:
                group, (_, stages) = self.meeting(i), self.sum_of(i)
                pipes = self.program.schedule.placement.pipes
                homes = {pipe[stage] for pipe in pipes for stage in stages}
                there = {self.instructions[j].stream.device for j in group}
                alone = self.instructions[i].action == Action.TIE
                alone = alone and self.has_all(stages)
                return (alone or homes == there) and self.started.issuperset(group)
        return True

    def has_all(self, stages: tuple[int, ...]) -> bool:
        """Whether each device that holds one of the stages holds all of them."""
        pipes = self.program.schedule.placement.pipes
        homes = [{pipe[stage] for pipe in pipes} for stage in stages]
        return all(home == homes[0] for home in homes)

    def read(self, buffer: int) -> Content:
        slot = self.slot[buffer]
        if self.holder.get(slot) != buffer:
            return term("not there", buffer, self.holder.get(slot))
        return self.contents[slot]

    def write(self, buffer: int, content: Content) -> None:
        self.holder[self.slot[buffer]] = buffer
        self.contents[self.slot[buffer]] = content

    def start(self, i: int) -> None:
        """Read; what is written anew holds something half done from now on."""
        self.started.add(i)
        it = self.instructions[i]
        self.operands[i] = [self.read(b.index) for b in it.reads]
        if it.action in (Action.RECV, Action.LOCAL, Action.COPY, Action.COMPUTE):
            for buffer in it.writes:
                if buffer.kind not in ADDED_TO:
                    self.write(buffer.index, term("half", i))

    def end(self, i: int) -> None:
        """Read again: what has changed meanwhile is worth nothing. Write, free."""
        self.done.add(i)
        it = self.instructions[i]
        first = self.operands[i]
        again = [self.read(b.index) for b in it.reads]
        if it.action != Action.REDUCE and first != again:
            self.operands[i] = [term("torn", i, n) for n in range(len(again))]
            # What a send reads is the link's until the send ends.
            self.spoiled |= it.action == Action.SEND
        for buffer in it.writes:  # nobody else has been there since it started
            if buffer.kind not in ADDED_TO:
                self.spoiled |= self.read(buffer.index) != term("half", i)
        values = self.operands[i]
        match it.action:
            case Action.COMPUTE:
                for op in it.ops:
                    self.compute(i, op)
            case Action.RECV:
                other = self.other(i)
                assert other is not None
                values = self.operands[other]
            case Action.REDUCE:
                values = [("sum", *map(self.accumulator, self.meeting(i)))]
            case Action.TIE:  # each adds the sum to what its device has
                total = tuple(tuple(self.operands[j]) for j in self.meeting(i))
                old = self.contents.get(self.slot[it.writes[0].index])
                values = [(*(old if isinstance(old, tuple) else ()), total)]
        if it.action != Action.COMPUTE:
            for number, buffer in enumerate(it.writes):
                gone = term("missing", i, number)
                self.write(
                    buffer.index, values[number] if number < len(values) else gone
                )
        for buffer in it.frees:
            self.holder[self.slot[buffer.index]] = -1

    def accumulator(self, i: int) -> Content:
        """What a REDUCE finds: nothing, where no micro-batch has passed."""
        for buffer, value in zip(self.instructions[i].reads, self.operands[i]):
            if buffer.kind == BufferKind.GRADIENT:
                return value if isinstance(value, tuple) else ()
        return term("missing", i)

    def compute(self, i: int, op: Op) -> None:
        it = self.instructions[i]
        device, (kind, s, m, q) = it.stream.device, op
        place = {b.index: n for n, b in enumerate(it.reads)}

        def find(
            buffers: Iterable[Buffer], role: str, skip: Skip | None = None
        ) -> int | None:
            for b in buffers:
                owner = (s, -1, 0) if role == "grad" else (s, m, q)
                mine = (b.stage, b.micro_batch, b.slice) == owner
                if b.kind not in ROLES[role] or b.skip != skip:
                    continue
                if mine or len(it.ops) == 1:
                    return b.index
            return None

        def get(role: str, skip: Skip | None = None) -> Content:
            buffer = find(it.reads, role, skip)
            return (
                term("missing", i, role)
                if buffer is None
                else (self.operands[i][place[buffer]])
            )

        def put(role: str, content: Content, skip: Skip | None = None) -> None:
            buffer = find(it.writes, role, skip)
            if buffer is not None:
                self.write(buffer, content)

        def add(gradient: str) -> None:
            buffer = find(it.writes, "grad")
            if buffer is not None:
                old = self.contents.get(self.slot[buffer], ())
                put("grad", (*(old if isinstance(old, tuple) else (old,)), gradient))

        if kind == Kind.STEP:
            sums = {
                b.stage: self.operands[i][place[b.index]]
                for b in it.reads
                if b.kind == BufferKind.TIED
            }
            self.updates.setdefault((s, device), []).append((get("grad"), sums))
        elif kind in (Kind.F, Kind.R):
            brought = find(it.writes, "input") is not None
            x = term("batch", m, q) if brought else get("input")
            put("input", x)
            kv = self.carried.get(("kv", device, s, m, q - 1))
            over = [get("input", k) for k in into(self.program.schedule, s)]
            act = term("act", s, m, q, x, kv, over)
            self.carried["kv", device, s, m, q] = act
            self.losses[act] = of_loss(m, q, act)
            put("act", act)
            put("stash", act)
            put("out", term("out", act))
            for k in out_of(self.program.schedule, s):
                put("out", term("skip", k, act), k)
        elif kind == Kind.W:
            came = [get("input", k) for k in into(self.program.schedule, s)]
            add(term("grad", s, get("stash"), get("input"), came))
        else:
            act = str(get("act"))
            last = s == self.program.schedule.stages - 1
            g = self.losses.get(act) if last else get("g")
            later = self.carried.get(("dkv", device, s, m, q + 1))
            more = [get("g", k) for k in out_of(self.program.schedule, s)]
            dx = term("dx", s, act, g, later, more)
            self.carried["dkv", device, s, m, q] = dx
            put("dx", dx)
            for k in into(self.program.schedule, s):
                put("dx", term("dskip", k, act, g, later, more), k)
            if kind == Kind.B:
                stash = term("stash", act, act, g, later, more)
                came = [get("input", k) for k in into(self.program.schedule, s)]
                add(term("grad", s, stash, get("input"), came))
            elif (buffer := find(it.writes, "stash")) is not None:
                old = self.read(buffer)
                put("stash", term("stash", old, act, g, later, more))


def computes_the_gradient(program: Program, dice: random.Random) -> bool:
    """Whether one random run ends, with each stage's gradient as in the reference."""
    run = Play(program, dice)
    if not run.run() or run.spoiled:
        return False
    schedule = program.schedule
    reduced = set(schedule.ops.stage[schedule.ops.kind == Kind.REDUCE].tolist())
    for stage, wanted in enumerate(reference(schedule)):
        for device in {pipe[stage] for pipe in schedule.placement.pipes}:
            mine = (program.buffers[:, :3] == (BufferKind.GRADIENT, device, stage)).all(
                1
            )
            (buffer,) = np.flatnonzero(mine).tolist()
            found = run.read(buffer)
            if not isinstance(found, tuple):
                return False
            sums = {
                number: run.read(tied_buffer(program, number, device))
                for number, tie in enumerate(schedule.ties)
                if stage in tie
            }
            steps = [(found, sums)] if schedule.has(Kind.STEP) else []
            if run.updates.get((stage, device), []) != steps:
                return False
            if stage in reduced:
                if found[:1] != ("sum",):
                    return False
                parts = found[1:]
                if not all(isinstance(part, tuple) for part in parts):
                    return False
                found = tuple(t for part in parts for t in part)  # type: ignore
            if sorted(map(str, found)) != wanted:
                return False
    return all(sums_once(run, tie, n) for n, tie in enumerate(schedule.ties))


def sums_once(run: Play, tie: Tie, number: int) -> bool:
    """Whether each device of a tie has the sum once, of all that its stages have.

    A stage that several devices hold has on each of them what its REDUCE summed.
    """
    pipes, buffers = run.program.schedule.placement.pipes, run.program.buffers
    wanted = []
    for stage in tie:
        mine = buffers[:, :3] == (BufferKind.GRADIENT, pipes[0][stage], stage)
        (buffer,) = np.flatnonzero(mine.all(1)).tolist()
        wanted.append(run.read(buffer))
    for device in {pipe[stage] for pipe in pipes for stage in tie}:
        found = run.read(tied_buffer(run.program, number, device))
        if not isinstance(found, tuple) or len(found) != 1:
            return False
        parts = [part for of_device in found[0] for part in of_device]
        if sorted(map(str, parts)) != sorted(map(str, wanted)):
            return False
    return True


def tied_buffer(program: Program, number: int, device: int) -> int:
    """Where a device has the sum of a tie."""
    mine = program.buffers[:, :3] == (BufferKind.TIED, device, number)
    (buffer,) = np.flatnonzero(mine.all(1)).tolist()
    return buffer
