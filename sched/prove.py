"""Prove that a program computes the gradient of unpipelined training.

The program is run on uninterpreted terms (`walk`), and each parameter's gradient
compared with the terms of an unpipelined step (`terms`). A runtime never looks at
data, so what holds for functions of which nothing is known holds for every model.
One run speaks for all: the program cannot hang (`deadlock`), and no two uses of a
slot overlap (`races`), so every order that streams, waits and messages allow leaves
the same contents. This is symbolic execution as in translation validation (Pnueli,
Siegel, Singerman 1998), with the model as uninterpreted functions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deadlock import Waiting, deadlocks, named
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.findings import Finding, Report
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import levels
from pipeproof.sched.lower import lower
from pipeproof.sched.matching import meetings, misgrouped, mismatches
from pipeproof.sched.program import Action, BufferKind, Program
from pipeproof.sched.races import elsewhere, races, rings, slots
from pipeproof.sched.walk import Difference, Past, Walk

ASSUMPTIONS = (
    "rows of a batch are independent: a stage's output for a row depends on no other",
    "the loss is a sum, or a weighted mean, over micro-batches",
    "micro-batches share no state but the weights, which do not change in a step",
    "a stage is a deterministic function of weights, input, and random numbers keyed "
    "by micro-batch and slice",
)
OF_SLICES = (
    "keys and values of a micro-batch's slices, and their gradients, stay on the "
    "device from its first slice to its last backward",
)

SHOWN = 8
"""Micro-batches or moves of a tensor that a message spells out."""


@dataclass(frozen=True, slots=True)
class Chain:
    """In what order one device adds up a stage's gradient.

    Attributes:
        device: which.
        terms: (micro-batch, slice) of each term, the first one first.
    """

    device: int
    terms: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """That a program computes the gradient of unpipelined training, and how.

    Attributes:
        schedule: what was lowered.
        program: sha256 of all columns of the program that was proved.
        assumptions: about the model and the loss, under which it holds.
        trees: for each stage the chains that add up its gradient; where there are
            several devices, their sum is taken in this order.
        peak_buffers: for each device the most tensors alive at once when every
            instruction runs as early as it can and takes one tick; without
            accumulated gradients and what lies on the host.
    """

    schedule: Schedule
    program: str
    assumptions: tuple[str, ...]
    trees: tuple[tuple[Chain, ...], ...]
    peak_buffers: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """True, as of a report without findings."""
        return True

    @property
    def findings(self) -> tuple[Finding, ...]:
        """None, as of a report without findings."""
        return ()

    def raise_if_bad(self) -> None:
        """Nothing: it is proved."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return {
            "ok": True,
            "schedule": self.schedule.name,
            "digest": self.schedule.digest,
            "program": self.program,
            "assumptions": list(self.assumptions),
            "reduction": [
                [
                    {"device": chain.device, "terms": list(map(list, chain.terms))}
                    for chain in tree
                ]
                for tree in self.trees
            ],
            "peak_buffers": list(self.peak_buffers),
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON object."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [
            f"{self.schedule.summary}: proved: the gradient is that of unpipelined "
            "training",
            f"  schedule {self.schedule.digest[:16]}, program {self.program[:16]}",
            "  without deadlock under any buffering (streams 'dir'), without races",
            "assuming",
            *(f"  {assumption}" for assumption in self.assumptions),
            "adding up micro-batches, per parameter and in this order",
            *(f"  {line}" for line in self._trees()),
            "tensors alive at once, at most",
            f"  {_counted(self.peak_buffers)}",
        ]
        return "\n".join(lines)

    def _trees(self) -> Iterator[str]:
        words = [
            " + ".join(self._chain(chain, len(tree) > 1) for chain in tree)
            for tree in self.trees
        ]
        low = 0
        while low < len(words):
            high = low
            while high + 1 < len(words) and words[high + 1] == words[low]:
                high += 1
            what = f"stage {low}" if low == high else f"stages {low}–{high}"
            yield f"{what}: {words[low]}"
            low = high + 1

    def _chain(self, chain: Chain, several: bool) -> str:
        sliced = self.schedule.slices > 1
        if sliced:
            words = [f"{m}.{q}" for m, q in chain.terms]
        else:
            words = _runs([m for m, _ in chain.terms])
        if len(words) > SHOWN:
            words = [*words[: SHOWN - 1], "…", words[-1]]
        text = f"Σ({' '.join(words)})"
        return f"{text} of device {chain.device}" if several else text


@dataclass(frozen=True)
class Refutation(Report):
    """Why a program does not compute the gradient of unpipelined training."""

    verdict: str = "refuted"

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return {
            "ok": False,
            "schedule": self.schedule.name,
            "digest": self.schedule.digest,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON object."""
        return json.dumps(self.to_dict())


def prove(program: Program | Schedule) -> Certificate | Refutation:
    """Whether a program computes the gradient of unpipelined training, on any model.

    Takes linear time. A schedule is lowered first, with `lower`'s defaults.

    Returns:
        A `Certificate`, or a `Refutation` with findings: those of `check` for a
        schedule; for a program, messages that do not match, a deadlock, a race, or
        the first operand that is not what it should be, and with each stage what
        its gradient lacks.

    Raises:
        ParameterError: something else than a program or a schedule.
        UnsupportedError: a schedule that is not lowered yet.
    """
    if isinstance(program, Schedule):
        if not program.report.ok:
            return Refutation(program, program.report.findings)
        program = lower(program)
    if not isinstance(program, Program):
        raise ParameterError(
            f"prove takes a Program, or a Schedule to lower, found "
            f"{type(program).__name__}"
        )
    schedule = program.schedule
    if found := misgrouped(program) or (*rings(program), *elsewhere(program)):
        return Refutation(schedule, found)
    if found := mismatches(program) or deadlocks(program):
        return Refutation(schedule, found)
    waiting = Waiting.of(program, buffering=None)
    level = levels(waiting.nodes, waiting.before, waiting.after)
    order = _order(program, waiting, level)
    if found := races(program, waiting, level, order):
        return Refutation(schedule, found)
    partners = {i: tuple(g.tolist()) for g in meetings(program) for i in g.tolist()}
    walk = Walk(program, slots(program).tolist(), partners)
    walk.run(order.tolist())
    trees, findings = _gradients(program, walk)
    if findings:
        first = walk.difference
        found = () if first is None else (_told(program, walk, first),)
        return Refutation(schedule, (*found, *findings))
    return Certificate(
        schedule,
        _digest(program),
        ASSUMPTIONS + (OF_SLICES if schedule.slices > 1 else ()),
        trees,
        tuple(walk.peaks),
    )


def _order(
    program: Program, waiting: Waiting, level: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Instructions by the level of their start; a receive by that of its end."""
    size = len(program)
    when = level[:size].copy()
    receives = program.action == Action.RECV
    when[receives] = level[waiting.done[receives]]
    return np.argsort(when, kind="stable")


def _gradients(
    program: Program, walk: Walk
) -> tuple[tuple[tuple[Chain, ...], ...], tuple[Finding, ...]]:
    """Each stage's reduction tree, and what is wrong with its gradient."""
    schedule = program.schedule
    numbers = np.flatnonzero(program.buffers[:, 0] == BufferKind.GRADIENT)
    rows = zip(program.buffers[numbers, 1:3].tolist(), numbers.tolist())
    accumulators = {(stage, device): number for (device, stage), number in rows}
    ops = schedule.ops
    reduced = set(ops.stage[ops.kind == Kind.REDUCE].tolist())
    trees, findings = [], []
    for stage in range(schedule.stages):
        homes = sorted({pipe[stage] for pipe in schedule.placement.pipes})
        final = [
            walk.gradient(accumulators[stage, device])
            if (stage, device) in accumulators
            else walk.terms.make("missing", "gradient", stage, device)
            for device in homes
        ]
        parts = final
        if stage in reduced:
            whole, devices = final[0], homes
            same = all(term == whole for term in final)
            match walk.terms.keys[whole]:
                case ("sum", *rest) if same and len(rest) == len(homes):
                    parts = [term for term in rest if isinstance(term, int)]
                case _:
                    findings.append(_not_reduced(stage, devices))
                    continue
        wanted = {
            term: divmod(place // schedule.stages, schedule.slices)
            for place, term in _places(walk.reference.gradients, stage, schedule)
        }
        chains = [walk.terms.chain(term) for term in parts]
        findings += _unequal(program, stage, homes, chains, wanted)
        trees.append(
            tuple(
                Chain(device, tuple(wanted.get(term, (-1, -1)) for term in chain))
                for device, chain in zip(homes, chains)
            )
        )
    return tuple(trees), tuple(findings)


def _places(
    column: list[int], stage: int, schedule: Schedule
) -> Iterator[tuple[int, int]]:
    for place in range(stage, len(column), schedule.stages):
        yield place, column[place]


def _unequal(
    program: Program,
    stage: int,
    homes: list[int],
    chains: list[list[int]],
    wanted: dict[int, tuple[int, int]],
) -> Iterator[Finding]:
    """What a stage's gradient lacks, has twice, or should not have."""
    times = Counter(term for chain in chains for term in chain)
    lacks = [row for term, row in wanted.items() if term not in times]
    twice = [row for term, row in wanted.items() if times[term] > 1]
    foreign = sum(count for term, count in times.items() if term not in wanted)
    faults: list[str] = []
    if lacks:
        faults.append(f"lacks micro-batch {_rows(program.schedule, lacks)}")
    if twice:
        faults.append(f"has micro-batch {_rows(program.schedule, twice)} twice or more")
    if foreign:
        faults.append(
            f"has {foreign:,} term{'s' if foreign > 1 else ''} that unpipelined "
            "training has not"
        )
    if faults:
        yield Finding(
            "gradient",
            homes[0],
            None,
            None,
            expected="the gradient of each micro-batch, once",
            found=f"the gradient of stage {stage} {', '.join(faults)}",
            remedy="See the first finding for where it goes wrong"
            if foreign
            else "Let each micro-batch's B or W write the gradient once",
        )


def _not_reduced(stage: int, devices: Sequence[int]) -> Finding:
    where = ", ".join(map(str, devices))
    return Finding(
        "gradient",
        devices[0],
        None,
        None,
        expected=f"the sum over devices {where}, and nothing added after it",
        found=f"the gradient of stage {stage} does not end as what its REDUCE summed",
        remedy="Place the REDUCE behind the last B or W of the stage, on each of its "
        "devices",
    )


def _told(program: Program, walk: Walk, first: Difference) -> Finding:
    """The first operand that differs: what it holds, and how it came there."""
    names = walk.reference.names()
    device = int(program.device[first.instruction])
    if first.buffer < 0:
        kinds = " or ".join(kind.name.lower() for kind in first.kinds)
        found = f"{first.op} finds no {kinds} among the buffers it reads"
    else:
        buffer = program.buffer_at(first.buffer)
        holds = _holds(program, walk, first.found, names)
        found = f"{first.op} reads {buffer}, which {holds}"
        # What lies there now says nothing about a read that did not find it.
        if walk.terms.keys[first.found][0] not in ("freed", "overwritten", "unwritten"):
            found += _history(program, first.past)
    return Finding(
        "operand",
        device,
        _step(program, first.instruction),
        first.op,
        expected=names[first.expected],
        found=found,
        remedy=f"Look at instruction {first.instruction} and at what it reads; all "
        "before it is as in unpipelined training",
    )


def _holds(program: Program, walk: Walk, term: int, names: dict[int, str]) -> str:
    if term in names:
        return f"holds {names[term]}"
    match walk.terms.keys[term]:
        case ("unwritten", int(_)):
            return "nothing has written yet"
        case ("overwritten", int(_), int(other)):
            return f"{program.buffer_at(other)} has overwritten"
        case ("freed", int(_), int(by)):
            return f"{named(program, by)} has freed"
        case (("unwritten" | "overwritten" | "freed"), *_):
            raise AssertionError("a term that is matched above")
        case _:
            return "holds what unpipelined training never computes"


def _history(program: Program, past: Past | None) -> str:
    steps: list[str] = []
    while past is not None:
        index, past = past
        steps.append(named(program, index))
    if len(steps) > SHOWN:
        steps = [*steps[: SHOWN - 1], "…", steps[-1]]
    return f", from {' → '.join(reversed(steps))}" if steps else ""


def _step(program: Program, instruction: int) -> int | None:
    device, step = program.schedule.locate(int(program.first_op[instruction]))
    return step if device == int(program.device[instruction]) else None


def _rows(schedule: Schedule, rows: list[tuple[int, int]]) -> str:
    words = [f"{m}.{q}" if schedule.slices > 1 else str(m) for m, q in rows]
    if len(words) > SHOWN:
        words = [*words[:SHOWN], f"… ({len(words):,} in all)"]
    return ", ".join(words)


def _runs(numbers: list[int]) -> list[str]:
    """Numbers in words, neighbours that rise or fall by 1 as one: 0…7, 7…0."""
    words: list[str] = []
    low = 0
    while low < len(numbers):
        high = low + 1
        step = numbers[high] - numbers[low] if high < len(numbers) else 0
        while abs(step) == 1 and numbers[high : high + 1] == [numbers[high - 1] + step]:
            high += 1
        if high - low > 2:
            words.append(f"{numbers[low]}…{numbers[high - 1]}")
        else:
            high = low + 1
            words.append(str(numbers[low]))
        low = high
    return words


def _counted(peaks: Sequence[int]) -> str:
    if len(peaks) > 2 * SHOWN:
        return f"{max(peaks)} (device {peaks.index(max(peaks))})"
    return " ".join(map(str, peaks))


def _digest(program: Program) -> str:
    """Of the schedule and of every column, in little-endian int64."""
    sha = hashlib.sha256(program.schedule.digest.encode())
    streams = ((s.device, int(s.kind), s.peer) for s in program.streams)
    sha.update(repr(list(streams)).encode())
    lists = [program.waits_for, program.reads, program.writes, program.frees]
    lists.append(program.groups)
    for column in (
        program.stream,
        program.action,
        program.first_op,
        program.op_count,
        program.message,
        *(part for several in lists for part in (several.offsets, several.values)),
        program.messages,
        program.buffers,
    ):
        sha.update(np.ascontiguousarray(column, dtype="<i8").tobytes() + b"|")
    return sha.hexdigest()
