"""Costs fitted from traces."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeproof.sched import (
    CATALOG,
    B,
    F,
    Kind,
    ParameterError,
    Schedule,
    Trace,
    catalog,
    lower,
    op,
    overlap,
    recompute,
)
from pipeproof.sched.trace import Timetable
from pipeproof.sched.weights import Sizes
from pipeproof.sim import Cluster, Cost, fit, simulate

SMALL = {"devices": 4, "micro_batches": 8}


@st.composite
def staged(draw: st.DrawFn, stages: int) -> Cost:
    """A number per stage for each kind, and maybe for pairs."""
    some = st.lists(
        st.integers(1, 9) | st.fractions(1, 9, max_denominator=4),
        min_size=stages,
        max_size=stages,
    )
    return Cost(
        forward=draw(some),
        input_grad=draw(some),
        weight_grad=draw(some),
        backward=draw(st.none() | some),
        recompute=draw(st.none() | some),
        overlap=draw(st.none() | some.map(lambda ns: [n + 9 for n in ns])),
    )


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from(sorted(CATALOG)), again=st.booleans())
def test_what_is_fitted_predicts_the_same(
    data: st.DataObject, name: str, again: bool
) -> None:
    schedule = catalog.make(name, **SMALL)
    if again and not np.isin(schedule.ops.kind, (Kind.OFFLOAD, Kind.RELOAD)).any():
        schedule = recompute(schedule, "except-last")
    cluster = Cluster(link_latency=data.draw(st.fractions(0, 3, max_denominator=4)))
    trace = simulate(schedule, data.draw(staged(schedule.stages)), cluster)
    found = fit(trace)
    predicted = simulate(schedule, Cost.from_trace(trace), cluster)

    assert (found.residual, set(found.residuals.values())) == (0, {0})
    assert predicted.start.tolist() == trace.start.tolist()
    assert predicted.end.tolist() == trace.end.tolist()
    assert found.link_latency in (cluster.link_latency, None)


def measured(times: list[float]) -> Trace:
    """F and B in turn, one after the other, on one device."""
    schedule = Schedule.of([[o(0, m) for m in range(len(times) // 2) for o in (F, B)]])
    program = lower(schedule)
    end = np.cumsum(times)
    sizes = Sizes(np.zeros(len(program.buffers)))
    return Trace(program, Timetable(end - times, end), "measured", sizes)


def test_slow_first_ops_do_not_matter() -> None:
    """F took 10 1 2 1 1, B took 40 10 11 10 10."""
    found = fit(measured([10.0, 40.0, 1.0, 10.0, 2.0, 11.0, 1.0, 10.0, 1.0, 10.0]))

    assert (found.cost.forward, found.cost.backward) == ((1,), (10,))
    assert found.residuals == {
        ("forward", 0): pytest.approx((9 + 1) / 5),
        ("backward", 0): pytest.approx((30 + 1) / 5),
    }
    assert found.residual == pytest.approx((10 + 31) / 96)
    assert found.link_latency is None


def test_a_cost_of_whole_backwards_does_for_split_ones() -> None:
    trace = simulate(catalog.make("1f1b", **SMALL), Cost(forward=2, backward=7))
    cost = Cost.from_trace(trace)

    assert (cost.forward, cost.backward) == ((2,) * 4, (7,) * 4)
    assert cost.input_grad == cost.weight_grad == (Fraction(7, 2),) * 4


def test_slices_take_their_part() -> None:
    schedule = catalog.make("terapipe", **SMALL, slices=4)
    trace = simulate(schedule, Cost(forward=12, backward=20))

    assert Cost.from_trace(trace).forward == (12,) * 4


def test_an_overlap_group_tells_a_joint_time() -> None:
    schedule = catalog.make("dualpipe", devices=4, micro_batches=8)
    trace = simulate(schedule, Cost(forward=4, input_grad=3, weight_grad=3, overlap=8))

    assert fit(trace).cost.overlap == (8,) * schedule.stages
    apart = simulate(schedule, Cost(forward=4, input_grad=3, weight_grad=3))
    assert fit(apart).cost.overlap is None


LOOSE = Schedule.of(
    [
        [
            F(0, 0),
            overlap(F(0, 1), op(Kind.I, 0, 0)),
            overlap(op(Kind.I, 0, 1), op(Kind.W, 0, 0)),
            op(Kind.W, 0, 1),
        ]
    ]
)
"""I runs in groups only, F and W alone too."""


def test_what_ran_only_in_groups_is_the_rest_of_them() -> None:
    trace = simulate(LOOSE, Cost(forward=2, input_grad=5, weight_grad=1))

    assert fit(trace).residual == 0
    assert Cost.from_trace(trace).input_grad == (5,)


def test_refuses_what_groups_do_not_tell() -> None:
    """F and W take 2 each alone, but only 1 together with I."""
    trace = simulate(LOOSE, Cost(forward=2, input_grad=5, weight_grad=1))
    end = np.cumsum([2, 1, 1, 2])
    hidden = replace(trace, timetable=Timetable(end - [2, 1, 1, 2], end))

    with pytest.raises(ParameterError, match="stage 0: I ran only in overlap groups"):
        fit(hidden)
