"""What skip connections cost: time on their links, bytes at their ends."""

from fractions import Fraction

import pytest
from hypothesis import given
from strategies import schedules

from pipeproof.sched import ParameterError, Schedule, catalog, lower, recompute
from pipeproof.sim import Cluster, Cost, simulate

SKIPPING = catalog.make("1f1b", devices=3, micro_batches=2).with_skips([(0, 2)])


def test_a_wide_skip_holds_up_the_last_stage() -> None:
    """Four bytes at one a tick: the second one waits for the link too."""
    cost = Cost(weight_grad=0, boundary_bytes=0, skip_bytes=4)
    trace = simulate(SKIPPING, cost, Cluster(link_bandwidth=1))

    assert trace.grid().splitlines() == [
        "device 0 | F0 F1 .. .. .. .. .. .. .. .. .. B0 .. .. .. B1",
        "device 1 | .. F0 F1 .. .. .. .. B0 .. .. .. B1 .. .. .. ..",
        "device 2 | .. .. .. .. .. F0 B0 .. .. F1 B1 .. .. .. .. ..",
    ]


def test_it_takes_no_room_between() -> None:
    """At both ends it does: until it is sent, and until the backward has used it."""
    kept = {"never": [0, 0, 14], "always": [0, 0, 4]}
    for policy, at_last in kept.items():
        schedule = recompute(SKIPPING, policy)
        cost = Cost(activation_bytes=[10, 10, 14], skip_bytes=4)
        free = Cost(activation_bytes=10)
        with_skip, without = simulate(schedule, cost), simulate(schedule, free)

        assert with_skip.peak_bytes[1] == without.peak_bytes[1]
        assert with_skip.peak_bytes[0] > without.peak_bytes[0]
        memory = with_skip.memory(2).by_class
        name = "activations" if policy == "never" else "stored_inputs"
        assert max(memory[name].tolist()) == at_last[2]


@given(schedule=schedules())
def test_a_skip_that_weighs_nothing_costs_nothing(schedule: Schedule) -> None:
    """And one number for all is that number for each."""
    cost = Cost(forward=2, input_grad=3, activation_bytes=60, boundary_bytes=6)
    each = Cost(
        forward=2,
        input_grad=3,
        activation_bytes=60,
        boundary_bytes=6,
        skip_bytes=[0] * len(schedule.skips),
    )
    trace, same = simulate(schedule, cost), simulate(schedule, each)

    assert trace.makespan == simulate(schedule.with_skips([]), cost).makespan
    assert same.peak_bytes == trace.peak_bytes


def test_slices_take_their_part() -> None:
    schedule = catalog.make("terapipe", devices=3, micro_batches=2, slices=2)
    program = lower(schedule.with_skips([(0, 2)]))
    sizes = Cost(activation_bytes=3, skip_bytes=3).sizes(program).known_bytes()
    weights = sizes[program.buffer_skips >= 0].tolist()

    # What leaves and arrives, and the gradients that arrive and leave.
    assert weights == [Fraction(3, 2)] * (4 * 2 * 2)


def test_says_how_many_there_are() -> None:
    with pytest.raises(
        ParameterError, match="skip_bytes has 2 numbers for 1 skips: give one number"
    ):
        simulate(SKIPPING, Cost(skip_bytes=[1, 2]))


def test_what_arrives_is_part_of_what_is_kept() -> None:
    with pytest.raises(
        ParameterError, match="stage 2: an input of 4 bytes exceeds the 3 activation"
    ):
        simulate(SKIPPING, Cost(activation_bytes=3, skip_bytes=4))
