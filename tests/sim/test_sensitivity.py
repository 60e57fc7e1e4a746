"""Slack, and what less time for something buys."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costs_of_stages, policies, schedules, times

from pipeproof.sched import (
    Action,
    ParameterError,
    Program,
    Schedule,
    catalog,
    lower,
)
from pipeproof.sched.causes import Causes
from pipeproof.sim import Cluster, Cost, sensitivity, simulate, slack
from pipeproof.sim.cluster import STREAM_MODELS
from pipeproof.sim.engine import play
from pipeproof.sim.replay import all_waits
from pipeproof.sim.timing import Timing
from pipeproof.sim.waits import turns

ONE_TICK = Cost(forward=1, input_grad=1, weight_grad=0)
HALF, HUNDREDTH = Fraction(1, 2), Fraction(1, 100)


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


# Pictures


def test_what_each_stage_and_link_buys() -> None:
    """Device 1 is twice as slow: what counts is its work, and the way to it."""
    cost = Cost(forward=[1, 2], backward=[1, 2])
    found = sensitivity(one_f_one_b(2, 3), cost, Cluster(link_latency=HALF))

    assert found.makespan == 15
    assert [(g.name, g.time, g.critical, g.gain) for g in found.gains] == [
        ("stage 1 B", 6, 6, 6 * HUNDREDTH),
        ("stage 1 F", 6, 6, 6 * HUNDREDTH),
        ("stage 0 B", 3, 1, HUNDREDTH),
        ("stage 0 F", 3, 1, HUNDREDTH),
        ("link 0→1 latency", 3 * HALF, HALF, HALF * HUNDREDTH),
        ("link 1→0 latency", 3 * HALF, HALF, HALF * HUNDREDTH),
    ]


def test_by_device() -> None:
    cost = Cost(forward=[1, 2], backward=[1, 2])
    found = sensitivity(one_f_one_b(2, 3), cost, by="device")

    assert [(g.name, g.gain) for g in found.gains] == [
        ("device 1", 12 * HUNDREDTH),
        ("device 0", 2 * HUNDREDTH),
    ]


def test_of_two_longest_paths_one_alone_buys_less() -> None:
    """At latency 1, micro-batch 2 reaches device 1 just when that is free."""
    cost = Cost(forward=[1, 2], backward=[1, 2])
    found = sensitivity(one_f_one_b(2, 3), cost, Cluster(link_latency=1))

    gains = {gain.name: gain for gain in found.gains}
    latency = gains["link 0→1 latency"]
    assert (latency.critical, latency.most) == (2, 2 * HUNDREDTH)
    assert latency.gain == HUNDREDTH


def test_bandwidth() -> None:
    """A transfer of 4 at bandwidth 1, in each direction, on a chain of one."""
    cost = Cost(boundary_bytes=4)
    found = sensitivity(one_f_one_b(2, 1), cost, Cluster(link_bandwidth=1))

    gains = {gain.name: gain.gain for gain in found.gains}
    assert gains["link 0→1 transfer"] == gains["link 1→0 transfer"] == 4 * HUNDREDTH


def test_slack_of_a_small_timetable() -> None:
    """Device 1 takes up what arrives at 2 when it is free, at 7::

    device 0 | F0 F1 .. .. .. .. .. B0 .. .. .. .. .. B1
    device 1 | .. F0 -- -- B0 -- -- F1 -- -- B1 -- -- ..
    """
    cost = Cost(forward=[1, 3], backward=[1, 3])
    run = simulate(one_f_one_b(2, 2), cost)
    found = slack(run)

    assert {run.program.label(i): found[i] for i in run.program.computes.tolist()} == {
        "0F0": 0,
        "0F1": 5,
        "1F0": 0,
        "1B0": 0,
        "0B0": 5,
        "1F1": 0,
        "1B1": 0,
        "0B1": 0,
    }


# Laws


@st.composite
def cases(draw: st.DrawFn) -> tuple[Program, Cost, Cluster]:
    schedule = draw(schedules(micro_batches=3))
    program = lower(schedule, **draw(policies))
    cost = dataclasses.replace(
        draw(costs_of_stages(schedule.stages)), boundary_bytes=draw(times)
    )
    cluster = Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(st.none() | st.integers(1, 4)),
        buffering=draw(st.sampled_from(["eager", "rendezvous", 1, 2])),
        streams=draw(st.sampled_from(STREAM_MODELS)),
    )
    return program, cost, cluster


@settings(max_examples=30)
@given(
    case=cases(),
    by=st.sampled_from(["stage", "device"]),
    less=st.sampled_from([HUNDREDTH, Fraction(1, 2), 1]),
)
def test_a_gain_is_at_most_what_the_critical_path_says(
    case: tuple[Program, Cost, Cluster], by: Any, less: Any
) -> None:
    """The groups share out the makespan; none gains more than its share."""
    found = sensitivity(*case, less=less, by=by)

    assert sum(gain.critical for gain in found.gains) == found.makespan
    for gain in found.gains:
        assert 0 <= gain.gain <= gain.most == gain.critical * less
        assert gain.critical <= gain.time
    assert sum(gain.gain for gain in found.gains) <= found.makespan


@settings(max_examples=30)
@given(case=cases(), data=st.data())
def test_late_by_its_slack_costs_nothing_and_by_more_does(
    case: tuple[Program, Cost, Cluster], data: st.DataObject
) -> None:
    program, cost, cluster = case
    run = simulate(program, cost, cluster)
    left = slack(run, cluster)
    assert (left >= 0).all()
    turn = turns(program, cluster)
    path = Causes(run, (turn, all_waits(program, turn, cluster))).path()
    assert not left[path].any()

    movable = np.flatnonzero(program.action != Action.RECV).tolist()
    index = data.draw(st.sampled_from(movable))
    timing = Timing.of(program, cost, cluster, run.sizes)
    assert timing.scale is not None

    def with_delay(delay: Any) -> Any:
        durations = timing.durations.astype(object)
        durations[index] += delay * timing.scale
        late = Timing.each(durations, timing.latencies, timing.scale)
        _, end = play(program, late, cluster)
        return Fraction(max(end.tolist())) / timing.scale

    assert with_delay(left[index]) == run.makespan
    assert with_delay(left[index] + 1) == run.makespan + 1


def test_floats_have_the_same_gains() -> None:
    exact = sensitivity(one_f_one_b(3, 4), ONE_TICK, Cluster(link_latency=1))
    floats = sensitivity(
        one_f_one_b(3, 4), dataclasses.replace(ONE_TICK, forward=1.0), Cluster(1)
    )

    found = {gain.name: gain.gain for gain in floats.gains}
    for gain in exact.gains:
        assert found[gain.name] == pytest.approx(float(gain.gain))


def test_transfers_that_share_a_card_are_simulated_too() -> None:
    cluster = Cluster(
        link_bandwidth=1, nic_bandwidth=1, devices_per_node=2, link_latency=1
    )
    schedule = catalog.make("interleaved", devices=4, micro_batches=4, chunks=2)
    found = sensitivity(schedule, Cost(boundary_bytes=1), cluster)

    assert max(gain.gain for gain in found.gains) > 0


# Refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"less": 0}, "less must be a part of the time, above 0 and at most 1, got 0"),
        ({"less": 1.5}, "at most 1, got 1.5"),
        ({"less": "1 %"}, "at most 1, got '1 %'"),
        ({"by": "link"}, "by must be 'stage' or 'device', got 'link'"),
    ],
)
def test_refuses(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        sensitivity(one_f_one_b(2, 2), **given_)
