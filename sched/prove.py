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
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.certificate import (
    ASSUMPTIONS,
    OF_SLICES,
    OF_STEPS,
    OF_TIES,
    SHOWN,
    Certificate,
    Chain,
    Refutation,
)
from pipeproof.sched.deadlock import Waiting, deadlocks
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.findings import Finding
from pipeproof.sched.history import told
from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import levels
from pipeproof.sched.legal import illegal, slots
from pipeproof.sched.lower import lower
from pipeproof.sched.matching import meetings, misgrouped, mismatches, ties_of
from pipeproof.sched.program import Program
from pipeproof.sched.races import races
from pipeproof.sched.tied import buffers_of, tied
from pipeproof.sched.updates import updates
from pipeproof.sched.walk import Walk


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
    if found := misgrouped(program) or illegal(program):
        return Refutation(schedule, found)
    if found := mismatches(program) or deadlocks(program):
        return Refutation(schedule, found)
    waiting = Waiting.of(program, buffering=None)
    level = levels(waiting.nodes, waiting.before, waiting.after)
    order = _order(program, waiting, level)
    if found := races(program, waiting, level, order):
        return Refutation(schedule, found)
    partners = {i: tuple(g.tolist()) for g in meetings(program) for i in g.tolist()}
    walk = Walk(program, slots(program).tolist(), partners, ties_of(program))
    walk.run(order.tolist())
    trees, findings = _gradients(program, walk)
    sums, wrong = tied(program, walk)
    findings += wrong
    findings += tuple(updates(program, walk))
    if findings:
        first = walk.difference
        found = () if first is None else (told(program, walk, first),)
        return Refutation(schedule, (*found, *findings))
    return Certificate(
        schedule,
        _digest(program),
        _assumptions(schedule),
        trees,
        tuple(walk.peaks),
        sums,
    )


def _assumptions(schedule: Schedule) -> tuple[str, ...]:
    of_slices = OF_SLICES if schedule.slices > 1 else ()
    of_steps = OF_STEPS if schedule.has(Kind.STEP) else ()
    return ASSUMPTIONS + of_slices + of_steps + (OF_TIES if schedule.ties else ())


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
    accumulators = buffers_of(program, BufferKind.GRADIENT)
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


def _rows(schedule: Schedule, rows: list[tuple[int, int]]) -> str:
    words = [f"{m}.{q}" if schedule.slices > 1 else str(m) for m, q in rows]
    if len(words) > SHOWN:
        words = [*words[:SHOWN], f"… ({len(words):,} in all)"]
    return ", ".join(words)


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
    sha.update(np.ascontiguousarray(program.buffer_skips, dtype="<i8").tobytes())
    return sha.hexdigest()
