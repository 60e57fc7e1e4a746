"""Hypothesis strategies, and the rules of a schedule said once more, slowly.

`needs` and `runs_through` are what the tests hold `check`, `lower` and `simulate`
against: they share no code with them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from pipeproof.sched import CATALOG, Kind, Op, Ops, Placement, Schedule, overlap
from pipeproof.sched.ir import STAGE_KINDS
from pipeproof.sched.row import Case
from pipeproof.sim import Cost

sizes = st.integers(1, 6)

times = st.integers(0, 9) | st.builds(Fraction, st.integers(0, 9), st.integers(1, 6))
positive_times = times.map(lambda time: time + 1)

costs = st.builds(
    Cost, forward=positive_times, input_grad=positive_times, weight_grad=times
)


@st.composite
def costs_of_stages(draw: st.DrawFn, stages: int) -> Cost:
    """Each time one number, or one per stage."""
    some = times | st.lists(times, min_size=stages, max_size=stages)
    return Cost(
        forward=draw(some),
        input_grad=draw(some),
        weight_grad=draw(some),
        backward=draw(st.none() | some),
        recompute=draw(st.none() | some),
    )


def needs(op: Op, there: set[Op], stages: int, slices: int) -> list[Op]:
    """What must be done before an op, of the ops that are there."""
    _, s, m, q = op

    def backward(stage: int, part: int) -> Op:
        whole = Op(Kind.B, stage, m, part)
        return whole if whole in there else Op(Kind.I, stage, m, part)

    result = []
    if op.kind == Kind.F:
        result += [Op(Kind.F, s - 1, m, q)] if s > 0 else []
        result += [Op(Kind.F, s, m, q - 1)] if q > 0 else []
    elif op.kind == Kind.W:
        result = [Op(Kind.I, s, m, q)]
    else:
        result = [Op(Kind.F, s, m, q)]
        if op.kind in (Kind.B, Kind.I):
            result += [Op(Kind.R, s, m, q)]
            result += [backward(s + 1, q)] if s + 1 < stages else []
            result += [backward(s, q + 1)] if q + 1 < slices else []
    return [needed for needed in result if needed in there]


def runs_through(schedule: Schedule) -> bool:
    """Whether it is complete, and devices that run their rows in order get through."""
    rows = [list(schedule.row(device)) for device in range(schedule.devices)]
    count = Counter(op for row in rows for op in row)
    (pipe,) = schedule.placement.pipes
    for s in range(schedule.stages):
        for m in range(schedule.micro_batches):
            for q in range(schedule.slices):
                f, b, i, w, r = (
                    count.pop(Op(kind, s, m, q), 0)
                    for kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R)
                )
                if f != 1 or (b, i, w) not in ((1, 0, 0), (0, 1, 1)) or r > 1:
                    return False
    if count or any(pipe[op.stage] != d for d, row in enumerate(rows) for op in row):
        return False
    there = {op for row in rows for op in row}
    done: set[Op] = set()
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row and done.issuperset(
                needs(row[0], there, schedule.stages, schedule.slices)
            ):
                done.add(row.pop(0))
                moved = True
    return not any(rows)


@st.composite
def placements(draw: st.DrawFn, devices: int = 3) -> Placement:
    """Any map of up to five stages to devices, one pipe."""
    pipe = draw(st.lists(st.integers(0, devices - 1), min_size=1, max_size=5))
    return Placement((tuple(pipe),))


@st.composite
def schedules(
    draw: st.DrawFn, *, slices: int = 2, micro_batches: int = 4, linear: bool = False
) -> Schedule:
    """A valid schedule: any linear extension of the dependencies."""
    if linear:
        placement = Placement.linear(draw(st.integers(1, 4)))
    else:
        placement = draw(placements())
    m, q = draw(st.integers(1, micro_batches)), draw(st.integers(1, slices))
    dice = draw(st.randoms(use_true_random=False))
    split, again = (
        draw(st.sampled_from([0, 0.5, 1])),
        draw(st.sampled_from([0, 0.5, 1])),
    )
    there: set[Op] = set()
    for stage in range(placement.stages):
        for micro_batch in range(m):
            for part in range(q):
                kinds = [Kind.F]
                kinds += [Kind.I, Kind.W] if dice.random() < split else [Kind.B]
                kinds += [Kind.R] if dice.random() < again else []
                there |= {Op(kind, stage, micro_batch, part) for kind in kinds}
    rows: list[list[Op]] = [[] for _ in range(placement.devices)]
    for op in linear_extension(there, placement.stages, q, dice):
        rows[placement.pipes[0][op.stage]].append(op)
    return Schedule.of(rows, placement=placement, micro_batches=m, slices=q)


def linear_extension(
    there: set[Op], stages: int, slices: int, dice: random.Random
) -> list[Op]:
    """The ops in an order in which each comes after all it needs."""
    left = sorted(there)
    done: dict[Op, None] = {}
    while left:
        ready = [
            op
            for op in left
            if all(n in done for n in needs(op, there, stages, slices))
        ]
        op = dice.choice(ready)
        left.remove(op)
        done[op] = None
    return list(done)


@st.composite
def near_valid(draw: st.DrawFn) -> Schedule:
    """A valid schedule after one edit; a few edits leave it valid."""
    schedule = draw(schedules())
    rows = [list(schedule.row(device)) for device in range(schedule.devices)]
    device = draw(st.sampled_from([d for d, row in enumerate(rows) if row]))
    row = rows[device]
    at = draw(st.integers(0, len(row) - 1))
    match draw(st.sampled_from(["swap", "drop", "twice", "move", "kind", "number"])):
        case "swap":
            to = draw(st.integers(0, len(row) - 1))
            row[at], row[to] = row[to], row[at]
        case "drop":
            del row[at]
        case "twice":
            row.insert(draw(st.integers(0, len(row))), row[at])
        case "move":
            op = row.pop(at)
            target = rows[draw(st.integers(0, len(rows) - 1))]
            target.insert(draw(st.integers(0, len(target))), op)
        case "kind":
            kind = draw(st.sampled_from([Kind.F, Kind.B, Kind.I, Kind.W, Kind.R]))
            row[at] = row[at]._replace(kind=kind)
        case "number":
            field = draw(st.sampled_from(["stage", "micro_batch", "slice"]))
            row[at] = row[at]._replace(**{field: draw(st.integers(0, 5))})
    return schedule.with_rows(rows)


names = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1
) | st.from_regex(r"[ -~]*", fullmatch=True).map(lambda text: f"a{text}z")


@st.composite
def writable(draw: st.DrawFn) -> Schedule:
    """Anything that can be stored: any ops in any order, right or wrong."""
    devices = draw(st.integers(1, 4))
    placement = draw(
        st.sampled_from(
            [
                Placement.linear(devices),
                Placement.looped(devices, 3),
                Placement.v(devices),
                Placement.wave(devices, 2),
                Placement.bidirectional(devices),
                Placement.linear(1),
                Placement(((0,) * 4,)),
                Placement(((0, devices - 1), (devices - 1, 0), (0, 0))),
            ]
        )
    )
    m, steps = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    numbers = st.integers(0, 12) | st.just(2**31 - 1)
    pipes = len(placement.pipes)
    of_micro_batch = draw(
        st.lists(st.integers(0, pipes - 1), min_size=m * steps, max_size=m * steps)
    )
    return Schedule.of(
        [draw(rows_of_anything(numbers)) for _ in range(devices)],
        name=draw(names),
        placement=placement,
        micro_batches=m,
        slices=draw(st.integers(1, 3)),
        steps=steps,
        pipe_of=of_micro_batch if pipes > 1 else None,
    )


@st.composite
def rows_of_anything(
    draw: st.DrawFn, numbers: st.SearchStrategy[int]
) -> Sequence[Op | Ops]:
    """Ops and overlap groups of all kinds."""
    one = st.builds(Op, st.sampled_from(Kind), numbers, numbers, numbers).map(
        lambda op: op._replace(slice=0) if op.kind in STAGE_KINDS else op
    )
    group = st.lists(one, min_size=2, max_size=3).map(lambda ops: overlap(*ops))
    return draw(st.lists(one | group, max_size=6))


def sizes_of(name: str, most: int = 8) -> st.SearchStrategy[tuple[int, int]]:
    """Devices and micro-batches of which the catalogue has this schedule."""
    grid = [(p, m) for p in range(1, most // 2 + 1) for m in range(1, most + 1)]
    return st.sampled_from(
        [(p, m) for p, m in grid if CATALOG[name].allows(Case(p, m))]
    )
