from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costs, positive_times, runs_through, schedules, sizes, times

from pipeproof.sched import (
    POLICIES,
    B,
    F,
    I,
    Kind,
    Op,
    ParameterError,
    Placement,
    R,
    Schedule,
    ScheduleError,
    W,
    catalog,
    check,
    merge_backward,
    op,
    overlap,
    recompute,
    reorder_backward,
    retime,
    split_backward,
    with_micro_batches,
)
from pipeproof.sim import Cluster, Cost, simulate


def rows(schedule: Schedule) -> list[str]:
    return [line for line in schedule.format().splitlines() if line[:6] == "device"][1:]


def test_gpipe_in_pictures() -> None:
    gpipe = catalog.make("gpipe", devices=2, micro_batches=3)

    assert rows(recompute(gpipe, "never")) == [
        "device 0 | 0F0 0F1 0F2 0B2 0B1 0B0",
        "device 1 | 1F0 1F1 1F2 1B2 1B1 1B0",
    ]
    assert rows(recompute(gpipe, "always")) == [
        "device 0 | 0F0 0F1 0F2 0R2 0B2 0R1 0B1 0R0 0B0",
        "device 1 | 1F0 1F1 1F2 1R2 1B2 1R1 1B1 1R0 1B0",
    ]
    for policy in ("except-last", "adaptive"):
        assert rows(recompute(gpipe, policy)) == [
            "device 0 | 0F0 0F1 0F2 0B2 0R1 0B1 0R0 0B0",
            "device 1 | 1F0 1F1 1F2 1B2 1R1 1B1 1R0 1B0",
        ]


def test_one_f_one_b_in_pictures() -> None:
    plain = catalog.make("1f1b", devices=2, micro_batches=3)

    assert rows(recompute(plain, "always")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0R2 0B2",
        "device 1 | 1F0 1R0 1B0 1F1 1R1 1B1 1F2 1R2 1B2",
    ]
    assert rows(recompute(plain, "except-last")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0B2",
        "device 1 | 1F0 1R0 1B0 1F1 1R1 1B1 1F2 1B2",
    ]
    assert rows(recompute(plain, "adaptive")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0R2 0B2",
        "device 1 | 1F0 1B0 1F1 1B1 1F2 1B2",
    ]


def test_goes_ahead_of_an_overlap_group() -> None:
    row = [F(0, 0), overlap(F(0, 1), B(0, 0)), B(0, 1)]

    assert rows(recompute(Schedule.of([row]), "always")) == [
        "device 0 | 0F0 0R0 (0F1&0B0) 0R1 0B1"
    ]


@given(p=sizes, m=sizes, cost=costs)
def test_peaks_are_those_of_the_docstring(p: int, m: int, cost: Cost) -> None:
    lifo = catalog.make("gpipe", devices=p, micro_batches=m)
    fifo = catalog.make("gpipe", devices=p, micro_batches=m, backward="fifo")
    peaks = {
        (name, policy): set(
            simulate(recompute(schedule, policy), cost).peak_activations
        )
        for name, schedule in {"lifo": lifo, "fifo": fifo}.items()
        for policy in POLICIES
    }

    assert peaks == {
        ("lifo", "never"): {m},
        ("lifo", "always"): {1},
        ("lifo", "except-last"): {1},
        ("lifo", "adaptive"): {1},
        ("fifo", "never"): {m},
        ("fifo", "always"): {1},
        ("fifo", "except-last"): {min(m, 2)},
        ("fifo", "adaptive"): {1},
    }


@given(p=sizes, m=sizes)
def test_adaptive_spares_the_last_stage_of_one_f_one_b(p: int, m: int) -> None:
    plain = catalog.make("1f1b", devices=p, micro_batches=m)
    again = recompute(plain, "adaptive")

    assert not (again.row(p - 1).kind == Kind.R).any()
    if m > 1:
        assert all((again.row(d).kind == Kind.R).sum() == m for d in range(p - 1))


@given(schedule=schedules(), first=st.sampled_from(POLICIES))
def test_any_schedule_stays_valid_and_the_last_policy_counts(
    schedule: Schedule, first: str
) -> None:
    for policy in POLICIES:
        again = recompute(schedule, policy)
        check(again).raise_if_bad()
        assert runs_through(again)
        assert again == recompute(again, policy)
        assert again == recompute(recompute(schedule, first), policy)  # type: ignore[arg-type]
    never = recompute(schedule, "never")
    always = recompute(schedule, "always")
    backwards = sum(op.kind in (Kind.B, Kind.I) for op in schedule.ops)

    assert not never.has(Kind.R)
    assert sum(op.kind == Kind.R for op in always.ops) == backwards


def test_says_what_it_refuses() -> None:
    plain = catalog.make("gpipe", devices=1, micro_batches=2)
    with pytest.raises(
        ParameterError,
        match="one of never, always, except-last, adaptive, got 'sometimes'",
    ):
        recompute(plain, "sometimes")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="0B0 is missing"):
        recompute(Schedule.of([[F(0, 0)]]), "always")
    for group in (overlap(R(0, 0), F(0, 1)), overlap(F(0, 1), R(0, 0))):
        inside = Schedule.of([[F(0, 0), group, B(0, 0), B(0, 1)]])
        with pytest.raises(ParameterError, match="an R inside an overlap group cannot"):
            recompute(inside, "always")


# The form of the backward


def count(schedule: Schedule) -> Counter[tuple[int, Op]]:
    """The ops of each device, in no order."""
    return Counter(zip(schedule.device_of_op.tolist(), schedule.ops))


def test_split_in_pictures() -> None:
    plain = catalog.make("1f1b", devices=2, micro_batches=2)
    split = split_backward(plain)

    assert rows(split) == [
        "device 0 | 0F0 0F1 0I0 0W0 0I1 0W1",
        "device 1 | 1F0 1I0 1W0 1F1 1I1 1W1",
    ]
    assert merge_backward(split) == plain


def test_merge_takes_only_neighbours() -> None:
    row = [F(0, 0), F(0, 1), I(0, 0), I(0, 1), W(0, 1), W(0, 0)]

    assert rows(merge_backward(Schedule.of([row]))) == [
        "device 0 | 0F0 0F1 0I0 0B1 0W0"
    ]
    grouped = [F(0, 0), F(0, 1), overlap(I(0, 0), F(0, 2)), W(0, 0), B(0, 1), B(0, 2)]
    assert merge_backward(Schedule.of([grouped])) == Schedule.of([grouped])
    at_the_seam = Schedule.of([[F(0, 0), I(0, 0)], [W(0, 0)]])
    assert merge_backward(at_the_seam) == at_the_seam


@given(schedule=schedules())
def test_split_and_merge_are_each_others_inverse(schedule: Schedule) -> None:
    merged = merge_backward(schedule)
    split = split_backward(merged)

    assert merge_backward(split) == merged
    for changed in (merged, split):
        check(changed).raise_if_bad()
        assert runs_through(changed)
    assert not split.has(Kind.B)
    halves = Counter(
        (device, op._replace(kind=kind))
        for device, op in count(merged).elements()
        for kind in ((Kind.I, Kind.W) if op.kind == Kind.B else (op.kind,))
    )
    assert count(split) == halves == count(split_backward(schedule))


@given(schedule=schedules(), policy=st.sampled_from(POLICIES))
def test_transforms_commute_with_renaming_and_keep_names(
    schedule: Schedule, policy: str
) -> None:
    for transform in (
        lambda s: recompute(s, policy),
        split_backward,
        merge_backward,
        lambda s: with_micro_batches(s, 1),
    ):
        changed = transform(schedule.renamed("mine"))
        assert changed == transform(schedule).renamed("mine")
        assert changed.name == "mine"


def test_a_whole_backward_in_a_group_cannot_be_split() -> None:
    inside = Schedule.of([[F(0, 0), overlap(F(0, 1), B(0, 0)), B(0, 1)]])

    with pytest.raises(ParameterError, match="device 0, step 2: 0B0 is inside an over"):
        split_backward(inside)


@given(p=sizes, m=sizes)
def test_gpipe_in_both_orders(p: int, m: int) -> None:
    lifo = catalog.make("gpipe", devices=p, micro_batches=m)
    fifo = catalog.make("gpipe", devices=p, micro_batches=m, backward="fifo")

    for schedule in (lifo, fifo):
        assert reorder_backward(schedule, "lifo") == lifo
        assert reorder_backward(schedule, "fifo") == fifo
    apart = reorder_backward(split_backward(lifo), "fifo")
    assert apart == split_backward(fifo)


def test_two_stages_a_device_and_two_pipes_reorder() -> None:
    chunks = Schedule.of(
        [[F(0, range(2)), F(1, range(2)), B(1, range(2)), B(0, range(2))]],
        placement=Placement.looped(1, 2),
    )
    assert rows(reorder_backward(chunks, "lifo")) == [
        "device 0 | 0F0 0F1 1F0 1F1 1B1 1B0 0B1 0B0"
    ]
    sums = op(Kind.REDUCE, range(2))
    both = Schedule.of(
        [
            [F(0, 0), F(0, 1), F(1, 2), B(1, 2), B(0, 0), B(0, 1), sums],
            [F(0, 2), F(1, 0), F(1, 1), B(1, 0), B(1, 1), B(0, 2), sums],
        ],
        placement=Placement.bidirectional(2),
        pipe_of=[0, 0, 1],
    )
    assert rows(reorder_backward(both, "lifo")) == [
        "device 0 | 0F0 0F1 1F2 1B2 0B1 0B0 0REDUCE 1REDUCE",
        "device 1 | 0F2 1F0 1F1 1B1 1B0 0B2 0REDUCE 1REDUCE",
    ]


def test_what_is_not_fill_drain_is_not_reordered() -> None:
    made = catalog.make("1f1b", devices=2, micro_batches=3)
    with pytest.raises(ParameterError, match=r"step 2: .* found 0B0 ahead of 0F2"):
        reorder_backward(made, "lifo")
    gpipe = catalog.make("gpipe", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="'lifo' or 'fifo', got 'both'"):
        reorder_backward(gpipe, "both")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="take R out, reorder"):
        reorder_backward(recompute(gpipe, "always"), "fifo")
    uneven = Schedule.of(
        [
            [F(0, 0), F(0, 1), B(0, 0), B(0, 1)],
            [F(1, 1), F(1, 0), B(1, 0), B(1, 1)],
        ]
    )
    with pytest.raises(ParameterError, match="stages 0 and 1 forward in different"):
        reorder_backward(uneven, "lifo")


# Micro-batches


@given(schedule=schedules(), m=sizes)
def test_fewer_micro_batches(schedule: Schedule, m: int) -> None:
    m = min(m, schedule.micro_batches)
    fewer = with_micro_batches(schedule, m)

    check(fewer).raise_if_bad()
    assert fewer.micro_batches == m
    for device in range(schedule.devices):
        kept = [op for op in schedule.row(device) if op.micro_batch < m]
        assert list(fewer.row(device)) == kept
    if m == schedule.micro_batches:
        assert fewer == schedule


def test_what_is_left_of_a_group_is_a_group() -> None:
    row = [
        *(F(0, 0), F(0, 1), F(0, 2)),
        overlap(B(0, 2), B(0, 1), B(0, 0)),
    ]
    stepped = Schedule.of([[*row, op(Kind.REDUCE, 0)]])

    assert rows(with_micro_batches(stepped, 2)) == [
        "device 0 | 0F0 0F1 (0B1&0B0) 0REDUCE"
    ]
    assert rows(with_micro_batches(stepped, 1)) == ["device 0 | 0F0 0B0 0REDUCE"]


@given(p=sizes, more=st.integers(2, 4), extra=st.integers(0, 9), remat=st.booleans())
def test_one_f_one_b_goes_on(p: int, more: int, extra: int, remat: bool) -> None:
    def make(m: int) -> Schedule:
        made = catalog.make("1f1b", devices=p, micro_batches=m)
        return recompute(made, "except-last") if remat else split_backward(made)

    short = make(p + more)

    assert with_micro_batches(short, p + more + extra) == make(p + more + extra)
    assert with_micro_batches(make(p + more + extra), p + more).micro_batches == (
        p + more
    )


def test_a_period_of_two_goes_on() -> None:
    def pairs(m: int) -> Schedule:
        def ops(first: int) -> list[Op]:
            f, b = (F(0, first), F(0, first + 1)), (B(0, first + 1), B(0, first))
            return [*f, *b]

        return Schedule.of([[o for i in range(0, m, 2) for o in ops(i)]])

    assert with_micro_batches(pairs(4), 10) == pairs(10)
    with pytest.raises(ParameterError, match=r"every 2 .* have 6 or 8 of them, not 7"):
        with_micro_batches(pairs(4), 7)


@given(m=sizes, schedule=schedules(slices=1))
def test_extending_is_clean_or_refused(m: int, schedule: Schedule) -> None:
    try:
        longer = with_micro_batches(schedule, schedule.micro_batches + m)
    except ParameterError:
        return
    check(longer).raise_if_bad()
    assert runs_through(longer)
    assert len(longer) * schedule.micro_batches >= len(schedule)


def test_no_steady_state_no_more_micro_batches() -> None:
    gpipe = catalog.make("gpipe", devices=3, micro_batches=8)
    with pytest.raises(ParameterError, match="no steady state repeats"):
        with_micro_batches(gpipe, 9)
    short = catalog.make("1f1b", devices=4, micro_batches=4)
    with pytest.raises(ParameterError, match="no steady state repeats"):
        with_micro_batches(short, 5)
    with pytest.raises(ParameterError, match="micro_batches must be at least 1, got 0"):
        with_micro_batches(gpipe, 0)
    two_steps = Schedule.of([[F(0, range(2)), B(0, range(2))]], steps=2)
    with pytest.raises(ParameterError, match="a schedule of one step, got 2"):
        with_micro_batches(two_steps, 3)


# Times

UNIT = dict.fromkeys((Kind.F, Kind.I, Kind.W), 1)


def cost_of(schedule: Schedule, some: dict[Kind, int | Fraction]) -> Cost:
    """The same times, as the simulator takes them."""

    def per_stage(kind: Kind) -> list[int | Fraction]:
        return [some[kind] * schedule.slices] * schedule.stages

    return Cost(
        forward=per_stage(Kind.F),
        input_grad=per_stage(Kind.I),
        weight_grad=per_stage(Kind.W),
    )


some_times = st.fixed_dictionaries(
    {Kind.F: positive_times, Kind.I: positive_times, Kind.W: times}
)


def test_weight_gradients_fill_the_gaps() -> None:
    split = split_backward(catalog.make("1f1b", devices=3, micro_batches=3))

    assert simulate(split).grid().splitlines() == [
        "device 0 | F0 F1 F2 .. .. I0 W0 .. I1 W1 .. I2 W2",
        "device 1 | .. F0 F1 .. I0 W0 F2 I1 W1 .. I2 W2 ..",
        "device 2 | .. .. F0 I0 W0 F1 I1 W1 F2 I2 W2 .. ..",
    ]
    assert simulate(retime(split, UNIT)).grid().splitlines() == [
        "device 0 | F0 F1 F2 .. .. I0 W0 I1 W1 I2 W2",
        "device 1 | .. F0 F1 F2 I0 W0 I1 W1 I2 W2 ..",
        "device 2 | .. .. F0 I0 F1 I1 F2 I2 W0 W1 W2",
    ]


@settings(max_examples=60)
@given(schedule=schedules(), some=some_times)
def test_retimed_is_never_slower(
    schedule: Schedule, some: dict[Kind, int | Fraction]
) -> None:
    timed = retime(schedule, some)
    cost = cost_of(schedule, some)

    check(timed).raise_if_bad()
    assert count(timed) == count(schedule)
    assert simulate(timed, cost).makespan <= simulate(schedule, cost).makespan
    assert timed == retime(schedule, some)


@settings(max_examples=60)
@given(
    schedule=schedules(),
    some=some_times,
    extra=st.integers(0, 4).map(lambda n: Fraction(n, 2)),
)
def test_caps_are_kept(
    schedule: Schedule, some: dict[Kind, int | Fraction], extra: Fraction
) -> None:
    cap = 1 + extra
    timed = retime(schedule, some, activations=cap)

    check(timed).raise_if_bad()
    assert count(timed) == count(schedule)
    run = simulate(timed, cost_of(schedule, some))
    assert max(run.peak_activations) <= cap


@given(p=sizes, m=sizes, latency=times)
def test_links_are_reckoned_with(p: int, m: int, latency: int | Fraction) -> None:
    plain = catalog.make("1f1b", devices=p, micro_batches=m)
    cluster = Cluster(link_latency=latency)
    timed = retime(plain, UNIT, link_latency=latency)

    assert (
        simulate(timed, cluster=cluster).makespan
        <= simulate(plain, cluster=cluster).makespan
    )


def test_replicas_reduce_and_groups_stay_together() -> None:
    both = Schedule.of(
        [
            [F(0, 0), F(1, 1), B(1, 1), B(0, 0), op(Kind.REDUCE, range(2))],
            [F(0, 1), F(1, 0), B(1, 0), B(0, 1), op(Kind.REDUCE, range(2))],
        ],
        placement=Placement.bidirectional(2),
        pipe_of=[0, 1],
    )
    timed = retime(both, UNIT | {Kind.REDUCE: 2}, activations=2)
    assert check(timed).ok
    assert count(timed) == count(both)

    grouped = Schedule.of([[F(0, 0), overlap(F(0, 1), B(0, 0)), B(0, 1)]])
    assert retime(grouped, UNIT, activations=2) == grouped
    with pytest.raises(ParameterError, match="found no order with at most 1 live"):
        retime(grouped, UNIT, activations=1)


@settings(max_examples=20)
@given(p=st.integers(1, 3), some=some_times, joint=times)
def test_joint_times_are_reckoned_with(
    p: int, some: dict[Kind, int | Fraction], joint: int | Fraction
) -> None:
    pairs = catalog.make("dualpipe-v", devices=p, micro_batches=2 * p)
    cost = replace(cost_of(pairs, some), overlap=[joint] * pairs.stages)
    timed = retime(pairs, some, overlap=joint)

    assert simulate(timed, cost).makespan <= simulate(pairs, cost).makespan


def test_an_order_that_only_joint_times_bring() -> None:
    pairs = catalog.make("dualpipe-v", devices=4, micro_batches=8)
    cost = replace(cost_of(pairs, UNIT), overlap=[0] * pairs.stages)

    spans = [
        simulate(schedule, cost).makespan
        for schedule in (pairs, retime(pairs, UNIT), retime(pairs, UNIT, overlap=0))
    ]
    assert spans == [39, 39, 38]


def test_what_cannot_be_retimed() -> None:
    plain = catalog.make("gpipe", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="times lacks B, of which there are ops"):
        retime(plain, {Kind.F: 1})
    with pytest.raises(ParameterError, match=r"times\[F\] has 3 numbers for 2 stages"):
        retime(plain, {Kind.F: [1, 2, 3], Kind.B: 2})
    with pytest.raises(ParameterError, match=r"times\[B\] must be a finite .* got -1"):
        retime(plain, {Kind.F: 1, Kind.B: -1})
    with pytest.raises(ParameterError, match="overlap has 3 numbers for 2 stages"):
        retime(plain, UNIT | {Kind.B: 2}, overlap=[1, 2, 3])
    with pytest.raises(ParameterError, match=r"times\[B\] must be a finite .* got inf"):
        retime(plain, {Kind.F: 1, Kind.B: [1, float("inf")]})
    with pytest.raises(ParameterError, match=r"keys of Kind, such as Kind\.F, got 'F'"):
        retime(plain, {"F": 1})  # type: ignore[dict-item]
    with pytest.raises(ParameterError, match=r"with at most 1/2 .* alone brings 1"):
        retime(plain, UNIT, activations=Fraction(1, 2))
    with pytest.raises(ParameterError, match="link_latency must be"):
        retime(plain, UNIT, link_latency=-1)
