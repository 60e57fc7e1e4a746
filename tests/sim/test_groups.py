"""What messages in groups wait for: they start together, and end together.

Forward and backward take one tick unless it says otherwise, and a message of one
byte occupies its link for one.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costs_of_stages, positive_times, schedules, times

from pipeproof.sched import Schedule, Trace, catalog, lower
from pipeproof.sim import Cluster, Cost, simulate
from pipeproof.sim.cluster import STREAM_MODELS, StreamModel

MEGATRON: Any = {"transfers": "blocking", "receives": "late"}


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


def timed(
    schedule: Schedule, messages: Any, backward: int = 1, **cluster: Any
) -> Trace:
    cost = Cost(forward=1, backward=backward, boundary_bytes=1)
    policies = cluster.pop("policies", {})
    program = lower(schedule, messages=messages, **policies)
    return simulate(program, cost, Cluster(link_bandwidth=1, **cluster))


@pytest.mark.parametrize("streams", ["dir", "pair", "one"])
def test_an_exchange_holds_up_the_op_behind_it_until_both_are_through(
    streams: StreamModel,
) -> None:
    """1F1 has its input at 3, when 1B0 has not run yet, and then waits for its send.

    That ends at 5, and with it the group. In one stream for both directions they
    pass each other all the same.
    """
    assert timed(one_f_one_b(2, 3), "grouped", streams=streams).grid(
        1
    ).splitlines() == [
        "device 0 | F0 F1 .. .. .. B0 F2 .. B1 .. .. B2",
        "device 1 | .. .. F0 B0 .. F1 B1 .. F2 B2 .. ..",
    ]


def test_in_one_stream_messages_pass_each_other_only_in_a_group() -> None:
    """All that a device does in turn: the exchange then takes one tick, not two."""
    assert timed(one_f_one_b(2, 3), "single", streams="sync").grid(1).splitlines() == [
        "device 0 | F0 .. F1 .. .. .. .. B0 F2 .. .. .. B1 .. .. B2",
        "device 1 | .. .. .. .. F0 B0 .. F1 .. .. B1 .. F2 B2 .. ..",
    ]
    assert timed(one_f_one_b(2, 3), "grouped", streams="sync").grid(1).splitlines() == [
        "device 0 | F0 .. F1 .. .. B0 F2 .. B1 .. .. B2",
        "device 1 | .. .. F0 B0 .. F1 B1 .. F2 B2 .. ..",
    ]


def megatron(messages: Any, streams: StreamModel) -> list[str]:
    trace = timed(
        one_f_one_b(3, 5),
        messages,
        backward=2,
        policies=MEGATRON,
        streams=streams,
        buffering="rendezvous",
    )
    return trace.grid().splitlines()


def test_megatron_needs_its_groups_where_a_pair_has_one_stream() -> None:
    """1F1B without overlap; a pair of devices has one communicator, so one stream.

    Posted one by one, the two directions of an exchange come after each other, and
    a steady iteration of the device in the middle takes seven ticks in place of
    five. In groups it is as with streams of their own.
    """
    assert megatron("single", "pair") == [
        "device 0 | F0 .. F1 .. F2 .. .. .. .. .. .. .. .. B0 -- F3 .. .. .. .. B1 -- "
        "F4 .. .. .. .. B2 -- .. .. .. .. B3 -- .. .. B4 --",
        "device 1 | .. .. F0 .. F1 .. .. .. .. B0 -- .. .. F2 .. .. B1 -- .. .. F3 .. "
        ".. B2 -- .. .. F4 .. .. B3 -- .. .. B4 -- .. .. ..",
        "device 2 | .. .. .. .. F0 B0 -- .. .. F1 B1 -- .. .. .. .. F2 B2 -- .. .. .. "
        ".. F3 B3 -- .. .. .. .. F4 B4 -- .. .. .. .. .. ..",
    ]
    assert megatron("grouped", "pair") == [
        "device 0 | F0 .. F1 .. F2 .. .. .. .. .. .. B0 -- F3 .. .. B1 -- F4 .. .. B2 "
        "-- .. .. .. B3 -- .. .. B4 --",
        "device 1 | .. .. F0 .. F1 .. .. .. B0 -- .. F2 .. B1 -- .. F3 .. B2 -- .. F4 "
        ".. B3 -- .. .. B4 -- .. .. ..",
        "device 2 | .. .. .. .. F0 B0 -- .. F1 B1 -- .. .. F2 B2 -- .. .. F3 B3 -- .. "
        ".. F4 B4 -- .. .. .. .. .. ..",
    ]
    assert megatron("grouped", "pair") == megatron("single", "dir")


def test_a_gap_says_that_a_send_of_the_group_holds_it_up() -> None:
    trace = timed(one_f_one_b(2, 3), "grouped")

    assert [gap.explain(trace) for gap in trace.gaps(1)[:3]] == [
        "device 1 has nothing to do before 0F0: its activation arrives at 2 (idle 2, "
        "transit 1)",
        "device 1 waits for its own send of 1B0's gradient, which ends at 5 (idle 1)",
        "device 1 waits for its own send of 1B1's gradient, which ends at 8 (idle 1)",
    ]


@settings(max_examples=30)
@given(
    data=st.data(),
    schedule=schedules(),
    streams=st.sampled_from(STREAM_MODELS),
    buffering=st.sampled_from(["eager", "rendezvous", 1, 2]),
    latency=times,
    bandwidth=positive_times,
)
def test_a_group_starts_and_ends_as_one(
    data: st.DataObject,
    schedule: Schedule,
    streams: StreamModel,
    buffering: Any,
    latency: Any,
    bandwidth: Any,
) -> None:
    """Its receives start at one time, its sends no earlier, and what waits for one of
    it, or comes behind it on its stream, starts when all have ended.
    """
    cost = data.draw(costs_of_stages(schedule.stages))
    program = lower(schedule, messages="grouped")
    cluster = Cluster(
        link_latency=latency,
        link_bandwidth=bandwidth,
        streams=streams,
        buffering=buffering,
    )
    cost = Cost(cost.forward, cost.input_grad, cost.weight_grad, boundary_bytes=3)
    trace = simulate(program, cost, cluster)
    for group in program.groups.to_lists():
        over = max(trace.end[group].tolist())
        send, recv = sorted(group, key=lambda i: int(program.action[i]))
        assert trace.start[recv] <= trace.start[send]
        if buffering == "eager":
            assert trace.start[recv] == trace.start[send]
        behind = np.flatnonzero(np.isin(program.waits_for.values, group))
        assert len(behind)
        for after in program.waits_for.owner[behind].tolist():
            assert trace.start[after] >= over
        for member in group:
            stream = program.by_stream[program.stream[member]]
            for after in stream[stream > member].tolist():
                assert trace.start[after] >= over
