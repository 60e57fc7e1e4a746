"""Activations that go to the host and come back."""

import pytest

from pipeproof.sched import Action, Schedule, UnsupportedError, lower
from pipeproof.sim import Cluster, Cost, simulate

AWAY = Schedule.parse(
    """\
devices: 1
placement: linear
micro-batches: 2

device 0 | 0F0 0OFFLOAD0 0F1 0B1 0RELOAD0 0B0
"""
)
COST = Cost(forward=4, backward=6, activation_bytes=8, input_bytes=2)


def test_copies_run_beside_the_ops() -> None:
    """8 bytes at 2 a tick: away from 4 to 8, back from 14 to 18."""
    trace = simulate(AWAY, COST, Cluster(host_bandwidth=2))

    assert trace.grid().splitlines() == [
        "device 0 | F0 -- F1 -- B1 -- -- .. .. B0 -- --"
    ]
    copies = [
        (int(start), int(end))
        for start, end, action in zip(
            trace.start, trace.end, trace.program.action, strict=True
        )
        if action == Action.COPY
    ]
    assert copies == [(4, 8), (14, 18)]


def test_what_is_away_counts_on_the_host() -> None:
    trace = simulate(AWAY, COST, Cluster(host_bandwidth=2))
    memory = trace.memory(0)

    assert trace.peak_activations == [2]  # until the copy is done
    assert memory.peak == 16
    assert max(memory.by_class["host"].tolist()) == 8
    assert memory.by_class["host"][-1] == 0
    assert memory.total[-1] == 0


def test_a_free_copy_leaves_room_for_the_next() -> None:
    assert simulate(AWAY).peak_activations == [1]


def test_split_backwards_keep_their_stash_on_the_host_too() -> None:
    schedule = Schedule.parse(
        """\
devices: 1
placement: linear
micro-batches: 1

device 0 | 0F0 0OFFLOAD0 0RELOAD0 0I0 0W0
"""
    )
    trace = simulate(schedule, Cost(activation_bytes=8, weight_grad_memory=0))

    assert max(trace.memory(0).by_class["host"].tolist()) == 8
    assert trace.memory(0).total[-1] == 0


def test_several_copies_keep_the_order_of_the_row() -> None:
    schedule = Schedule.parse(
        """\
devices: 1
placement: linear
micro-batches: 2

device 0 | 0F0 0F1 0OFFLOAD1 0OFFLOAD0 0RELOAD0 0RELOAD1 0B0 0B1
"""
    )
    program = lower(schedule)
    copies = [i.label for i in program if i.action == Action.COPY]

    assert copies == ["0OFFLOAD1", "0OFFLOAD0", "0RELOAD0", "0RELOAD1"]


def test_offloading_and_recomputing_the_same_is_refused() -> None:
    schedule = Schedule.parse(
        """\
devices: 1
placement: linear
micro-batches: 1

device 0 | 0F0 0OFFLOAD0 0RELOAD0 0R0 0B0
"""
    )
    with pytest.raises(UnsupportedError, match="both offloaded and recomputed"):
        lower(schedule)
