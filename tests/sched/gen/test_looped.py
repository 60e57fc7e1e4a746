"""Stage k on device k mod p: depth first and breadth first."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, sizes
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, ParameterError, Schedule, alternate, check
from pipeproof.sched.gen import interleaved, looped_bfs, one_f_one_b
from pipeproof.sched.gen.interleaved import _passes, gets_through
from pipeproof.sched.ir import B, F, Placement
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate

BARS = [
    (p, m) for p in range(2, 17) for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p})
]

each_of_them = pytest.mark.parametrize("name", ["interleaved", "looped-bfs"])


def test_two_groups_depth_first() -> None:
    run = simulate(interleaved(2, 4), Cost(1, 1, 0))

    assert run.grid().replace("...", " . ").splitlines() == [
        "device 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1  .  2B2  .  2B3"
        " 0B2 0B3",
        "device 1 |  .  1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2"
        " 1B3  . ",
    ]


def test_a_small_last_group_idles_more() -> None:
    assert simulate(interleaved(4, 10, group=4)).bubble_ratio == Fraction(19, 60)
    assert simulate(interleaved(4, 10, group=5)).bubble_ratio == Fraction(3, 20)


@given(p=sizes, v=st.integers(1, 4), groups=st.integers(1, 3), n=st.integers(0, 4))
def test_published_peak_in_chunks(p: int, v: int, groups: int, n: int) -> None:
    n += p
    m = groups * n
    run = simulate(interleaved(p, m, chunks=v, group=n))

    assert [peak * v for peak in run.peak_activations] == [
        min((v - 1) * n + 2 * (p - 1 - d) + 1, m * v) for d in range(p)
    ]


@given(p=st.integers(2, 8), v=st.integers(1, 4), cost=costs, data=st.data())
def test_one_group_of_fewer_than_devices_waits_at_each_turn(
    p: int, v: int, cost: Cost, data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, p - 1))
    case = Case(p, m, {"chunks": v}, cost.forward, cost.input_grad, cost.weight_grad)

    assert CATALOG["interleaved"].holds(case)
    keeps_its_formulas(CATALOG["interleaved"], case)
    idle = ((v - 1) * (p - m) + p - 1) * (case.forward + case.backward)
    assert CATALOG["interleaved"].idle(case) * v == idle


@given(p=sizes, m=st.integers(1, 14), v=st.integers(1, 4), n=st.none() | sizes, c=costs)
def test_formulas(p: int, m: int, v: int, n: int | None, c: Cost) -> None:
    times = c.forward, c.input_grad, c.weight_grad
    options = {"chunks": v, "group": n}

    keeps_its_formulas(CATALOG["interleaved"], Case(p, m, options, *times))
    keeps_its_formulas(CATALOG["looped-bfs"], Case(p, m, {"chunks": v}, *times))


@given(
    p=st.integers(1, 7), m=st.integers(1, 24), v=st.integers(1, 4), n=st.integers(1, 24)
)
def test_refuses_only_the_groups_that_deadlock(p: int, m: int, v: int, n: int) -> None:
    clean = check(as_published(p, m, v, n)).ok

    assert gets_through(p, m, v, n) == clean
    assert clean or (n < m and (n < p or 0 < m % n < p - 2))


def as_published(p: int, m: int, v: int, n: int) -> Schedule:
    """The published order, whether or not it gets through."""
    chunk, batch = _passes(m, v, n)
    rows = []
    for d in range(p):
        ahead = min((v - 1) * n + 2 * (p - 1 - d), m * v)
        forward = F(d + p * chunk, batch)
        backward = B(d + p * (v - 1 - chunk), batch)
        turns = alternate(forward[ahead:], backward[: m * v - ahead])
        rows.append([forward[:ahead], turns, backward[m * v - ahead :]])
    return Schedule.of(rows, placement=Placement.looped(p, v))


@given(p=sizes, m=sizes)
def test_one_chunk_breadth_first_is_gpipe(p: int, m: int) -> None:
    run = simulate(looped_bfs(p, m, chunks=1))

    assert run.makespan == simulate(one_f_one_b(p, m)).makespan
    assert run.peak_activations == [m] * p


def test_says_which_groups_would_wait_for_each_other() -> None:
    message = (
        "with groups of 5, the last of 2, 5 devices would wait for each other: give "
        "a group of at least 5 that leaves 0 or at least 3 of the 7 micro-batches "
        "over, or group=7"
    )
    with pytest.raises(ParameterError, match=message):
        interleaved(5, 7)


def test_says_which_option_is_wrong() -> None:
    with pytest.raises(ParameterError, match="chunks must be at least 1, got 0"):
        interleaved(2, 2, chunks=0)
    with pytest.raises(ParameterError, match="group must be at least 1, got 0"):
        interleaved(2, 2, group=0)
    with pytest.raises(ParameterError, match="chunks must be at least 1, got -1"):
        looped_bfs(2, 2, chunks=-1)


@pytest.mark.slow
@each_of_them
@pytest.mark.parametrize(("p", "m"), BARS)
def test_all_sizes(name: str, p: int, m: int) -> None:
    for chunks in (1, 2, 3):
        for times in ((1, 1, 1), (3, 1, 0)):
            keeps_its_formulas(CATALOG[name], Case(p, m, {"chunks": chunks}, *times))
