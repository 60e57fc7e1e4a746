"""BPipe: 1F1B with activations kept on a partner device."""

import inspect
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, Kind, Schedule, Trace, with_micro_batches
from pipeproof.sched.gen import bpipe, one_f_one_b
from pipeproof.sched.row import Case
from pipeproof.sched.text import words_of
from pipeproof.sim import Cluster, Cost, Link, simulate

BARS = [
    (p, m)
    for p in range(2, 17)
    for m in sorted({1, p - 1, p, p + 1, 2 * p, 3 * p + 1, 8 * p})
]


def bound(p: int) -> int:
    """ceil((p+2)/2)."""
    return -(-(p + 2) // 2)


def with_copies_of(length: Any, p: int, m: int, cost: Cost) -> Trace:
    """A run in which every copy between partners takes so long."""
    slow = Link(bandwidth=Fraction(1, length))
    away = [(d, to) for d, to in enumerate(bpipe(p, m).offload_to) if to is not None]
    links = {pair: slow for d, to in away for pair in ((d, to), (to, d))}
    weighed = replace(cost, activation_bytes=1)
    return simulate(bpipe(p, m), weighed, Cluster(links=links))


def evicted(schedule: Schedule, device: int) -> list[int]:
    row = schedule.row(device)
    return [int(m) for m in row.micro_batch[row.kind == Kind.OFFLOAD]]


def test_copies_stand_where_the_docstring_has_them() -> None:
    row = " ".join(words_of(bpipe(4, 4).row(0), short=True))

    assert row == "F0 F1 OFFLOAD1 F2 OFFLOAD2 F3 RELOAD1 B0 RELOAD2 B1 B2 B3"
    assert row in (inspect.getdoc(bpipe) or "")
    assert bpipe(4, 4).offload_to == (3, None, None, None)


def test_eight_devices_hold_the_same() -> None:
    schedule = bpipe(8, 32)

    assert simulate(one_f_one_b(8, 32)).peak_activations == [8, 7, 6, 5, 4, 3, 2, 1]
    assert simulate(schedule).peak_activations == [5, 5, 5, 5, 4, 5, 5, 5]
    assert schedule.offload_to == (7, 6, 5, *[None] * 5)
    assert [len(evicted(schedule, d)) for d in range(8)] == [16, 12, 8, *[0] * 5]


def test_ops_are_those_of_1f1b_and_short_pipelines_have_no_others() -> None:
    for p in range(1, 4):
        assert bpipe(p, 9) == one_f_one_b(p, 9)
    for d in range(7):
        row = bpipe(7, 9).row(d)
        ops = [op for op in row if op.kind in (Kind.F, Kind.B)]
        assert ops == list(one_f_one_b(7, 9).row(d))


@given(p=st.integers(1, 9), m=st.integers(1, 24), cost=costs)
def test_formulas(p: int, m: int, cost: Cost) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad

    keeps_its_formulas(CATALOG["bpipe"], Case(p, m, {}, *times))


@given(p=st.integers(2, 12), more=st.integers(1, 20))
def test_peaks_in_words(p: int, more: int) -> None:
    schedule = bpipe(p, p + more)
    expected = [p - d for d in range(p)]
    for d, partner in enumerate(schedule.offload_to):
        assert (partner is not None) == (p - d > bound(p))
        if partner is not None:
            expected[d], expected[partner] = bound(p), (p + 2) // 2

    assert simulate(schedule).peak_activations == expected


@given(
    p=st.integers(2, 8),
    m=st.integers(1, 20),
    cost=costs,
    part=st.fractions(Fraction(1, 8), 1),
)
def test_a_copy_may_last_as_long_as_the_shorter_op(
    p: int, m: int, cost: Cost, part: Fraction
) -> None:
    case = Case(p, m, {}, cost.forward, cost.input_grad, cost.weight_grad)
    run = with_copies_of(part * min(case.forward, case.backward), p, m, cost)

    assert run.makespan == simulate(one_f_one_b(p, m), cost).makespan
    assert max(run.peak_activations) <= bound(p)


def test_a_longer_copy_delays() -> None:
    cost = Cost()
    run = with_copies_of(4, 4, 8, cost)

    assert run.makespan > simulate(one_f_one_b(4, 8), cost).makespan


@given(p=st.integers(4, 16), m=st.integers(1, 60))
def test_evicts_as_seldom_as_the_bound_allows(p: int, m: int) -> None:
    """Out of any held - 2 micro-batches in turn, bound - 2 stay: no more could."""
    schedule = bpipe(p, m)
    for d in range(p):
        held = min(p - d, m)
        away = evicted(schedule, d)
        assert bool(away) == (held > bound(p))
        if not away:
            continue
        assert not {0, m - 1} & set(away)
        staying = sorted(set(range(m)) - set(away))
        for low in range(m - held + 3):
            window = [j for j in staying if low <= j < low + held - 2]
            assert bound(p) - 3 <= len(window) <= bound(p) - 2


def test_fewer_micro_batches_go_to_the_same_partners() -> None:
    shorter = with_micro_batches(bpipe(5, 9), 7)

    assert shorter.offload_to == bpipe(5, 9).offload_to == (4, None, None, None, None)
    assert simulate(shorter).peak_activations == [4, 4, 3, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("p", "m"), BARS)
def test_all_sizes(p: int, m: int) -> None:
    for times in ((1, 1, 1), (2, 3, 1), (3, 1, 2), (1, 1, 3)):
        keeps_its_formulas(CATALOG["bpipe"], Case(p, m, {}, *times))
        shorter = min(times[0], times[1] + times[2])
        run = with_copies_of(shorter, p, m, Cost(*times))
        assert run.makespan == simulate(one_f_one_b(p, m), Cost(*times)).makespan
        assert max(run.peak_activations) <= bound(p)
