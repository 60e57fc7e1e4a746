"""Uninterpreted execution: a program run on terms instead of tensors.

Each instruction reads what its buffers hold and not what it is called: an op finds
its operands by what kind of buffer they are, in an overlap group by whose. Its own
stage, micro-batch and slice say only what a runtime takes from them: whose weights,
which rows of the batch and targets, which random numbers, and in the last stage's
forward which weight of the loss. A slot holds one content.
Reading it under the name of a buffer that has been freed, overwritten, or not yet
written gives a term that is equal to no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.ir import Kind, Op
from pipeproof.sched.program import Program
from pipeproof.sched.terms import NOTHING, Reference, Terms

INPUTS = (BufferKind.INPUT, BufferKind.STORED_INPUT)
ACTIVATIONS = (BufferKind.ACTIVATION,)
STASHES = (BufferKind.WEIGHT_STASH,)
OUTPUTS = (BufferKind.OUTPUT,)
OUTPUT_GRADS = (BufferKind.OUTPUT_GRAD,)
INPUT_GRADS = (BufferKind.INPUT_GRAD,)
GRADIENTS = (BufferKind.GRADIENT,)
UNCOUNTED = (BufferKind.GRADIENT, BufferKind.HOST)

Kinds = tuple[BufferKind, ...]

Past = tuple[int, "Past | None"]
"""The instruction that wrote a content, and of one that only moved it, the past of
what it moved."""


@dataclass(frozen=True, slots=True)
class Operand:
    """What an op has read.

    Attributes:
        buffer: its number; -1 where it found none.
        term: the content.
        past: how that came there.
    """

    buffer: int
    term: int
    past: Past | None


@dataclass(frozen=True, slots=True)
class Update:
    """What a STEP has read.

    Attributes:
        instruction: of it.
        gradient: of its stage.
        sums: of ties, by their number.
    """

    instruction: int
    gradient: Operand
    sums: dict[int, Operand]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first operand that an unpipelined step would not have given to an op.

    Attributes:
        instruction, op: who read it.
        kinds: of the buffer that was looked for.
        buffer: what was read, or -1 where there is none of these kinds.
        found, expected: terms.
        past: how the content came there.
    """

    instruction: int
    op: Op
    kinds: Kinds
    buffer: int
    found: int
    expected: int
    past: Past | None


class Walk:
    """One run of a program, all devices together.

    Args:
        program: without deadlocks and races.
        slots: for each buffer its slot.
        partners: for each REDUCE and TIE those that it meets, itself included, by
            device.
        ties: of each TIE, the number of its tie.

    Attributes:
        terms: all that occurred.
        reference: those of an unpipelined step.
        difference: the first, or None.
        peaks: for each device the most buffers alive at once during the walk,
            without gradients and what lies on the host.
        updated: by stage and device, what each STEP read.
    """

    def __init__(
        self,
        program: Program,
        slots: Sequence[int],
        partners: dict[int, tuple[int, ...]],
        ties: dict[int, int],
    ) -> None:
        self.terms = Terms()
        self.reference = Reference.of(self.terms, program.schedule)
        self.difference: Difference | None = None
        self.peaks = [0] * program.schedule.devices
        self._program = program
        self._slots, self._partners, self._ties = slots, partners, ties
        self._reads = program.reads.to_lists()
        self._writes = program.writes.to_lists()
        self._frees = program.frees.to_lists()
        rows = program.buffers.tolist()
        self._kinds = [row[0] for row in rows]
        self._homes = [row[1] for row in rows]
        self._owners = [tuple(row[2:5]) for row in rows]
        self._over = program.buffer_skips.tolist()
        stages = range(program.schedule.stages)
        self._coming = list(map(self.reference.coming, stages))
        self._leaving = list(map(self.reference.leaving, stages))
        self._content = [NOTHING] * len(rows)
        self._past: list[Past | None] = [None] * len(rows)
        self._holder = [-1] * len(rows)
        self._alive = [False] * len(rows)
        self._born = [False] * len(rows)
        self._freed_by = [-1] * len(rows)
        self._live = [0] * program.schedule.devices
        self._under_way: dict[int, tuple[int, Past | None]] = {}
        self._carried: dict[tuple[str, int, int, int, int], int] = {}
        self._last_stage = program.schedule.stages - 1
        self._last_slice = program.schedule.slices - 1
        self._met: dict[int, int] = {}
        self._losses: dict[int, int] = {}  # of activations, what a backward starts from
        self.updated: dict[tuple[int, int], list[Update]] = {}

    def run(self, order: Sequence[int]) -> None:
        """All instructions, in an order that streams, waits and messages allow."""
        program = self._program
        action, message = program.action.tolist(), program.message.tolist()
        first, count = program.first_op.tolist(), program.op_count.tolist()
        device, ops = program.device.tolist(), program.schedule.ops
        columns = ops.kind, ops.stage, ops.micro_batch, ops.slice
        every = list(zip(*(column.tolist() for column in columns)))
        for i in order:
            what = action[i]
            if what == Action.SEND:
                term, past = self._moved(i)[0]
                self._under_way[message[i]] = term, (i, past)
            elif what == Action.RECV:
                self._arrive(i, [self._under_way[message[i]]])
            elif what in (Action.LOCAL, Action.COPY):
                self._arrive(i, self._moved(i))
            elif what == Action.REDUCE:
                self._reduce(i)
            elif what == Action.TIE:
                self._tie(i)
            else:
                alone = count[i] == 1
                for kind, s, m, q in every[first[i] : first[i] + count[i]]:
                    if kind == Kind.STEP:
                        self._update(i, s, device[i])
                        continue
                    self._compute(i, kind, s, m, q, device[i], alone=alone)
            for buffer in self._frees[i]:
                self._free(i, buffer)

    def gradient(self, buffer: int) -> int:
        """The term in an accumulator, or a tie's sum; nothing where nothing was put."""
        return self._read(buffer) if self._born[buffer] else NOTHING

    def _compute(
        self,
        i: int,
        kind: int,
        stage: int,
        micro_batch: int,
        part: int,
        device: int,
        *,
        alone: bool,
    ) -> None:
        make, reads, writes = self.terms.make, self._reads[i], self._writes[i]
        here = (stage, micro_batch, part)
        reference, place = self.reference, self.reference.at(*here)
        row, coming = reference.row(micro_batch, part), self._coming[stage]
        who = None if alone else here

        def read(kinds: Kinds, expected: int, skip: int = -1) -> int:
            buffer = self._find(reads, kinds, who, skip)
            missing = "missing", i, *kinds, skip
            found = self._read(buffer) if buffer >= 0 else make(*missing)
            if found != expected and self.difference is None:
                past, op = self._past_of(buffer), Op(Kind(kind), *here)
                self.difference = Difference(
                    i, op, kinds, buffer, found, expected, past
                )
            return found

        def brought() -> list[int]:
            return [read(INPUTS, reference.skip_inputs[k][row], k) for k in coming]

        def write(kinds: Kinds, term: int, skip: int = -1) -> None:
            buffer = self._find(writes, kinds, who, skip)
            if buffer >= 0:
                self._write(buffer, term, (i, None))

        def add(gradient: int) -> None:
            owner = None if alone else (stage, -1, 0)
            buffer = self._find(writes, GRADIENTS, owner)
            if buffer >= 0:
                total = make("add", self.gradient(buffer), gradient)
                self._write(buffer, total, (i, None))

        if kind in (Kind.F, Kind.R):
            if self._find(writes, INPUTS, who) >= 0:  # brought in, not received
                x = make("batch", micro_batch, part)
                write(INPUTS, x)
            else:
                x = read(INPUTS, reference.inputs[place])
            kv = self._carry("forward", device, stage, micro_batch, part - 1)
            act = make("act", stage, micro_batch, part, x, kv, *brought())
            self._carried["forward", device, *here] = act
            if stage == self._last_stage:
                self._losses[act] = self.terms.of_loss(micro_batch, part, act)
            write(ACTIVATIONS, act)
            write(STASHES, act)
            write(OUTPUTS, make("out", act))
            for k in self._leaving[stage]:
                write(OUTPUTS, make("skip", k, act), k)
        elif kind == Kind.W:
            stash, over = read(STASHES, reference.stashes[place]), brought()
            x = read(INPUTS, reference.inputs[place])
            add(make("grad", stage, stash, x, *over))
        else:
            act = read(ACTIVATIONS, reference.activations[place])
            if stage < self._last_stage:
                g = read(OUTPUT_GRADS, reference.output_grads[place])
            else:
                g = self._losses.get(act, NOTHING)
            if leaving := self._leaving[stage]:
                grads = reference.skip_grads
                over = [read(OUTPUT_GRADS, grads[k][row], k) for k in leaving]
                g = make("and", g, *over)
            if part < self._last_slice:
                later = self._carry("backward", device, stage, micro_batch, part + 1)
                g = make("with", g, later)
            dx = make("dx", stage, act, g)
            self._carried["backward", device, *here] = dx
            write(INPUT_GRADS, dx)
            for k in coming:
                write(INPUT_GRADS, make("dskip", k, act, g), k)
            if kind == Kind.B:
                came, x = brought(), read(INPUTS, reference.inputs[place])
                add(make("grad", stage, make("stash", act, act, g), x, *came))
            else:
                buffer = self._find(writes, STASHES, who)
                if buffer >= 0:
                    stash = make("stash", self._read(buffer), act, g)
                    self._write(buffer, stash, (i, None))

    def _carry(
        self, way: str, device: int, stage: int, micro_batch: int, part: int
    ) -> int:
        """Keys and values, or their gradient, of the neighbouring slice."""
        if part < 0:
            return NOTHING
        key = way, device, stage, micro_batch, part
        found = self._carried.get(key)
        return self.terms.make("missing", *key) if found is None else found

    def _find(
        self,
        buffers: list[int],
        kinds: Kinds,
        owner: tuple[int, int, int] | None,
        skip: int = -1,
    ) -> int:
        over = self._over
        for buffer in buffers:
            if self._kinds[buffer] not in kinds or (over and over[buffer] != skip):
                continue
            if owner in (None, self._owners[buffer]):
                return buffer
        return -1

    def _moved(self, i: int) -> list[tuple[int, Past | None]]:
        if not self._reads[i]:
            return [(self.terms.make("missing", i), None)]
        return [(self._read(b), self._past_of(b)) for b in self._reads[i]]

    def _arrive(self, i: int, contents: list[tuple[int, Past | None]]) -> None:
        """The k-th content goes to the k-th buffer that is written."""
        for number, buffer in enumerate(self._writes[i]):
            if number < len(contents):
                term, past = contents[number]
            else:
                term, past = self.terms.make("missing", i, number), None
            self._write(buffer, term, (i, past))

    def _reduce(self, i: int) -> None:
        buffer = self._find(self._reads[i], GRADIENTS, None)
        missing = self.terms.make("missing", i)
        self._meet(i, self.gradient(buffer) if buffer >= 0 else missing, "sum")

    def _tie(self, i: int) -> None:
        """What its stages have so far, in the order in which it reads them."""
        own = self.terms.make("part", *map(self.gradient, self._reads[i]))
        self._meet(i, own, "tie", self._ties[i])

    def _meet(self, i: int, own: int, *of: object) -> None:
        """At the last of those that meet, all of them get the sum."""
        partners = self._partners[i]
        self._met[i] = own
        if all(other in self._met for other in partners):
            total = self.terms.make(*of, *(self._met[other] for other in partners))
            for other in partners:
                for written in self._writes[other]:
                    self._write(written, total, (other, None))

    def _update(self, i: int, stage: int, device: int) -> None:
        found = self._find(self._reads[i], GRADIENTS, None)
        gradient = self._operand(i, found)
        if found >= 0:  # one that nothing was added to is a sum of nothing
            gradient = replace(gradient, term=self.gradient(found))
        sums = {
            self._owners[buffer][0]: self._operand(i, buffer)
            for buffer in self._reads[i]
            if self._kinds[buffer] == BufferKind.TIED
        }
        done = self.updated.setdefault((stage, device), [])
        done.append(Update(i, gradient, sums))

    def _operand(self, i: int, buffer: int) -> Operand:
        term = self._read(buffer) if buffer >= 0 else self.terms.make("missing", i)
        return Operand(buffer, term, self._past_of(buffer))

    def _read(self, buffer: int) -> int:
        slot = self._slots[buffer]
        if not self._born[buffer]:
            return self.terms.make("unwritten", buffer)
        if self._holder[slot] != buffer:
            return self.terms.make("overwritten", buffer, self._holder[slot])
        if not self._alive[slot]:
            return self.terms.make("freed", buffer, self._freed_by[slot])
        return self._content[slot]

    def _past_of(self, buffer: int) -> Past | None:
        return self._past[self._slots[buffer]] if buffer >= 0 else None

    def _write(self, buffer: int, term: int, past: Past) -> None:
        slot = self._slots[buffer]
        if not self._alive[slot]:
            self._alive[slot] = True
            self._count(buffer, 1)
        self._born[buffer] = True
        self._holder[slot] = buffer
        self._content[slot] = term
        self._past[slot] = past

    def _free(self, i: int, buffer: int) -> None:
        """Frees what lies in the slot, whosever it is."""
        slot = self._slots[buffer]
        if self._alive[slot]:
            self._alive[slot] = False
            self._freed_by[slot] = i
            self._count(self._holder[slot], -1)

    def _count(self, buffer: int, change: int) -> None:
        if self._kinds[buffer] in UNCOUNTED:
            return
        device = self._homes[buffer]
        self._live[device] += change
        if self._live[device] > self.peaks[device]:
            self.peaks[device] = self._live[device]
