"""What the sums of ties take: two rounds over the slowest link, at the end."""

from fractions import Fraction

import pytest
from hypothesis import given
from strategies import costs, policies, schedules

from pipeproof.sched import (
    Action,
    ParameterError,
    Schedule,
    catalog,
    lower,
    with_steps,
)
from pipeproof.sim import Cluster, Cost, Link, simulate

TIED = catalog.make("1f1b", devices=3, micro_batches=2).with_ties([(0, 2)])


def test_the_embedding_and_the_head_are_summed_behind_the_last_backward() -> None:
    """Two devices send each other half of six bytes twice, at one a tick."""
    cost = Cost(weight_grad=0, boundary_bytes=0, tied_bytes=6)
    trace = simulate(TIED, cost, Cluster(link_bandwidth=1))
    untied = simulate(TIED.with_ties([]), Cost(weight_grad=0, boundary_bytes=0))

    assert trace.grid().splitlines()[0].rstrip(" .") == (
        untied.grid().splitlines()[0].rstrip(" .")
    )
    assert trace.makespan == untied.makespan + 6
    one, other = (i for i, it in enumerate(trace.program) if it.action == Action.TIE)
    assert trace.start[one] == trace.start[other] == untied.makespan
    assert trace.end[one] == trace.end[other] == trace.makespan


def test_the_slowest_link_and_its_latency_count_in_each_round() -> None:
    """Each of three devices sends two others a third of nine bytes, twice."""
    schedule = TIED.with_ties([(0, 1, 2)])
    slow = {(1, 2): Link(latency=5, bandwidth=Fraction(1, 2))}
    cluster = Cluster(link_bandwidth=1, link_latency=1, links=slow)
    trace = simulate(schedule, Cost(boundary_bytes=0, tied_bytes=9), cluster)
    (first, *_) = [i for i, it in enumerate(trace.program) if it.action == Action.TIE]

    assert trace.end[first] - trace.start[first] == 2 * (2 * 3 / Fraction(1, 2) + 5)


def test_steps_wait_for_the_sum_and_those_of_other_stages_do_not() -> None:
    """Device 1 has none of the tie, and steps while the others still sum."""
    cost = Cost(weight_grad=0, boundary_bytes=0, tied_bytes=6, step=1)
    trace = simulate(with_steps(TIED), cost, Cluster(link_bandwidth=1))
    program = trace.program
    ends = {program.label(i): trace.end[i] for i in range(len(program))}

    assert ends["0STEP"] == ends["2STEP"] == ends["tie 0=2"] + 1
    assert ends["tie 0=2"] == ends["0B1"] + 6
    assert ends["1STEP"] == ends["1B1"] + 1 < ends["tie 0=2"]


def test_devices_that_hold_all_stages_of_a_tie_send_nothing() -> None:
    schedule = catalog.make("chimera", devices=4, micro_batches=4)
    cost = Cost(boundary_bytes=0, tied_bytes=8)

    def taken(*tie: int) -> set:
        trace = simulate(schedule.with_ties([tie]), cost, Cluster(link_bandwidth=1))
        sums = [n for n, it in enumerate(trace.program) if it.action == Action.TIE]
        return {trace.end[n] - trace.start[n] for n in sums}

    assert taken(0, 3) == {0}
    # All four have a copy: each sends three others a quarter, twice.
    assert taken(0, 1) == {2 * 3 * 2}


def test_what_waits_and_what_is_critical_is_said() -> None:
    trace = simulate(TIED, Cost(boundary_bytes=0, tied_bytes=9), Cluster(1, 1))

    parts = trace.critical_parts.by_name()
    assert "sums of ties on device 0" in parts
    assert sum(parts.values()) == trace.makespan


@given(schedule=schedules(), cost=costs, policy=policies)
def test_a_sum_that_takes_no_time_changes_none(
    schedule: Schedule, cost: Cost, policy: dict
) -> None:
    tied, plain = (lower(s, **policy) for s in (schedule, schedule.with_ties([])))

    assert simulate(tied, cost).makespan == simulate(plain, cost).makespan
    size = len(plain)
    assert (simulate(tied, cost).end[:size] == simulate(plain, cost).end).all()


def test_it_weighs_nothing_more_than_the_gradients_do() -> None:
    known = Cost(activation_bytes=10, gradient_bytes=7)
    with_sums = Cost(activation_bytes=10, gradient_bytes=7, tied_bytes=3)

    assert simulate(TIED, with_sums).peak_bytes == simulate(TIED, known).peak_bytes


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"tied_bytes": [1, 2]}, "tied_bytes has 2 numbers for 1 ties: give one numb"),
        (
            {"skip_bytes": 3},
            r"skip_bytes is 3, and 1f1b\(devices=3, micro_batches=2\) ",
        ),
    ],
)
def test_says_how_many_there_are(cost: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        simulate(TIED, Cost(**cost))


@pytest.mark.parametrize("what", ["skip", "tie"])
def test_bytes_of_what_a_schedule_has_not_are_refused(what: str) -> None:
    """They would do nothing but switch metrics of bytes on."""
    cost = Cost(skip_bytes=0) if what == "skip" else Cost(tied_bytes=0)
    with pytest.raises(ParameterError, match=f"has no {what}s: leave it out, or give"):
        simulate(TIED.with_ties([]), cost)
