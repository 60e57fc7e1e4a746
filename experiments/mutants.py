"""Single edits of right schedules, programs and CSV files: is each wrong one found?

Three parts, and in each a second opinion that shares no code with the first:

* schedules: every edit of an op. `check` against an interpreter of schedules (here);
  what `check` accepts is trained, and its gradients compared bit by bit.
* programs: every edit of an instruction. `prove` against a player of programs in
  random orders (`tests/programs.py`).
* torch's CSV with communication: a sample of the edits of a cell. The reader and
  `prove` against torch's own runtime, two processes with gloo, whose gradients are
  compared with those of a step without a pipeline.

    python experiments/mutants.py
        writes experiments/results/mutants.md
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "tests")]  # the other opinions are there

from programs import (  # noqa: E402
    Part,
    assembled,
    computes_the_gradient,
    parts_of,
    reference,
    term,
)
from strategies import rows_of  # noqa: E402
from torch_under_proof import Case, Company, actions, text_of  # noqa: E402

from pipeproof.exec import Pipeline  # noqa: E402
from pipeproof.exec import reference as unpipelined  # noqa: E402
from pipeproof.sched import (  # noqa: E402
    Action,
    BufferKind,
    Kind,
    Op,
    Program,
    Schedule,
    catalog,
    check,
    lower,
    overlap,
    prove,
    recompute,
)
from pipeproof.sched.errors import PipeproofError  # noqa: E402
from pipeproof.sched.interop.torch_csv import read_torch_csv  # noqa: E402
from pipeproof.sched.interop.torch_program import torch_program  # noqa: E402
from pipeproof.sched.program import StreamKind  # noqa: E402

RESULT = HERE / "results" / "mutants.md"
RUNS = 12
"""Random orders in which a program has to be right."""
MORE_RUNS = 30
"""As many, and as many more twice, before a refuted program is called right."""


@dataclass
class Tally:
    """Of one kind of edit, how many were what.

    Attributes:
        counts: (the first opinion accepts, the second one does) → how many.
        odd: those where they differ, in words.
    """

    counts: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)

    def add(self, ours: bool, theirs: bool, what: str) -> None:
        """One mutant."""
        self.counts[ours, theirs] += 1
        if ours != theirs:
            self.odd.append(what)


Tallies = dict[str, Tally]


# Schedules

Rows = list[list[list[Op]]]
Edit = tuple[str, str, Any]


def edits_of_schedule(schedule: Schedule) -> Iterator[Edit]:
    """(kind of edit, in words, rows) of every edit of one op or group."""
    rows = rows_of(schedule)
    for device, row in enumerate(rows):
        for at, group in enumerate(row):
            what = f"{'&'.join(map(str, group))} at {at} of device {device}"

            def edited(
                new: list[list[Op]], *, at: int = at, device: int = device, to: int = -1
            ) -> Rows:
                result = [list(row) for row in rows]
                result[device][at : at + 1] = new
                if to >= 0:
                    result[device].insert(to, rows[device][at])
                return result

            yield "drop", what, edited([])
            for to in range(len(row) + 1):
                yield "double", f"{what}, to {to}", edited([group], to=to)
            for to in range(at):
                swapped = [list(row) for row in rows]
                swapped[device][at], swapped[device][to] = row[to], row[at]
                yield "swap", f"{what} with {to}", swapped
            for other in range(len(rows)):
                for to in range(len(rows[other]) + 1) if other != device else ():
                    moved = edited([])
                    moved[other].insert(to, group)
                    yield "to another device", f"{what} to {to} of {other}", moved
            if group[0].kind == Kind.REDUCE:
                for to in range(at - 1):
                    early = edited([])
                    early[device].insert(to, group)
                    yield "early REDUCE", f"{what} to {to}", early
            for place, op in enumerate(group):
                for name, changed in _renamed(schedule, op):
                    new = [*group[:place], changed, *group[place + 1 :]]
                    yield name, f"{what} as {changed}", edited([new])


def _renamed(schedule: Schedule, op: Op) -> Iterator[tuple[str, Op]]:
    """The same op for something else."""
    ends = {"stage": schedule.stages}
    if op.kind != Kind.REDUCE:
        ends |= {"micro_batch": schedule.micro_batches, "slice": schedule.slices}
    for name, end in ends.items():
        for number in range(end):
            if number != getattr(op, name):
                which = "R" if op.kind == Kind.R else "op"
                words = f"{which} of another {name.replace('_', '-')}"
                yield words, op._replace(**{name: number})
    if op.kind != Kind.REDUCE:
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R):
            if kind != op.kind:
                yield "another kind", op._replace(kind=kind)


class Interpreter:
    """Devices that go through their rows and take tensors from named mailboxes.

    A device waits at an op until what it takes is there. What nobody takes away is a
    fault, as a send without its receive is.
    """

    def __init__(self, schedule: Schedule, rows: Rows) -> None:
        self.schedule = schedule
        self.rows = [deque(row) for row in rows]
        self.again = {
            (op.stage, op.micro_batch, op.slice)
            for row in rows
            for group in row
            for op in group
            if op.kind == Kind.R
        }
        self.mail: dict[tuple[Any, ...], deque[str]] = defaultdict(deque)
        self.kept: dict[tuple[Any, ...], str] = {}
        self.sums: dict[tuple[int, int], list[str]] = defaultdict(list)
        self.waiting: dict[int, dict[int, list[str]]] = defaultdict(dict)

    def right(self) -> bool:
        """Whether all run to their end, and leave the right gradients and no mail."""
        moved = True
        while moved:
            moved = False
            for device, row in enumerate(self.rows):
                while row and self.ready(device, row[0]):
                    for op in row.popleft():
                        if not self.run(device, op):
                            return False
                    moved = True
        if any(self.rows) or any(self.mail.values()):
            return False
        homes = self.homes
        if any(set(met) != homes[stage] for stage, met in self.waiting.items()):
            return False
        replicas = {s for s, home in enumerate(homes) if len(home) > 1}
        if replicas - set(self.waiting):
            return False
        return all(
            sorted(self.sums[stage, device]) == wanted
            for stage, wanted in enumerate(reference(self.schedule))
            for device in homes[stage]
        )

    @property
    def homes(self) -> list[set[int]]:
        """The devices of each stage."""
        return [set(pipe) for pipe in zip(*self.schedule.placement.pipes)]

    def home(self, op: Op, stage: int) -> int:
        """Where a stage of the op's micro-batch is."""
        pipe = self.schedule.pipe_of[op.micro_batch]
        return self.schedule.placement.pipes[pipe][stage]

    def ready(self, device: int, group: list[Op]) -> bool:
        """Whether what it takes from others is there, ahead of the whole group."""
        for kind, s, m, q in group:
            if kind == Kind.F and s > 0 and not self.mail[device, "x", s, m, q]:
                return False
            last = s == self.schedule.stages - 1
            waits = kind in (Kind.B, Kind.I) and not last
            if waits and not self.mail[device, "g", s, m, q]:
                return False
        return True

    def take(self, *key: Any) -> str | None:
        """Out of a mailbox."""
        return self.mail[key].popleft() if self.mail[key] else None

    def run(self, device: int, op: Op) -> bool:
        """One op; whether it found all that it needs."""
        kind, s, m, q = op
        if s >= self.schedule.stages or device not in self.homes[s]:
            return False
        if kind == Kind.REDUCE:
            return self.reduce(device, s)
        of, kept = (device, s, m, q), self.kept
        if kind in (Kind.F, Kind.R):
            if kind == Kind.R:
                x = kept.get(("x", *of))
            else:
                x = term("batch", m, q) if s == 0 else self.take(device, "x", s, m, q)
            if x is None:
                return False
            earlier = kept.get(("kv", device, s, m, q - 1))
            act = term("act", s, m, q, x, earlier)
            kept["x", *of], kept["kv", *of] = x, act
            if kind == Kind.R or (s, m, q) not in self.again:
                kept["act", *of] = act
            if kind == Kind.F and s + 1 < self.schedule.stages:
                there = self.home(op, s + 1)
                self.mail[there, "x", s + 1, m, q].append(term("out", act))
            return True
        if kind == Kind.W:
            stash, x = kept.pop(("stash", *of), None), kept.pop(("x", *of), None)
            if stash is None or x is None:
                return False
            self.sums[s, device].append(term("grad", s, stash, x))
            return True
        act = kept.pop(("act", *of), None)
        last = s == self.schedule.stages - 1
        g = None if last else self.take(device, "g", s, m, q)
        if act is None or (g is None and not last):
            return False
        later = kept.get(("dkv", device, s, m, q + 1))
        dx, stash = term("dx", s, act, g, later), term("stash", act, act, g, later)
        kept["dkv", *of] = dx
        if s > 0:
            self.mail[self.home(op, s - 1), "g", s - 1, m, q].append(dx)
        if kind == Kind.I:
            kept["stash", *of] = stash
            return True
        x = kept.pop(("x", *of), None)
        if x is None:
            return False
        self.sums[s, device].append(term("grad", s, stash, x))
        return True

    def reduce(self, device: int, stage: int) -> bool:
        """The last one to come adds up what each of them brought."""
        met = self.waiting[stage]
        if device in met:
            return False
        met[device] = list(self.sums[stage, device])
        if set(met) == self.homes[stage]:
            for there in met:
                self.sums[stage, there] = [t for part in met.values() for t in part]
        return True


def trains_right(schedule: Schedule) -> bool:
    """Whether the executor's gradients are those of the reference, bit by bit."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh()).double()
        for _ in range(schedule.stages)
    ]
    twins = deepcopy(stages)
    x, y = torch.randn(
        2, 3 * schedule.micro_batches, 2 * schedule.slices, 4, dtype=torch.float64
    )
    torch.manual_seed(1)
    loss = Pipeline(stages, schedule, functional.mse_loss).step(x, y)
    torch.manual_seed(1)
    wanted = unpipelined(twins, schedule, functional.mse_loss, x, y)
    pairs = [
        (p.grad, q.grad)
        for one, other in zip(stages, twins)
        for p, q in zip(one.parameters(), other.parameters())
    ]
    return torch.equal(loss, wanted) and all(torch.equal(p, q) for p, q in pairs)


@dataclass
class OfSchedules:
    """What came of editing schedules.

    Attributes:
        tallies: by kind of edit.
        trained, right: how many of the accepted were trained, and were right.
        rejected: the right ones that were rejected.
        needless: those of them with an R twice.
    """

    tallies: Tallies
    trained: int = 0
    right: int = 0
    rejected: int = 0
    needless: int = 0


def of_schedules(schedules: list[Schedule]) -> OfSchedules:
    """Edit, judge, and train what is accepted."""
    tallies: Tallies = defaultdict(Tally)
    result = OfSchedules(tallies)
    for schedule in schedules:
        assert Interpreter(schedule, rows_of(schedule)).right(), schedule.summary
        seen = {schedule}
        for name, what, rows in edits_of_schedule(schedule):
            theirs = Interpreter(schedule, rows).right()
            try:
                mutant = schedule.with_rows([_joined(row) for row in rows])
                ours = check(mutant).ok
            except PipeproofError:
                ours = False
            tallies[name].add(ours, theirs, f"{schedule.summary}: {name}: {what}")
            if ours and mutant not in seen:
                seen.add(mutant)
                result.trained += 1
                result.right += trains_right(mutant)
            if theirs and not ours:
                ops = Counter(op for row in rows for group in row for op in group)
                doubled = {op.kind for op, times in ops.items() if times > 1}
                result.rejected += 1
                result.needless += doubled == {Kind.R}
    return result


def _joined(row: list[list[Op]]) -> list[Any]:
    return [overlap(*group) if len(group) > 1 else group[0] for group in row]


# Programs


def edits_of_program(program: Program) -> Iterator[tuple[str, str, Program]]:
    """(kind of edit, in words, program) of every edit of one instruction."""
    size, buffers = len(program), program.buffers
    kinds = buffers[:, 0].tolist()
    alike: dict[int, list[int]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        alike[kind].append(number)

    def made(edit: Any) -> Program:
        parts = parts_of(program)
        edit(parts)
        return assembled(program, parts)

    for i in range(size):
        part, label = parts_of(program)[i], f"{program.label(i)} ({i})"
        yield "drop", label, made(lambda parts, i=i: parts.pop(i))
        for to in range(i + 1, size + 1, 3):

            def doubled(parts: list[Part], i: int = i, to: int = to) -> None:
                parts.insert(to, replace(parts[i], key=-1))

            yield "double", f"{label} to {to}", made(doubled)
        for j in range(i):
            if program.stream[i] == program.stream[j]:

                def swapped(parts: list[Part], i: int = i, j: int = j) -> None:
                    parts[i], parts[j] = parts[j], parts[i]

                yield "swap on its stream", f"{label} with {j}", made(swapped)
        for verb in ("reads", "writes", "frees"):
            for place, buffer in enumerate(getattr(part, verb)):
                for other in alike[kinds[buffer]]:
                    if other != buffer:

                        def retargeted(
                            parts: list[Part],
                            i: int = i,
                            verb: str = verb,
                            place: int = place,
                            other: int = other,
                        ) -> None:
                            getattr(parts[i], verb)[place] = other

                        words = f"{label} {verb} {program.buffer_at(other)}"
                        yield f"{verb} another buffer", words, made(retargeted)
        if part.op_count == 1:
            ops = program.schedule.ops
            for other, kind in enumerate(ops.kind.tolist()):
                if other != part.first_op and kind == ops.kind[part.first_op]:

                    def renamed(
                        parts: list[Part], i: int = i, other: int = other
                    ) -> None:
                        parts[i].first_op = other

                    words = f"{label} as {ops[other]}"
                    yield "op of another stage or micro-batch", words, made(renamed)
        if part.message >= 0:
            for other in range(len(program.messages)):
                if other != part.message:

                    def carrying(
                        parts: list[Part], i: int = i, other: int = other
                    ) -> None:
                        parts[i].message = other

                    words = f"{label} for {program.message_at(other)}"
                    yield "another message", words, made(carrying)
        for stream in range(len(program.streams)):
            if stream != part.stream:

                def on_another(
                    parts: list[Part], i: int = i, stream: int = stream
                ) -> None:
                    parts[i].stream = stream

                words = f"{label} on {program.streams[stream]}"
                yield "another device or channel", words, made(on_another)
        for place in range(len(part.waits)):
            yield (
                "drop a wait",
                f"{label}, wait {part.waits[place]}",
                made(lambda parts, i=i, place=place: parts[i].waits.pop(place)),
            )
        for place, buffer in enumerate(part.frees):
            for to in range(size):
                if to != i and program.device[to] == program.device[i]:

                    def freed(
                        parts: list[Part],
                        i: int = i,
                        place: int = place,
                        to: int = to,
                    ) -> None:
                        parts[to].frees.append(parts[i].frees.pop(place))

                    words = f"{program.buffer_at(buffer)} by {to} and not {i}"
                    yield "freed elsewhere", words, made(freed)
        if part.action == Action.REDUCE:
            for to in range(i):

                def early(parts: list[Part], i: int = i, to: int = to) -> None:
                    moved = parts.pop(i)
                    moved.waits = []
                    parts.insert(to, moved)

                yield "early REDUCE", f"{label} to {to}", made(early)
    for buffer in range(len(buffers)):
        for other in range(len(buffers)):
            if other != buffer and buffers[other, 1] == buffers[buffer, 1]:
                if buffers[buffer, 5] == other:
                    continue
                words = f"{program.buffer_at(buffer)} in {program.buffer_at(other)}"
                parts = parts_of(program)
                yield (
                    "another's slot",
                    words,
                    assembled(program, parts, {buffer: other}),
                )


Event = tuple[str, int]


class Stubborn:
    """Dice that fix what goes first, and so reach orders that even odds seldom do.

    Args:
        seed: of the order.
        late: an event that goes only when nothing else can, and one that goes last
            of all: a use of a buffer that is put off until just before another one.
    """

    def __init__(self, seed: int, late: tuple[Event, ...] = ()) -> None:
        self._dice = random.Random(seed)
        self._first = {event: -1 - place for place, event in enumerate(late)}
        self.random = self._dice.random

    def choice(self, events: list[Any]) -> Any:
        """Of events (what, instruction) the one that goes first."""

        def rank(event: Any) -> float:
            key = event[0].__name__, event[1]
            return self._first.setdefault(key, self._dice.random())

        return max(events, key=rank)


def plays_right(program: Program, runs: int) -> bool:
    """Whether a program is of the right form, and right in many orders.

    In `runs` random ones; and then as many as two uses of one slot on two streams
    can be put off for each other, but no more than twice `runs`.
    """
    if not well_formed(program):
        return False
    dice = random.Random(0)
    late = list(put_off(program))
    dice.shuffle(late)
    orders: list[Any] = [random.Random(seed) for seed in range(runs // 2)]
    orders += [Stubborn(seed) for seed in range(runs // 2)]
    orders += [Stubborn(seed, pair) for seed, pair in enumerate(late[: 2 * runs])]
    for order in orders:
        try:
            if not computes_the_gradient(program, order):
                return False
        except (KeyError, AssertionError, IndexError, ValueError):
            return False  # what has no meaning is not right either
    return True


def put_off(program: Program) -> Iterator[tuple[Event, Event]]:
    """Ends and starts of two instructions that use a slot, on different streams."""
    users: dict[int, set[int]] = defaultdict(set)
    for it in program:
        for buffer in (*it.reads, *it.writes, *it.frees):
            root = buffer
            while root.takes_over >= 0:
                root = program.buffer_at(root.takes_over)
            users[root.index].add(it.index)
    for several in users.values():
        for one in several:
            for other in several:
                if program.stream[one] != program.stream[other]:
                    yield ("end", one), ("start", other)
                    yield ("end", one), ("end", other)


def in_rings(program: Program) -> bool:
    """Whether a buffer takes over, in some steps, from itself."""
    before = program.buffers[:, 5].tolist()
    for buffer in range(len(before)):
        root, steps = buffer, 0
        while before[root] >= 0:
            root, steps = before[root], steps + 1
            if steps > len(before):
                return True
    return False


def well_formed(program: Program) -> bool:
    """Whether each instruction says what is the case: device, stream and message.

    The player takes a tensor to wherever the k-th receive of its link wants it, and
    any buffer from anywhere. A device has its own only, and the executor takes the
    message at its name.
    """
    if in_rings(program):
        return False
    for it in program:
        stream, message = it.stream, it.message
        for buffer in (*it.reads, *it.writes, *it.frees):
            if buffer.device != stream.device and buffer.kind != BufferKind.OFFLOADED:
                return False
            ends = program.buffers[[buffer.index, buffer.takes_over]]
            if buffer.takes_over >= 0 and BufferKind.GRADIENT in ends[:, 0]:
                return False
        moves = stream.kind in (StreamKind.SEND, StreamKind.RECV)
        if moves != (message is not None) or (
            (it.action in (Action.COMPUTE, Action.LOCAL))
            != (stream.kind == StreamKind.COMPUTE)
        ):
            return False
        if message is not None:
            sends = it.action == Action.SEND
            own = message.send if sends else message.recv
            if stream.link != (message.source, message.target) or own != it.index:
                return False
    return True


def of_programs(programs: list[Program], sample: int) -> Tallies:
    """The tallies of a random sample of each kind of edit of each program."""
    tallies: Tallies = defaultdict(Tally)
    dice = random.Random(0)
    for program in programs:
        assert prove(program).ok
        assert plays_right(program, RUNS)
        of_kind: dict[str, list[tuple[str, Program]]] = defaultdict(list)
        for name, what, mutant in edits_of_program(program):
            of_kind[name].append((what, mutant))
        for name, mutants in of_kind.items():
            for what, mutant in dice.sample(mutants, min(sample, len(mutants))):
                ours = prove(mutant).ok
                theirs = plays_right(mutant, RUNS if ours else MORE_RUNS)
                words = f"{program.schedule.name}: {name}: {what}"
                tallies[name].add(ours, theirs, words)
        print(program.schedule.summary, file=sys.stderr, flush=True)
    return tallies


# torch's CSV


def edits_of_csv(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind of edit, in words, text) of every edit of a cell but of weights' ones."""
    rows = [line.split(",") for line in text.splitlines()]
    stages = 1 + max(int(cell[0]) for row in rows for cell in row)
    micro_batches = {c[-1] for row in rows for c in row if c[-1].isdigit()}

    def joined(rank: int, new: list[str]) -> str:
        edited = [new if r == rank else row for r, row in enumerate(rows)]
        return "".join(",".join(row) + "\n" for row in edited)

    for rank, row in enumerate(rows):
        for at, cell in enumerate(row):
            if cell.endswith("SHARD"):
                continue  # it matters to sharded weights only
            rest = row[:at] + row[at + 1 :]
            reduces = cell.endswith("GRAD")
            name = "REDUCE_GRAD" if reduces else "op"
            if "SEND" in cell or "RECV" in cell:
                name = "transfer"
            yield f"drop a {name}", cell, joined(rank, rest)
            yield f"double a {name}", cell, joined(rank, [*row[:at], cell, *row[at:]])
            for to in range(len(rest) + 1):
                if to != at:
                    moved = [*rest[:to], cell, *rest[to:]]
                    yield f"move a {name}", f"{cell} to {to}", joined(rank, moved)
            if reduces:
                continue
            for stage in range(stages):
                other = f"{stage}{cell[1:]}"
                if other != cell:
                    new = [*row[:at], other, *row[at + 1 :]]
                    yield f"{name} of another stage", other, joined(rank, new)
            for micro_batch in sorted(micro_batches):
                other = f"{cell[:-1]}{micro_batch}"
                if other != cell:
                    new = [*row[:at], other, *row[at + 1 :]]
                    yield f"{name} of another micro-batch", other, joined(rank, new)


def accepted(text: str) -> bool:
    """Whether the reader, `check` and `prove` have nothing against it."""
    try:
        csv = read_torch_csv(text, agreeing=False)
        return csv.schedule.report.ok and prove(torch_program(csv)).ok
    except PipeproofError:
        return False


def of_csvs(cases: list[Case], sample: int) -> Tallies:
    """The tallies of a sample, for each kind of edit as many accepted as refused."""
    tallies: Tallies = defaultdict(Tally)
    dice = random.Random(1)
    company = Company(2, deadline_s=10)
    for case in cases:
        chosen: dict[tuple[str, bool], list[tuple[str, str]]] = defaultdict(list)
        every = list(edits_of_csv(text_of(actions(case))))
        dice.shuffle(every)
        for name, what, text in every:
            of_kind = chosen[name, accepted(text)]
            if len(of_kind) < sample:
                of_kind.append((what, text))
        for (name, ours), mutants in chosen.items():
            for what, text in mutants:
                outcome = company.run(replace(case, edited=text))
                tallies[name].add(ours, outcome.right, f"{case.name}: {name}: {what}")
                print(name, what, ours, outcome, file=sys.stderr, flush=True)
    company.end()
    return tallies


# The table


def table(tallies: Tallies) -> list[str]:
    """A row for each kind of edit, and their sum."""
    lines = [
        "| edit | mutants | wrong, rejected | wrong, accepted | right, accepted "
        "| right, rejected |",
        "|-|-|-|-|-|-|",
    ]
    total: Counter[tuple[bool, bool]] = Counter()
    for name, tally in sorted(tallies.items()):
        total += tally.counts
        lines.append(_row(name, tally.counts))
    return [*lines, _row("all", total)]


def _row(name: str, counts: Counter[tuple[bool, bool]]) -> str:
    cells = (counts[False, False], counts[True, False])
    cells += (counts[True, True], counts[False, True])
    return f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |"


def odd(tallies: Tallies) -> list[str]:
    """What the two opinions do not agree on."""
    every = [what for tally in tallies.values() for what in tally.odd]
    if not every:
        return []
    shown = [f"* {what}" for what in every[:12]]
    more = f"… and {len(every) - 12} more" if len(every) > 12 else ""
    return ["", "The two opinions differ on:", "", *shown, *filter(None, ["", more])]


def bases() -> list[Schedule]:
    """Small right schedules that use the language up."""

    def made(name: str, p: int, m: int, **options: Any) -> Schedule:
        return catalog.make(name, devices=p, micro_batches=m, **options)

    return [
        made("1f1b", 2, 3),
        recompute(made("gpipe", 2, 2), "always"),
        recompute(made("1f1b", 3, 3), "except-last"),
        made("zb-h1", 2, 3),
        made("interleaved", 2, 2),
        made("zb-v", 2, 2),
        made("chimera", 2, 2),
        made("dualpipe-v", 2, 4),
        made("seq1f1b", 2, 2),
    ]


def main() -> None:
    """Count, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--programs", type=int, default=10, help="of each edit of a program"
    )
    parser.add_argument("--sample", type=int, default=2, help="of each edit of a CSV")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schedules = of_schedules(bases())
    programs = of_programs(
        [lower(s) for s in bases() if len(s) <= 32]
        + [lower(bases()[0], receives="late", transfers="blocking")]
        + [lower(catalog.make("pipeoffload", devices=2, micro_batches=2))],
        arguments.programs,
    )
    csvs = of_csvs(
        [
            Case("1F1B", 2, 1, 3, False),
            Case("InterleavedZeroBubble", 2, 2, 2, False),
        ],
        arguments.sample,
    )
    lines = [
        "# Mutants: single edits of what is right",
        "",
        "A mutant is wrong if it does not come to its end, or to other gradients than "
        "training without a pipeline. That is decided by a second opinion, never by "
        "the one that is tested. No mutant made a command hang.",
        "",
        "## Schedules: `check` against an interpreter",
        "",
        f"Every edit of {len(bases())} schedules. Of the accepted, {schedules.trained} "
        f"different ones were trained; in {schedules.right} loss and gradients equal "
        "those of the reference bit by bit. Right but rejected are "
        f"{schedules.rejected}; {schedules.needless} of them recompute an activation "
        "twice, which a schedule may not say: each op once.",
        "",
        *table(schedules.tallies),
        *odd(schedules.tallies),
        "",
        "## Programs: `prove` against a player in random orders",
        "",
        f"Up to {arguments.programs} random edits of each kind of each program. What "
        f"is proved was played in {RUNS} random orders, and in up to {2 * RUNS} that "
        "put one use of a slot off for another; what is refuted counts as right if it "
        f"is in {MORE_RUNS} and {2 * MORE_RUNS} of them.",
        "",
        *table(programs),
        *odd(programs),
        "",
        "## torch's CSV with communication: reader and `prove` against torch",
        "",
        "A sample of each kind of edit, run by torch's own runtime, two processes with "
        "gloo; ranks that stood still were ended.",
        "",
        *table(csvs),
        *odd(csvs),
        "",
        "Programs carry no scale: the executor puts each micro-batch's weight on its "
        "loss, and its gradients are compared with the reference's in the tests. In a "
        "CSV it is REDUCE_GRAD that scales.",
        "",
        f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with "
        "`python experiments/mutants.py`.",
    ]
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
