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

from pipeproof.sched import (
    CATALOG,
    Kind,
    Op,
    Ops,
    Placement,
    Program,
    Schedule,
    overlap,
    with_steps,
)
from pipeproof.sched.ir import STAGE_KINDS, Skip, Tie
from pipeproof.sched.lower import POLICIES
from pipeproof.sched.row import Case
from pipeproof.sim import Cluster, Cost

sizes = st.integers(1, 6)

times = st.integers(0, 9) | st.builds(Fraction, st.integers(0, 9), st.integers(1, 6))
positive_times = times.map(lambda time: time + 1)

policies = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in POLICIES.items()}
)
"""Of lowering."""

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


def hangs(program: Program, cluster: Cluster) -> bool:
    """Whether one stream of all devices exchanges messages with itself.

    Of two groups that meet there, one would come after the other.
    """
    one = cluster.streams == "sync" and cluster.shared_processor
    return one and len(program.groups) > 0


def needs(op: Op, there: set[Op], stages: int, slices: int) -> list[Op]:
    """What must be done before an op, of the ops that are there."""
    kind, s, m, q = op

    def backward(stage: int, part: int) -> Op:
        whole = Op(Kind.B, stage, m, part)
        return whole if whole in there else Op(Kind.I, stage, m, part)

    result = [] if kind == Kind.F else [Op(Kind.F, s, m, q)]
    match kind:
        case Kind.F:
            result += [Op(Kind.F, s - 1, m, q)] if s > 0 else []
            result += [Op(Kind.F, s, m, q - 1)] if q > 0 else []
        case Kind.B | Kind.I:
            result += [Op(Kind.R, s, m, q), Op(Kind.RELOAD, s, m, q)]
            result += [backward(s + 1, q)] if s + 1 < stages else []
            result += [backward(s, q + 1)] if q + 1 < slices else []
        case Kind.W:
            result = [Op(Kind.I, s, m, q)]
        case Kind.RELOAD:
            result = [Op(Kind.OFFLOAD, s, m, q)]
        case Kind.REDUCE:
            result = [
                other
                for other in there
                if other.stage == s and other.kind in (Kind.B, Kind.W)
            ]
    return [needed for needed in result if needed in there]


Rows = list[list[list[Op]]]
"""For each device its ops in order, those of an overlap group together."""

OF_MICRO_BATCH = tuple(kind for kind in Kind if kind not in STAGE_KINDS)

BESIDE = (Kind.OFFLOAD, Kind.RELOAD, Kind.REDUCE)
"""Kinds that run beside the others; the k-th of one comes after those before."""


def rows_of(schedule: Schedule) -> Rows:
    """A schedule's rows, as `runs_through` takes them."""
    rows: Rows = []
    for device in range(schedule.devices):
        row = schedule.row(device)
        rows.append([])
        for op, joined in zip(row, row.joined.tolist()):
            if joined:
                rows[-1][-1].append(op)
            else:
                rows[-1].append([op])
    return rows


def runs_through(schedule: Schedule) -> bool:
    """Whether it is complete, and devices that run their rows in order get through."""
    rows = rows_of(schedule)
    return _complete(schedule, rows) and _gets_done(schedule, rows)


def _complete(schedule: Schedule, rows: Rows) -> bool:
    """Every op once and at home; groups of ops that compute and are independent."""
    at = Counter((d, op) for d, row in enumerate(rows) for group in row for op in group)
    pipes = schedule.placement.pipes
    for m in range(schedule.micro_batches):
        for s, d in enumerate(pipes[schedule.pipe_of[m]]):
            for q in range(schedule.slices):
                count = {k: at.pop((d, Op(k, s, m, q)), 0) for k in OF_MICRO_BATCH}
                backward = count[Kind.B], count[Kind.I], count[Kind.W]
                if count[Kind.F] != 1 or backward not in ((1, 0, 0), (0, 1, 1)):
                    return False
                away = count[Kind.OFFLOAD], count[Kind.RELOAD]
                if count[Kind.R] > 1 or away not in ((0, 0), (1, 1)):
                    return False
    for s, homes in enumerate(map(set, zip(*pipes))):
        reductions = {at.pop((d, Op(Kind.REDUCE, s, 0)), 0) for d in homes}
        if not reductions <= {0, 1} or (len(homes) > 1 and reductions != {1}):
            return False
    return not at


def _gets_done(schedule: Schedule, rows: Rows) -> bool:
    stages, slices = schedule.stages, schedule.slices
    there = {op for row in rows for group in row for op in group}
    for row in rows:
        ahead: set[Op] = set()
        own = {op for group in row for op in group}
        for group in row:
            if len(group) > 1 and any(op.kind in BESIDE for op in group):
                return False
            for op in group:  # what it needs of its own device stands before it
                if not ahead.issuperset(own & set(needs(op, there, stages, slices))):
                    return False
            ahead.update(group)
    done: set[Op] = set()
    moved = True
    while moved:
        moved = False
        for row in rows:
            waiting: set[Kind] = set()
            for group in list(row):
                kind = group[0].kind
                beside = kind in BESIDE
                needed = {n for op in group for n in needs(op, there, stages, slices)}
                if kind not in waiting and done.issuperset(needed):
                    row.remove(group)
                    moved = True
                    done.update(group)
                elif not beside:
                    break  # whatever stands behind waits for it
                else:
                    waiting.add(kind)
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
    return Schedule.of(
        rows,
        placement=placement,
        micro_batches=m,
        slices=q,
        skips=draw(some_skips(placement.stages)),
        ties=draw(some_ties(placement.stages)),
    )


def some_skips(stages: int) -> st.SearchStrategy[list[Skip]]:
    """Often none."""
    every = [(a, b) for a in range(stages) for b in range(a + 2, stages)]
    if not every:
        return st.just([])
    return st.just([]) | st.lists(st.sampled_from(every), max_size=3, unique=True)


def some_ties(stages: int) -> st.SearchStrategy[list[Tie]]:
    """Often none."""
    if stages < 2:
        return st.just([])
    group = st.sets(st.sampled_from(range(stages)), min_size=2, max_size=3)
    ties = group.map(lambda stages: tuple(sorted(stages)))
    return st.just([]) | st.lists(ties, max_size=2, unique=True)


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
def whole_language(draw: st.DrawFn) -> Schedule:
    """A valid schedule of all that can be said: pipes, slices, groups, copies.

    Any linear extension of the dependencies on any placement, one or two pipes,
    with reductions where there are replicas, some activations offloaded, and
    some independent neighbours joined in overlap groups.
    """
    first = draw(placements())
    pipes = [first.pipes[0]]
    if draw(st.booleans()):
        homes = st.integers(0, first.devices - 1)
        pipes.append(tuple(draw(homes) for _ in pipes[0]))
    m, q = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    pipe_of = [draw(st.integers(0, len(pipes) - 1)) for _ in range(m)]
    dice = draw(st.randoms(use_true_random=False))
    there: set[Op] = set()
    for stage in range(first.stages):
        if len({pipe[stage] for pipe in pipes}) > 1 or dice.random() < 0.2:
            there.add(Op(Kind.REDUCE, stage, 0))
        for micro_batch in range(m):
            for part in range(q):
                kinds = [Kind.F, *dice.choice([(Kind.B,), (Kind.I, Kind.W)])]
                kinds += dice.choice([(), (), (Kind.R,), (Kind.OFFLOAD, Kind.RELOAD)])
                there |= {Op(kind, stage, micro_batch, part) for kind in kinds}
    rows: Rows = [[] for _ in range(first.devices)]
    for op in linear_extension(there, first.stages, q, dice):
        if op.kind == Kind.REDUCE:
            for device in {pipe[op.stage] for pipe in pipes}:
                rows[device].append([op])
        else:
            rows[pipes[pipe_of[op.micro_batch]][op.stage]].append([op])
    schedule = Schedule.of(
        [[op for (op,) in row] for row in rows],
        placement=Placement(tuple(pipes)),
        micro_batches=m,
        slices=q,
        pipe_of=pipe_of if len(pipes) > 1 else None,
        offload_to=draw(places_for_offloads(first.devices)),
        skips=draw(some_skips(first.stages)),
        ties=draw(some_ties(first.stages)),
    )
    for _ in range(draw(st.integers(0, 3))):
        joined = _join_some(rows_of(schedule), dice)
        trial = schedule.with_rows(_as_ops(joined))
        schedule = trial if runs_through(trial) else schedule
    return schedule


def stepping() -> st.SearchStrategy[Schedule]:
    """Any of them, with STEPs."""
    return (schedules() | whole_language()).map(with_steps)


@st.composite
def places_for_offloads(draw: st.DrawFn, devices: int) -> list[int | None]:
    """For each device another one, or the host."""
    others = [[None, *range(d), *range(d + 1, devices)] for d in range(devices)]
    return [draw(st.sampled_from(choices)) for choices in others]


def _join_some(rows: Rows, dice: random.Random) -> Rows:
    """One group joined with the next of its row."""
    row = dice.choice([row for row in rows if row])
    at = dice.randrange(len(row))
    row[at : at + 2] = [[op for group in row[at : at + 2] for op in group]]
    return rows


def _as_ops(rows: Rows) -> list[list[Op | Ops]]:
    return [
        [overlap(*group) if len(group) > 1 else group[0] for group in row]
        for row in rows
    ]


@st.composite
def near_valid(
    draw: st.DrawFn, valid: st.SearchStrategy[Schedule] | None = None
) -> Schedule:
    """A valid schedule after one edit; a few edits leave it valid."""
    schedule = draw(schedules() if valid is None else valid)
    rows = rows_of(schedule)
    device = draw(st.sampled_from([d for d, row in enumerate(rows) if row]))
    row = rows[device]
    at = draw(st.integers(0, len(row) - 1))
    edits = ["swap", "drop", "twice", "move", "kind", "number", "join", "part"]
    match draw(st.sampled_from(edits)):
        case "swap":
            to = draw(st.integers(0, len(row) - 1))
            row[at], row[to] = row[to], row[at]
        case "drop":
            del row[at]
        case "twice":
            row.insert(draw(st.integers(0, len(row))), row[at])
        case "move":
            group = row.pop(at)
            target = rows[draw(st.integers(0, len(rows) - 1))]
            target.insert(draw(st.integers(0, len(target))), group)
        case "kind":
            kind = draw(st.sampled_from(OF_MICRO_BATCH))
            row[at] = [row[at][0]._replace(kind=kind), *row[at][1:]]
        case "number":
            named = row[at][0].kind not in STAGE_KINDS
            of_stage = ["stage", "micro_batch"]
            field = draw(st.sampled_from([*of_stage, "slice"] if named else of_stage))
            edited = row[at][0]._replace(**{field: draw(st.integers(0, 5))})
            row[at] = [edited, *row[at][1:]]
        case "join":
            row[at : at + 2] = [[op for group in row[at : at + 2] for op in group]]
        case "part":
            row[at : at + 1] = [[op] for op in row[at]]
    return schedule.with_rows(_as_ops(rows))


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
        offload_to=[draw(st.none() | numbers) for _ in range(devices)],
        skips=draw(st.lists(st.tuples(numbers, numbers), max_size=3, unique=True)),
        ties=draw(ties_of_anything(numbers)),
    )


def ties_of_anything(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[list[Tie]]:
    """Groups of different numbers."""
    group = st.sets(numbers, min_size=2, max_size=3).map(lambda g: tuple(sorted(g)))
    return st.lists(group, max_size=2, unique=True)


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
