"""Every transform of every row: what comes out is clean, proved and lowered."""

from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeproof.sched import (
    CATALOG,
    POLICIES,
    Certificate,
    Kind,
    ParameterError,
    Schedule,
    catalog,
    check,
    lower,
    merge_backward,
    prove,
    recompute,
    reorder_backward,
    retime,
    split_backward,
    with_micro_batches,
)
from pipeproof.sched.row import Case, Row
from pipeproof.sim import Cost, simulate

ROWS = [pytest.param(row, id=name) for name, row in CATALOG.items()]
SIZES = [(1, 2), (2, 4), (3, 7), (4, 3)]
MORE_SIZES = [(2, 9), (3, 6), (4, 10), (5, 3), (6, 12)]
TIMES = {Kind.F: 2, Kind.I: 3, Kind.W: 1, Kind.B: 4}

each_row = pytest.mark.parametrize("row", ROWS)


def holds_up(schedule: Schedule) -> None:
    """Clean, deadlock-free, and its gradient that of unpipelined training."""
    check(schedule).raise_if_bad()
    program = lower(schedule)
    assert check(program).ok
    assert isinstance(prove(program), Certificate)


def forms(schedule: Schedule) -> dict[str, Schedule]:
    """The schedule under each transform that needs no more than itself."""
    result = {policy: recompute(schedule, policy) for policy in POLICIES}
    result["merged"] = merge_backward(schedule)
    with suppress(ParameterError):  # a B in an overlap group
        result["split"] = split_backward(schedule)
    return result


def all_transforms(row: Row, p: int, m: int) -> None:
    schedule = row.generator(p, m)
    for form in forms(schedule).values():
        holds_up(form)
        assert not recompute(form, "never").has(Kind.R)
    for other in {1, m // 2 or 1, m + 1, m + p}:
        with suppress(ParameterError):  # no steady state, or another period
            holds_up(with_micro_batches(schedule, other))
    holds_up(with_micro_batches(schedule, max(m - 1, 1)))
    timed = retime(schedule, TIMES)
    holds_up(timed)
    cost = cost_of(schedule)
    before = simulate(schedule, cost)
    assert simulate(timed, cost).makespan <= before.makespan
    most = max(before.peak_activations)
    for cap in (most, most - Fraction(1, 2)):
        with suppress(ParameterError):  # none found
            capped = retime(schedule, TIMES, activations=cap)
            holds_up(capped)
            assert max(simulate(capped, cost).peak_activations) <= cap


@each_row
def test_all_transforms(row: Row) -> None:
    for p, m in SIZES:
        if row.allows(Case(p, m)):
            all_transforms(row, p, m)


@pytest.mark.slow
@each_row
@pytest.mark.parametrize(("p", "m"), MORE_SIZES)
def test_all_transforms_at_more_sizes(row: Row, p: int, m: int) -> None:
    if row.allows(Case(p, m)):
        all_transforms(row, p, m)


def cost_of(schedule: Schedule) -> Cost:
    """`TIMES`, as the simulator takes them: of a device's whole share."""
    each = {
        kind: [time * schedule.slices] * schedule.stages for kind, time in TIMES.items()
    }
    return Cost(each[Kind.F], each[Kind.I], each[Kind.W])


def test_what_is_away_does_not_count_under_a_cap() -> None:
    schedule = catalog.make("pipeoffload", devices=6, micro_batches=12)
    most = max(simulate(schedule, cost_of(schedule)).peak_activations)
    stays = simulate(catalog.make("interleaved", devices=6, micro_batches=12))
    timed = retime(schedule, TIMES, activations=most)

    assert most < max(stays.peak_activations)
    run = simulate(timed, cost_of(schedule))
    assert max(run.peak_activations) <= most
    assert run.makespan <= simulate(schedule, cost_of(schedule)).makespan


def test_no_cap_where_devices_keep_each_others() -> None:
    schedule = catalog.make("bpipe", devices=6, micro_batches=12)
    with pytest.raises(ParameterError, match="here devices keep each other's"):
        retime(schedule, TIMES, activations=4)


@pytest.mark.parametrize("order", ["lifo", "fifo"])
@pytest.mark.parametrize("name", ["gpipe", "looped-bfs", "terapipe"])
def test_reordered(name: str, order: str) -> None:
    schedule = catalog.make(name, devices=3, micro_batches=5)
    holds_up(reorder_backward(schedule, order))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "period"),
    [
        ("gems", lambda p: 2),
        ("chimera", lambda p: p),
        ("bpipe", lambda p: {2: 1, 4: 2, 6: 6}[p]),
        ("interleaved", lambda p: p),
        ("pipeoffload", lambda p: p),
        ("zb-v", lambda p: 1),
        ("dualpipe-v", lambda p: 1),
    ],
)
@settings(max_examples=9)
@given(half=st.integers(1, 3), times=st.integers(1, 3))
def test_what_goes_on_is_the_schedule_of_more(
    name: str, period: Callable[[int], int], half: int, times: int
) -> None:
    p = 2 * half
    short = catalog.make(name, devices=p, micro_batches=6 * p)
    more = 6 * p + period(p) * times

    assert with_micro_batches(short, more) == catalog.make(
        name, devices=p, micro_batches=more
    )


@settings(max_examples=9)
@given(half=st.integers(1, 3), times=st.integers(1, 3))
def test_dualpipe_goes_on_in_both_directions(half: int, times: int) -> None:
    """The generator numbers one direction after the other, so only times agree."""
    p, m = 2 * half, 6 * half + 4
    longer = with_micro_batches(
        catalog.make("dualpipe", devices=p, micro_batches=m), m + 2 * times
    )
    anew = catalog.make("dualpipe", devices=p, micro_batches=m + 2 * times)

    holds_up(longer)
    assert longer.pipe_of.tolist().count(1) == m // 2 + times
    assert len(longer) == len(anew)
    assert simulate(longer).spans == simulate(anew).spans
    fewer = with_micro_batches(longer, m)
    assert fewer.pipe_of.tolist() == [0] * (m // 2) + [1] * (m // 2)


def test_what_is_offloaded_is_not_recomputed() -> None:
    """`always` gave these an R too, which nothing could run."""
    schedule = catalog.make("bpipe", devices=4, micro_batches=8)
    ops = set(recompute(schedule, "always").row(0))

    away = {op.micro_batch for op in ops if op.kind == Kind.OFFLOAD}
    again = {op.micro_batch for op in ops if op.kind == Kind.R}
    assert away
    assert again == set(range(8)) - away
