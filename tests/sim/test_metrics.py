from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs_of_stages, schedules

from pipeproof.sched import (
    B,
    F,
    ParameterError,
    Schedule,
    Trace,
    UnsupportedError,
    catalog,
    lower,
    op,
    recompute,
)
from pipeproof.sched.ops import Kind
from pipeproof.sim import Cluster, Cost, Link, simulate

ONE_TICK = Cost(forward=1, input_grad=1, weight_grad=0)


def gpipe(p: int, m: int) -> Schedule:
    return catalog.make("gpipe", devices=p, micro_batches=m)


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


def test_every_figure_of_a_small_timetable() -> None:
    """Backward takes two ticks, links one::

    device 0 | F0 F1 .. .. .. .. B1 -- B0 --
    device 1 | .. .. F0 F1 B1 -- B0 -- .. ..
    """
    cost = Cost(forward=1, input_grad=1, weight_grad=1)
    run = simulate(gpipe(2, 2), cost, Cluster(link_latency=1))

    assert run.grid().splitlines() == [
        "device 0 | F0 F1 .. .. .. .. .. B1 -- B0 --",
        "device 1 | .. .. F0 F1 B1 -- B0 -- .. .. ..",
    ]
    assert run.makespan == 11
    assert run.busy == [6, 6]
    assert run.ideal == 6
    assert run.bubble_fraction == Fraction(2 * 11 - 12, 2 * 11)
    assert run.bubble_ratio == Fraction(5, 6)
    assert run.spans == [11, 6]
    assert run.span == 11
    assert run.span_bubble == Fraction(5, 11)
    assert run.peak_activations == [2, 2]
    assert run.peak_bytes is None
    assert run.source == "predicted"


def test_span_forgives_the_skew_between_devices() -> None:
    """Device 1 could start its next step while device 0 still ends this one."""
    schedule = Schedule.of([[F(0, 0), B(0, 0)], [F(1, 0), B(1, 0)]])
    cost = Cost(forward=[1, 4], backward=[1, 4])
    run = simulate(schedule, cost)

    assert (run.makespan, run.spans) == (10, [10, 8])
    assert run.span_bubble == 1 - Fraction(5, 10)
    assert simulate(schedule, Cost(forward=[0, 4], backward=[0, 4])).spans == [8, 8]


def test_fractions_are_kept_in_whole_parts_of_the_unit() -> None:
    """Two stages a device: every op takes half of its share of a micro-batch."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2, chunks=2)
    run = simulate(schedule)

    assert run.timetable.parts == 2
    assert run.timetable.end.dtype == np.int32
    assert run.start.tolist()[1] == Fraction(1, 2)
    assert run.end.max() == run.makespan == Fraction(int(run.timetable.end.max()), 2)
    assert simulate(one_f_one_b(2, 2)).start.dtype == np.int64


def test_a_step_that_takes_no_time() -> None:
    run = simulate(gpipe(2, 2), Cost(forward=0, input_grad=0, weight_grad=0))

    assert (run.makespan, run.bubble_fraction, run.span_bubble) == (0, 0, 0)
    assert run.grid().splitlines() == ["device 0 |", "device 1 |"]


@pytest.mark.parametrize(
    ("m", "f", "i", "w", "link", "bubble"),
    [
        (24, 18.522, 18.086, 9.337, 0.601, 0.2431),
        (32, 18.513, 18.086, 9.331, 0.626, 0.1985),
        (64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    ],
)
def test_zero_bubble_papers_1f1b(
    m: int, f: float, i: float, w: float, link: float, bubble: float
) -> None:
    """Qi et al. 2023, arXiv:2401.10241: profiled times and bubbles of 1.5B, P=8."""
    run = simulate(
        one_f_one_b(8, m),
        Cost(forward=f, input_grad=i, weight_grad=w),
        Cluster(link_latency=link),
    )

    assert round(run.span_bubble, 4) == bubble


def test_float_times_draw_the_same_grid() -> None:
    run = simulate(one_f_one_b(2, 3), Cost(forward=0.1, input_grad=0.1, weight_grad=0))

    assert run.grid().splitlines() == [
        "device 0 | F0 F1 .. B0 F2 B1 .. B2",
        "device 1 | .. F0 B0 F1 B1 F2 B2 ..",
    ]


def test_refuses_a_grid_that_cannot_be_read() -> None:
    run = simulate(gpipe(2, 2), ONE_TICK)
    with pytest.raises(ParameterError, match="tick must be above 0, got 0"):
        run.grid(0)
    with pytest.raises(ParameterError, match="60,000 columns of 1/10000 are too many"):
        run.grid(Fraction(1, 10000))


# Memory


def with_bytes(schedule: Schedule) -> Trace:
    cost = Cost(
        forward=1,
        input_grad=1,
        weight_grad=0,
        activation_bytes=100,
        boundary_bytes=10,
        weight_bytes=1000,
        gradient_bytes=1000,
        optimizer_bytes=2000,
    )
    return simulate(schedule, cost)


def test_memory_by_class_with_recomputation() -> None:
    """What lives when, device 1::

    time     0    1    2    3    4    5    6    7
    device 0 | F0 F1 .. R1 B1 R0 B0    (R1 starts before its gradient is there)
    device 1 | .. F0 F1 R1 B1 R0 B0
    """
    run = with_bytes(recompute(gpipe(2, 2), "always"))
    curve = run.memory(1)

    assert run.grid().splitlines() == [
        "device 0 | F0 F1 R1 .. .. B1 R0 B0",
        "device 1 | .. F0 F1 R1 B1 R0 B0 ..",
    ]
    assert run.peak_activations == [1, 1]
    assert run.peak_bytes == [4000 + 100 + 10, 4000 + 2 * 10 + 90 + 10]
    assert {name: max(line.tolist()) for name, line in curve.by_class.items()} == {
        "weights": 1000,
        "gradients": 1000,
        "optimizer": 2000,
        "activations": 90,
        "stored_inputs": 20,
        "weight_grad_stash": 0,
        "boundary": 20,  # input 0, and at the same time the place for input 1
        "workspace": 0,
        "host": 0,
        "offloaded": 0,
    }
    assert at(curve.time, curve.by_class["activations"]) == {
        0: 0,
        1: 0,
        2: 0,
        3: 90,
        4: 90,
        5: 90,
        6: 90,
        7: 0,
    }
    assert curve.peak == 4120
    assert curve.at_peak()["stored_inputs"] == 20
    assert run.memory().peak >= 8000


def at(time: Any, line: Any) -> dict[int, int]:
    """What is alive once all that happens at a time has happened."""
    return dict(zip(time.tolist(), line.tolist()))


def test_split_backward_leaves_a_part_for_w() -> None:
    row = [F(0, 0), op(Kind.I, 0, 0), F(0, 1), op(Kind.I, 0, 1), op(Kind.W, 0, [0, 1])]
    schedule = Schedule.of([row])
    half = Cost(weight_grad_memory=Fraction(1, 2))

    assert simulate(schedule, Cost()).peak_activations == [2]
    assert simulate(schedule, half).peak_activations == [Fraction(3, 2)]
    assert simulate(schedule, Cost(weight_grad_memory=0)).peak_activations == [1]
    assert simulate(
        schedule, Cost(activation_bytes=8, weight_grad_memory=Fraction(1, 4))
    ).peak_bytes == [10]


def test_bytes_over_each_link() -> None:
    run = with_bytes(gpipe(3, 4))

    assert run.link_bytes() == {(0, 1): 40, (1, 2): 40, (1, 0): 40, (2, 1): 40}
    with pytest.raises(ParameterError, match="no bytes are known: give the Cost"):
        simulate(gpipe(2, 2)).link_bytes()
    with pytest.raises(ParameterError, match="no bytes are known: give the Cost"):
        simulate(gpipe(2, 2)).memory()


def test_refuses_a_device_that_is_not_there() -> None:
    run = with_bytes(gpipe(2, 2))
    for ask in (run.memory, run.gaps):
        with pytest.raises(ParameterError, match="devices are 0 … 1, got 2"):
            ask(2)


def test_slices_add_up() -> None:
    rows = [[F(0, 0, [0, 1]), B(0, 0, [1, 0])], [F(1, 0, [0, 1]), B(1, 0, [1, 0])]]
    run = simulate(Schedule.of(rows), Cost(activation_bytes=100, boundary_bytes=10))

    assert run.peak_activations == [1, 1]
    assert run.link_bytes() == {(0, 1): 10, (1, 0): 10}


@given(data=st.data(), schedule=schedules(slices=1))
def test_peak_activations_are_counted_op_by_op(
    data: st.DataObject, schedule: Schedule
) -> None:
    """Rows alone decide them when weight gradients keep everything."""
    run = simulate(schedule, data.draw(costs_of_stages(schedule.stages)))
    expected = []
    for device in range(schedule.devices):
        row = list(schedule.row(device))
        again = {o[1:] for o in row if o.kind == Kind.R}
        alive = peak = 0
        for o in row:
            born = o.kind == Kind.R or (o.kind == Kind.F and o[1:] not in again)
            alive += born
            peak = max(peak, alive)
            alive -= o.kind in (Kind.B, Kind.W)
        share = len({o.stage for o in row})
        expected.append(Fraction(peak, share or 1))

    assert run.peak_activations == expected


# Refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"forward": -1}, "forward must be a finite number of at least 0, or one per"),
        ({"forward": float("nan")}, "forward must be a finite number"),
        ({"input_grad": float("inf")}, "input_grad must be a finite number"),
        ({"forward": True}, "one per stage, got True"),
        ({"forward": None}, "one per stage, got None"),
        ({"forward": "12"}, "one per stage, got '12'"),
        ({"weight_grad": [1, -2]}, "weight_grad must be .* got -2"),
        ({"weight_grad_memory": 2}, "from 0 to 1, got 2"),
        ({"weight_grad_memory": [1, 2]}, "from 0 to 1, got 2"),
        ({"weight_bytes": -5}, "weight_bytes must be a finite number"),
    ],
)
def test_refuses_a_cost(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Cost(**given_)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(latency=-1), "link latency must be a finite time of at least 0"),
        (lambda: Link(latency="1"), "of at least 0, got '1'"),
        (lambda: Link(bandwidth=0), "bandwidth must be above 0 bytes .*, got 0: None"),
        (lambda: Link(bandwidth=float("nan")), "bandwidth must be above 0 bytes"),
        (lambda: Cluster(link_latency=float("inf")), "must be a finite time"),
        (lambda: Cluster(buffering=0), "number of messages of at least 1, got 0"),
        (lambda: Cluster(buffering=True), "number of messages of at least 1, got True"),
        (lambda: Cluster(buffering="lazy"), "'rendezvous' or a number .* got 'lazy'"),
        (lambda: Cluster(links={(0, 1): 3}), r"expected a Link for \(0, 1\), got 3"),
    ],
)
def test_refuses_a_cluster(make: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make()


def test_refuses_costs_that_do_not_fit_the_schedule() -> None:
    with pytest.raises(ParameterError, match="forward has 3 numbers for 2 stages"):
        simulate(gpipe(2, 2), Cost(forward=[1, 2, 3]))
    with pytest.raises(ParameterError, match="bandwidth needs bytes to send"):
        simulate(gpipe(2, 2), Cost(), Cluster(link_bandwidth=1))
    with pytest.raises(ParameterError, match="stage 1: an input of 10 bytes exceeds"):
        simulate(gpipe(2, 2), Cost(activation_bytes=5, boundary_bytes=10))


def test_says_what_is_not_lowered_yet() -> None:
    with pytest.raises(UnsupportedError, match="of several steps can be written"):
        simulate(Schedule.of([[F(0, range(2)), B(0, range(2))]], steps=2))
    with pytest.raises(ParameterError, match="transfers must be 'overlapped' or"):
        lower(gpipe(1, 1), transfers="fast")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="receives must be 'early' or 'late'"):
        lower(gpipe(1, 1), receives="never")  # type: ignore[arg-type]


def test_a_cost_does_not_change_with_the_callers_list() -> None:
    given_ = [1, 2]
    cost = Cost(forward=given_)
    given_[0] = 9

    assert cost.forward == (1, 2)
    assert hash(cost) == hash(Cost(forward=(1, 2)))
