"""Bounds on the makespan that no order of the same ops beats."""

import dataclasses
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    costs_of_stages,
    policies,
    schedules,
    sizes,
    sizes_of,
    times,
)

from pipeproof.sched import (
    CATALOG,
    B,
    F,
    Kind,
    ParameterError,
    Placement,
    Schedule,
    catalog,
    lower,
    op,
    retime,
)
from pipeproof.sched.streams import STREAM_MODELS
from pipeproof.sim import Cluster, Cost, Link, bounds, lower_bound, simulate


def gpipe(p: int, m: int) -> Schedule:
    return catalog.make("gpipe", devices=p, micro_batches=m)


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


# Pictures


def test_each_bound_of_1f1b() -> None:
    """On device 0 a micro-batch lives for 12, and 4 of 8 at once: 8 · 12 / 4."""
    program = lower(one_f_one_b(4, 8))
    peaks = simulate(program).peak_activations
    found = bounds(program, max_activations=peaks)

    assert found.chain == 12
    assert found.work == (26, 27, 30, 33)
    assert found.memory == (24, 27, 30, 33)
    assert (found.largest, found.reason) == (33, "the work of device 3")
    assert found.distance(simulate(program).makespan) == 0
    assert found.distance(66) == 1


def test_naive_is_as_fast_as_its_memory_allows() -> None:
    """With one activation on device 0, micro-batches go one after the other."""
    program = lower(catalog.make("naive", devices=3, micro_batches=4))
    found = bounds(program, max_activations=[1, 4, 4])

    assert found.memory is not None
    assert found.memory[0] == simulate(program).makespan == 36
    assert found.reason == "the memory of device 0"


def test_a_cap_between_two_whole_activations_counts_as_the_lower() -> None:
    program = lower(gpipe(3, 4))

    caps = [1, Fraction(19, 10), 2]
    found = [bounds(program, max_activations=cap).memory for cap in caps]
    assert found == [(36, 27, 18), (36, 27, 18), (18, 15, 12)]


def test_bytes_bound_as_activations_do() -> None:
    program = lower(gpipe(2, 4))
    cost = Cost(activation_bytes=10, weight_bytes=100)

    assert bounds(program, cost, max_bytes=110).memory == (
        bounds(program, max_activations=1).memory
    )


def test_some_of_the_work_can_bound_more_than_all_of_it() -> None:
    """Device 0 could begin at once, but its long op waits for device 1."""
    placement = Placement(((0, 1, 0),))
    rows = [[F(0, 0), F(2, 0), B(2, 0), B(0, 0)], [F(1, 0), B(1, 0)]]
    schedule = Schedule.of(rows, placement=placement)
    cost = Cost(forward=[1, 1, 9], backward=[1, 1, 9])

    assert bounds(lower(schedule), cost).work == (22, 22)


def test_what_is_offloaded_lives_twice_and_shortly() -> None:
    """On device 0: micro-batch 0 for 2 + 3 and again for 3 + 2, 1 for 8; by 2."""
    away = [op(Kind.OFFLOAD, 0, 0), F(0, 1), op(Kind.RELOAD, 0, 0)]
    rows = [[F(0, 0), *away, B(0, 1), B(0, 0)], [F(1, [0, 1]), B(1, [1, 0])]]
    cost, cluster = Cost(forward=2, activation_bytes=3), Cluster(host_bandwidth=1)
    run = simulate(Schedule.of(rows), cost, cluster)
    found = bounds(run.program, cost, cluster, max_activations=run.peak_activations)

    assert run.peak_activations == [2, 2]
    assert found.memory == (9, 8)
    assert found.largest <= run.makespan


def test_a_reduction_is_no_message() -> None:
    """The lower bound once sent contributions to it over the slow link.

    So it was above the makespan.
    """
    placement = Placement(((0, 1), (1, 0)))
    rows = [
        [F(0, 0), F(1, 1), B(1, 1), B(0, 0), op(Kind.REDUCE, [0, 1])],
        [F(0, 1), F(1, 0), B(1, 0), B(0, 1), op(Kind.REDUCE, [0, 1])],
    ]
    schedule = Schedule.of(rows, placement=placement, micro_batches=2, pipe_of=[0, 1])
    cluster = Cluster(link_latency=10)

    run = simulate(schedule, Cost(), cluster)
    assert lower_bound(run.program, Cost(), cluster) <= run.makespan


# Laws


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    shared = draw(st.booleans())
    return Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(st.none() | st.integers(1, 4)),
        links={(0, 1): Link(latency=draw(times))},
        buffering=draw(st.sampled_from(["eager", "rendezvous", 1])),
        shared_processor=shared,
        speeds={0: draw(st.sampled_from([1, 2, Fraction(1, 2)]))},
        devices_per_node=1,
        nic_bandwidth=draw(st.none() | st.integers(1, 4)),
    )


@given(data=st.data(), schedule=schedules(), cluster=clusters())
def test_no_order_beats_the_bounds(
    data: st.DataObject, schedule: Schedule, cluster: Cluster
) -> None:
    """Also not one that takes no more memory than this one does."""
    cost = dataclasses.replace(
        data.draw(costs_of_stages(schedule.stages)),
        weight_grad_memory=data.draw(st.sampled_from([0, Fraction(1, 3), 1])),
        boundary_bytes=data.draw(st.integers(0, 3)),
        activation_bytes=data.draw(st.integers(3, 9)) * schedule.stages,
        weight_bytes=data.draw(st.integers(0, 9)),
    )
    run = simulate(lower(schedule), cost, cluster)
    found = bounds(
        run.program,
        cost,
        cluster,
        max_activations=run.peak_activations,
        max_bytes=run.peak_bytes,
    )

    assert found.largest <= run.makespan
    assert found.distance(run.makespan) >= 0
    # The work bound is at least that of every single op, and of all together.
    assert found.chain <= max(found.work)
    assert all(busy <= work for busy, work in zip(run.busy, found.work))


@pytest.mark.parametrize("name", CATALOG)
@settings(max_examples=8)
@given(data=st.data())
def test_no_catalogue_row_beats_them(name: str, data: st.DataObject) -> None:
    p, m = data.draw(sizes_of(name))
    program = lower(catalog.make(name, devices=p, micro_batches=m))
    cluster = Cluster(link_latency=data.draw(times))
    run = simulate(program, Cost(), cluster)
    found = bounds(program, Cost(), cluster, max_activations=run.peak_activations)

    assert found.largest <= run.makespan


@settings(max_examples=40)
@given(
    data=st.data(),
    schedule=schedules(),
    policy=policies,
    latency=times,
    streams=st.sampled_from(STREAM_MODELS),
    speed=st.sampled_from([1, 3]),
)
def test_no_better_order_of_the_same_ops_beats_them(
    data: st.DataObject,
    schedule: Schedule,
    policy: dict[str, Any],
    latency: Any,
    streams: Any,
    speed: int,
) -> None:
    """One made for these very times, whatever the policies and streams."""
    forward, input_grad, weight_grad = (
        data.draw(st.lists(times, min_size=schedule.stages, max_size=schedule.stages))
        for _ in range(3)
    )
    cost = Cost(forward, input_grad, weight_grad)
    cluster = Cluster(link_latency=latency, streams=streams, speeds={0: speed})
    found = bounds(lower(schedule), cost, cluster)
    timed = {Kind.F: forward, Kind.I: input_grad, Kind.W: weight_grad}
    better = retime(schedule, timed, link_latency=latency)

    run = simulate(lower(better, **policy), cost, cluster)
    assert found.largest <= run.makespan


@given(p=sizes, m=sizes)
def test_gpipe_and_1f1b_reach_the_bound(p: int, m: int) -> None:
    for schedule in (gpipe(p, m), one_f_one_b(p, m)):
        program = lower(schedule)
        assert lower_bound(program) == simulate(program).makespan == 3 * (m + p - 1)


def test_the_bound_is_below_every_order() -> None:
    """Two devices, two micro-batches: all orders of forwards and backwards."""
    cost, cluster = Cost(forward=[2, 3], backward=[5, 1]), Cluster(link_latency=1)
    bound = lower_bound(lower(gpipe(2, 2)), cost, cluster)
    makespans = []
    for first in permutations([F(0, 0), F(0, 1), B(0, 0), B(0, 1)]):
        for second in permutations([F(1, 0), F(1, 1), B(1, 0), B(1, 1)]):
            schedule = Schedule.of([first, second])
            if not schedule.report.findings:
                makespans.append(simulate(schedule, cost, cluster).makespan)

    assert len(makespans) > 10
    assert bound <= min(makespans)


@settings(max_examples=20)
@given(schedule=schedules())
def test_floats_bound_as_fractions_do(schedule: Schedule) -> None:
    cost = Cost(forward=3, input_grad=2, weight_grad=1)
    program = lower(schedule)
    exact = bounds(program, cost, max_activations=schedule.micro_batches)
    floats = dataclasses.replace(cost, forward=3.0)
    found = bounds(program, floats, max_activations=float(schedule.micro_batches))

    assert float(exact.largest) == pytest.approx(float(found.largest))


# Refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"max_activations": [1]}, "max_activations has 1 numbers for 2 devices: give"),
        (
            {"max_activations": -1},
            "max_activations must be a finite number of at least",
        ),
        ({"max_activations": True}, "or one per device, got True"),
        (
            {"max_activations": Fraction(1, 2)},
            "device 0: one buffer alone holds 1 activ",
        ),
        ({"max_bytes": 10}, "no bytes are known: give the Cost"),
    ],
)
def test_refuses_a_limit(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        bounds(lower(gpipe(2, 2)), **given_)
