"""What sends and receives wait for, and which streams are one.

Unless it says otherwise, forward and backward take one tick, and a message of one
byte occupies its link for one.
"""

import dataclasses
from fractions import Fraction
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    costs_of_stages,
    hangs,
    policies,
    positive_times,
    schedules,
    times,
)

from pipeproof.sched import Action, Program, Schedule, Trace, catalog, lower
from pipeproof.sched.exact import Number
from pipeproof.sched.lists import Lists
from pipeproof.sched.program import Stored
from pipeproof.sim import Cluster, Cost, DeadlockError, simulate
from pipeproof.sim.cluster import STREAM_MODELS, StreamModel

MEGATRON: Any = {"transfers": "blocking", "receives": "late"}
"""Without overlap: a device sends, receives and computes in turn."""


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


def timed(program: Program, link: Number = 1, **cluster: Any) -> Trace:
    cost = Cost(forward=1, backward=1, boundary_bytes=link)
    return simulate(program, cost, Cluster(link_bandwidth=1, **cluster))


def grid(program: Program, link: Number = 1, **cluster: Any) -> list[str]:
    return timed(program, link, **cluster).grid(1).splitlines()


def test_blocking_transfers_leave_a_tick_idle_at_every_exchange() -> None:
    """1F1B as Megatron runs it without overlap; backward takes two ticks.

    A device in the middle exchanges with the next one after every forward and with
    the one before after every backward: of five ticks it computes three. Those at
    the ends have one neighbour, and wait for the middle.
    """
    cost = Cost(forward=1, backward=2, boundary_bytes=1)
    program = lower(one_f_one_b(3, 5), **MEGATRON)
    blocking = simulate(
        program, cost, Cluster(link_bandwidth=1, buffering="rendezvous")
    )
    beside = simulate(one_f_one_b(3, 5), cost, Cluster(link_bandwidth=1))

    assert blocking.grid().splitlines() == [
        "device 0 | F0 .. F1 .. F2 .. .. .. .. .. .. B0 -- F3 .. .. B1 -- F4 .. .. B2 "
        "-- .. .. .. B3 -- .. .. B4 --",
        "device 1 | .. .. F0 .. F1 .. .. .. B0 -- .. F2 .. B1 -- .. F3 .. B2 -- .. F4 "
        ".. B3 -- .. .. B4 -- .. .. ..",
        "device 2 | .. .. .. .. F0 B0 -- .. F1 B1 -- .. .. F2 B2 -- .. .. F3 B3 -- .. "
        ".. F4 B4 -- .. .. .. .. .. ..",
    ]
    assert beside.grid().splitlines() == [
        "device 0 | F0 F1 F2 .. .. .. .. .. .. .. .. B0 -- F3 B1 -- F4 .. .. B2 -- .. "
        ".. .. B3 -- .. B4 --",
        "device 1 | .. .. F0 F1 .. .. .. .. B0 -- F2 B1 -- .. .. F3 B2 -- F4 .. .. B3 "
        "-- .. B4 -- .. .. ..",
        "device 2 | .. .. .. .. F0 B0 -- F1 B1 -- .. .. F2 B2 -- .. .. F3 B3 -- F4 B4 "
        "-- .. .. .. .. .. ..",
    ]


@settings(max_examples=12)
@given(
    p=st.integers(3, 5),
    more=st.integers(0, 2),
    forward=times,
    backward=times,
    link=positive_times,
)
def test_what_a_link_costs_a_steady_iteration(
    p: int, more: int, forward: Number, backward: Number, link: Number
) -> None:
    """1F1B from its 2p-th micro-batch on, for each of them:

    * blocking: F + B + 2c, as every exchange is in the device's way;
    * beside compute: F + B + 2c(p-1)/p, since F of micro-batch i+p on device 0 can
      only follow B of micro-batch i, which has crossed all p-1 links both ways.
    """
    cost = Cost(forward=forward, backward=backward, boundary_bytes=link)

    def growth(policies: Any, buffering: Any) -> Number:
        cluster = Cluster(link_bandwidth=1, buffering=buffering)
        first, then = (
            simulate(lower(one_f_one_b(p, m), **policies), cost, cluster).makespan
            for m in (2 * p + more, 3 * p + more)
        )
        return then - first

    assert growth(MEGATRON, "rendezvous") == p * (forward + backward + 2 * link)
    beside = p * (forward + backward) + 2 * (p - 1) * link
    assert growth({}, "eager") == beside


F_AND_B_IN_TURN = Schedule.parse(
    """\
devices: 2
placement: linear
micro-batches: 2

device 0 | 0F0 0F1 0B0 0B1
device 1 | 1F0 1B0 1F1 1B1
"""
)


def first_sends(trace: Trace) -> list[int]:
    """When device 0 starts to send each of its messages."""
    return [
        int(trace.start[i.index])
        for i in trace.program
        if i.action == Action.SEND and i.stream.device == 0
    ]


def test_a_receive_posted_late_holds_up_its_sender() -> None:
    """Device 1 posts its second receive once 1B0 is done, at 4.

    A transport that buffers sends at 2 all the same.
    """
    late = lower(F_AND_B_IN_TURN, receives="late")

    assert first_sends(timed(late, buffering="eager")) == [1, 2]
    assert first_sends(timed(late, buffering="rendezvous")) == [1, 4]
    assert grid(late, buffering="eager") == [
        "device 0 | F0 F1 .. .. .. B0 .. B1",
        "device 1 | .. .. F0 B0 F1 B1 .. ..",
    ]
    assert grid(late, buffering="rendezvous") == [
        "device 0 | F0 F1 .. .. .. B0 .. .. B1",
        "device 1 | .. .. F0 B0 .. F1 B1 .. ..",
    ]


def test_sends_and_receives_of_a_pair_in_one_stream() -> None:
    """Device 1 lists `recv 2` before `send gradient 1`, which so waits until 8.

    In streams of their own, the gradient sets out at 6.
    """
    program = lower(one_f_one_b(2, 3))

    assert grid(program) == [
        "device 0 | F0 F1 .. .. .. B0 F2 B1 .. .. .. B2",
        "device 1 | .. .. F0 B0 F1 B1 .. .. F2 B2 .. ..",
    ]
    for model in ("pair", "one"):  # with two devices there is one pair
        assert grid(program, streams=model) == [
            "device 0 | F0 F1 .. .. .. B0 F2 .. .. B1 .. B2",
            "device 1 | .. .. F0 B0 F1 B1 .. .. F2 B2 .. ..",
        ]


def test_all_sends_and_receives_of_a_device_in_one_stream() -> None:
    """Messages take two ticks. Device 1 sends 0's activation on at 5, not at 4.

    Its one stream is still receiving from device 0.
    """
    program = lower(catalog.make("gpipe", devices=3, micro_batches=2))

    assert grid(program, 2, streams="pair") == [
        "device 0 | F0 F1 .. .. .. .. .. .. .. .. .. .. .. .. .. B1 .. B0",
        "device 1 | .. .. .. F0 .. F1 .. .. .. .. .. .. B1 .. B0 .. .. ..",
        "device 2 | .. .. .. .. .. .. F0 .. F1 B1 B0 .. .. .. .. .. .. ..",
    ]
    assert grid(program, 2, streams="one") == [
        "device 0 | F0 F1 .. .. .. .. .. .. .. .. .. .. .. .. .. .. B1 .. .. B0",
        "device 1 | .. .. .. F0 .. F1 .. .. .. .. .. .. .. B1 .. .. B0 .. .. ..",
        "device 2 | .. .. .. .. .. .. .. F0 .. F1 B1 B0 .. .. .. .. .. .. .. ..",
    ]


def test_everything_of_a_device_in_one_stream() -> None:
    """As where each send and each receive is waited for at its place in the code."""
    assert grid(lower(one_f_one_b(2, 3)), streams="sync") == [
        "device 0 | F0 .. F1 .. .. .. .. B0 F2 .. .. .. B1 .. .. B2",
        "device 1 | .. .. .. .. F0 B0 .. F1 .. .. B1 .. F2 B2 .. ..",
    ]


REDUCED = Schedule.parse(
    """\
devices: 2
placement: bidirectional
micro-batches: 2
pipes: 0 | 1

device 0 | 0F0 0B0 0REDUCE 1F1 1B1 1REDUCE
device 1 | 1F0 1B0 0F1 0B1 0REDUCE 1REDUCE
"""
)


@pytest.mark.parametrize("model", STREAM_MODELS)
@pytest.mark.parametrize("shared", [False, True])
def test_replicas_meet_in_their_reductions_in_any_streams(
    model: StreamModel, shared: bool
) -> None:
    program = lower(REDUCED)
    trace = timed(program, streams=model, shared_processor=shared)
    met: dict[str, set[int]] = {}
    for index in np.flatnonzero(program.action == Action.REDUCE).tolist():
        met.setdefault(program.label(index), set()).add(int(trace.start[index]))

    assert {name: len(times) for name, times in met.items()} == {
        "0REDUCE": 1,
        "1REDUCE": 1,
    }


@st.composite
def runs(draw: st.DrawFn) -> tuple[Program, Cost, dict[str, Any]]:
    schedule = draw(schedules() | st.just(REDUCED))
    cluster = {
        "link_latency": draw(times),
        "link_bandwidth": draw(positive_times),
        "buffering": draw(st.sampled_from(["eager", "rendezvous", 1, 2])),
        "shared_processor": draw(st.booleans()),
    }
    assume(not MESSAGE_TO_ITSELF.items() <= cluster.items())
    cost = draw(costs_of_stages(schedule.stages))
    program = lower(schedule, **draw(policies))
    assume(not hangs(program, Cluster(streams="sync", **cluster)))
    return program, cost, cluster


MESSAGE_TO_ITSELF = {"buffering": "rendezvous", "shared_processor": True}


def test_a_rendezvous_with_itself_is_a_deadlock() -> None:
    program = lower(one_f_one_b(2, 1))

    with pytest.raises(DeadlockError) as caught:
        timed(program, streams="sync", **MESSAGE_TO_ITSELF)

    assert "send activation 0→1:0 (device 0) waits for" in str(caught.value)
    assert "recv activation 0→1:0 (device 1) waits for" in str(caught.value)


def reordered(program: Program, order: list[int]) -> Program:
    """The same instructions in another order of the list."""
    place = np.argsort(order)

    def moved(lists: Lists, *, to_instructions: bool = False) -> Lists:
        rows = [lists[index] for index in order]
        if to_instructions:
            rows = [[int(place[i]) for i in row] for row in rows]
        values = np.array([value for row in rows for value in row], dtype=np.int32)
        return Lists(np.cumsum([0] + [len(row) for row in rows]), values)

    messages = program.messages.copy()
    messages[:, 8:] = place[messages[:, 8:]]
    names = ("stream", "action", "first_op", "op_count", "message")
    return dataclasses.replace(
        program,
        waits_for=moved(program.waits_for, to_instructions=True),
        storage=Stored(
            messages,
            program.buffers,
            moved(program.reads),
            moved(program.writes),
            moved(program.frees),
        ),
        **{name: getattr(program, name)[order] for name in names},
    )


def test_two_that_send_first_hang_where_streams_are_one() -> None:
    """Each device sends to the other one, and then receives from it.

    That is how code hangs in which every rank puts a send behind its producer and
    a receive before its consumer. Streams of their own, or buffers, hide it.
    """
    program = lower(
        Schedule.parse(
            """\
devices: 2
placement: bidirectional
micro-batches: 2
pipes: 0 | 1

device 0 | 0F0 1F1 1B1 0B0 0REDUCE 1REDUCE
device 1 | 0F1 1F0 1B0 0B1 0REDUCE 1REDUCE
"""
        )
    )
    labels = [program.label(index) for index in range(len(program))]
    first = labels.index("recv activation 0→1:0")
    then = labels.index("send activation 0→1:1")
    order = [i for i in range(len(program)) if i != first]
    order.insert(order.index(then) + 1, first)
    crossing = reordered(program, order)

    for safe in ({}, {"streams": "pair", "buffering": "eager"}):
        assert timed(crossing, **{"buffering": "rendezvous", **safe}).makespan > 0
    assert timed(program, streams="pair", buffering="rendezvous").makespan > 0
    with pytest.raises(DeadlockError) as caught:
        timed(crossing, streams="pair", buffering="rendezvous")
    for hanging in (
        "send activation 0→1:0 (device 0) waits for recv activation 0→1:0 (device 1)",
        "recv activation 0→1:0 (device 1) waits for send activation 0→1:1 (device 1)",
    ):
        assert hanging in str(caught.value)


@settings(max_examples=25)
@given(run=runs(), size=times)
def test_streams_that_are_one_delay_and_never_deadlock(
    run: tuple[Program, Cost, dict[str, Any]], size: Number
) -> None:
    """Each model joins streams of the one before: no instruction is earlier."""
    program, cost, cluster = run
    cost = Cost(cost.forward, cost.input_grad, cost.weight_grad, boundary_bytes=size)
    traces = [
        simulate(program, cost, Cluster(streams=model, **cluster))
        for model in STREAM_MODELS
    ]

    for finer, coarser in pairwise(traces):
        assert (finer.start <= coarser.start).all()


@settings(max_examples=20)
@given(run=runs())
def test_one_stream_does_one_thing_at_a_time(
    run: tuple[Program, Cost, dict[str, Any]],
) -> None:
    program, cost, cluster = run
    cost = Cost(cost.forward, cost.input_grad, cost.weight_grad, boundary_bytes=1)
    trace = simulate(program, cost, Cluster(streams="sync", **cluster))

    for device in range(program.schedule.devices):
        free: Any = 0
        done: set[int] = set()
        for index in (program.device == device).nonzero()[0].tolist():
            if index in done:
                continue
            unit = [index, *program.posted_with(index)]
            assert min(trace.start[unit].tolist()) >= free
            free = max(trace.end[unit].tolist())
            done.update(unit)


def test_the_models_are_those_of_the_type() -> None:
    assert get_args(StreamModel) == STREAM_MODELS


@pytest.mark.parametrize("speed", [Fraction(1, 2), 2])
def test_a_straggler_takes_its_part_longer(speed: Number) -> None:
    """Every op of device 1 takes 1 / speed.

    Slow, device 0 waits for it; fast, it waits for device 0, which never idles.
    """
    program = lower(one_f_one_b(2, 3))
    trace = simulate(
        program, Cost(forward=1, backward=1), Cluster(speeds={1: speed, 7: 3})
    )

    assert trace.busy == [6, 6 / Fraction(speed)]
    assert trace.makespan == {Fraction(1, 2): 14, 2: 6}[speed]
