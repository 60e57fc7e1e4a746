"""The engine against a replay that walks the program's list once."""

import dataclasses
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    costs_of_stages,
    hangs,
    policies,
    positive_times,
    schedules,
    times,
)

from pipeproof.sched import (
    Action,
    B,
    F,
    I,
    Placement,
    Program,
    Schedule,
    W,
    catalog,
    lower,
    overlap,
)
from pipeproof.sched.instructions import Stream, StreamKind
from pipeproof.sched.lists import Lists
from pipeproof.sim import Cluster, Cost, DeadlockError, Link, simulate
from pipeproof.sim.cluster import STREAM_MODELS, StreamModel


def turn_of(stream: Stream, cluster: Cluster) -> object:
    """Equal for streams that are one."""
    if stream.kind == StreamKind.COMPUTE or cluster.streams == "sync":
        return None if cluster.shared_processor else stream.device
    return {
        "dir": stream,
        "pair": (stream.device, stream.peer),
        "one": (stream.device, "all"),
    }[cluster.streams]


def replay(
    program: Program, cost: Cost, cluster: Cluster
) -> tuple[list[Any], list[Any]]:
    """Every end is max(ready times) + duration, in the program's own order.

    A group is ready when all of it is, and done when all of it is. So are the TIEs
    of one tie, which take two rounds over the slowest link.
    """
    start: list[Any] = []
    end: list[Any] = []
    duration = dict(zip(program.computes.tolist(), cost.durations(program)))
    size = cost.sizes(program).bytes
    last: dict[object, list[int]] = {}
    received: dict[tuple[int, int], list[int]] = defaultdict(list)
    known: dict[int, list[Any]] = {}

    def ready_at(i: int) -> list[Any]:
        """Of all its group, before the first of them takes its turn."""
        for mate in () if i in known else (group := {i, *program.posted_with(i)}):
            known[mate] = [
                end[k]
                for other in group
                for j in (
                    *program.waits_for[other],
                    *last.get(turn_of(program[other].stream, cluster), ()),
                )
                for k in (j, *program.posted_with(j))
            ]
        return known[i]

    for i, instruction in enumerate(program):
        stream, message = instruction.stream, instruction.message
        in_turn = turn_of(stream, cluster)
        ready = [*ready_at(i)]
        takes = duration.get(i, 0)
        if takes and stream.device in cluster.speeds:
            takes = takes / Fraction(cluster.speeds[stream.device])
        if message:
            link = cluster.link(message.source, message.target)
            before = received[message.source, message.target]
        if message and instruction.action == Action.SEND:
            if cluster.buffering == "rendezvous":
                ready += ready_at(message.recv)
            elif cluster.buffering != "eager" and len(before) >= cluster.buffering:
                ready.append(end[before[-cluster.buffering]])
            if link.bandwidth:
                takes = Fraction(size[instruction.reads[0].index]) / link.bandwidth
        if instruction.action == Action.TIE:
            label = instruction.label
            all_of_it = [j for j in range(len(program)) if program[j].label == label]
            ready = [time for j in all_of_it for time in ready_at(j)]
            ready += [end[j] for j in last.get(in_turn, ()) if j in all_of_it]
            takes = 2 * summing(program, all_of_it, cost, cluster)
        start.append(max(ready, default=0))
        end.append(start[i] + takes)
        if message and instruction.action == Action.RECV:
            before.append(i)
            end[i] = max(start[i], end[message.send] + link.latency)
        last[in_turn] = [i]
    return start, end


def summing(program: Program, ties: list[int], cost: Cost, cluster: Cluster) -> Any:
    """One round: each device sends its parts one by one to all others."""
    homes = [int(program.device[i]) for i in ties]
    size = Fraction(0 if cost.tied_bytes is None else cost.tied_bytes) / len(homes)
    took: list[Any] = [0]
    for a in homes:
        for b in set(homes) - {a}:
            link = cluster.link(a, b)
            sends = size / link.bandwidth if link.bandwidth else 0
            took.append((len(homes) - 1) * sends + link.latency)
    return max(took)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    link = st.builds(Link, times, st.none() | positive_times)
    pair = st.tuples(st.integers(0, 3), st.integers(0, 3))
    streams: StreamModel = draw(st.sampled_from(STREAM_MODELS))
    shared = draw(st.booleans())
    # One stream in which a send waits for its own receive would deadlock.
    itself = shared and streams == "sync"
    buffering = ["eager", 1, 2, 3] if itself else ["eager", "rendezvous", 1, 2, 3]
    return Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(st.none() | positive_times),
        links=draw(st.dictionaries(pair, link, max_size=3)),
        buffering=draw(st.sampled_from(buffering)),
        shared_processor=shared,
        streams=streams,
        speeds=draw(st.dictionaries(st.integers(0, 3), positive_times, max_size=2)),
    )


@given(data=st.data(), schedule=schedules(), cluster=clusters(), policies=policies)
def test_equals_the_replay_exactly(
    data: st.DataObject, schedule: Schedule, cluster: Cluster, policies: dict[str, Any]
) -> None:
    cost = dataclasses.replace(
        data.draw(costs_of_stages(schedule.stages)),
        boundary_bytes=3,
        tied_bytes=5 if schedule.ties else None,
    )
    program = lower(schedule, **policies)
    assume(not hangs(program, cluster))
    run = simulate(program, cost, cluster, engine="events")

    assert (run.start.tolist(), run.end.tolist()) == replay(program, cost, cluster)


@given(schedule=schedules(), policies=policies, cluster=clusters())
def test_floats_are_those_of_the_replay_to_the_last_bit(
    schedule: Schedule, policies: dict[str, Any], cluster: Cluster
) -> None:
    cluster = dataclasses.replace(
        cluster,
        link_latency=float(cluster.link_latency) / 7,
        link_bandwidth=None,
        links={},
    )
    cost = Cost(forward=0.1, input_grad=0.7, weight_grad=1 / 3)
    program = lower(schedule, **policies)
    assume(not hangs(program, cluster))
    run = simulate(program, cost, cluster, engine="events")

    assert run.end.dtype == np.float64
    assert (run.start.tolist(), run.end.tolist()) == replay(program, cost, cluster)


@given(data=st.data(), schedule=schedules(), policies=policies)
def test_a_shared_processor_does_all_the_work_one_by_one(
    data: st.DataObject, schedule: Schedule, policies: dict[str, Any]
) -> None:
    cost = data.draw(costs_of_stages(schedule.stages))
    program = lower(schedule, **policies)
    run = simulate(program, cost, Cluster(shared_processor=True))

    assert run.makespan == sum(cost.durations(program))
    assert run.notes == ("all devices share one processor",)


def test_exact_numbers_stay_exact() -> None:
    gpipe = catalog.make("gpipe", devices=2, micro_batches=2)
    whole = simulate(gpipe, Cost(), Cluster(link_latency=2))
    parts = simulate(gpipe, Cost(forward=Fraction(1, 3)), Cluster(link_latency=2))
    mixed = simulate(gpipe, Cost(forward=0.5), Cluster(link_latency=Fraction(1, 4)))

    assert whole.end.dtype == np.int64
    assert whole.makespan == 13
    assert parts.makespan == 9 - 3 + 1 + 4
    assert parts.bubble_fraction == Fraction(11 - 14 * Fraction(1, 3), 11)
    assert mixed.end.dtype == np.float64
    assert mixed.makespan == 8.0


def grid(program: Program, cluster: Cluster, **cost: Any) -> list[str]:
    one = {"forward": 1, "input_grad": 1, "weight_grad": 0, **cost}
    return simulate(program, Cost(**one), cluster).grid(1).splitlines()


def test_blocking_transfers_hold_up_the_sender() -> None:
    """A message of 2 bytes at 1 byte per tick occupies its link for 2 ticks."""
    gpipe = catalog.make("gpipe", devices=2, micro_batches=2)
    cluster = Cluster(link_bandwidth=1)

    assert grid(lower(gpipe), cluster, boundary_bytes=2) == [
        "device 0 | F0 F1 .. .. .. .. .. .. .. B1 .. B0",
        "device 1 | .. .. .. F0 .. F1 B1 B0 .. .. .. ..",
    ]
    assert grid(lower(gpipe, transfers="blocking"), cluster, boundary_bytes=2) == [
        "device 0 | F0 .. .. F1 .. .. .. .. .. .. B1 .. .. B0",
        "device 1 | .. .. .. F0 .. .. F1 B1 .. .. B0 .. .. ..",
    ]


def test_late_receives_wait_for_the_device() -> None:
    """Under rendezvous the transfer starts when the receiver turns to it."""
    schedule = Schedule.of(
        [[F(0, 0), F(0, 1), B(0, 0), B(0, 1)], [F(1, 0), B(1, 0), F(1, 1), B(1, 1)]]
    )
    cluster = Cluster(link_bandwidth=1, buffering="rendezvous")
    early = simulate(lower(schedule), Cost(boundary_bytes=2), cluster)
    late = simulate(lower(schedule, receives="late"), Cost(boundary_bytes=2), cluster)

    assert (early.makespan, late.makespan) == (14, 15)


@pytest.mark.parametrize(
    ("buffering", "sent_at"),
    [
        ("eager", [1, 2, 3, 4]),
        (2, [1, 2, 3, 5]),
        (1, [1, 2, 5, 9]),
        ("rendezvous", [1, 5, 9, 13]),
    ],
)
def test_buffers_hold_up_sends(buffering: Any, sent_at: list[int]) -> None:
    """Device 1 is busy: each of its receives waits for the forward before."""
    schedule = Schedule.of(
        [[F(0, range(4)), B(0, range(4))], [F(1, range(4)), B(1, range(4))]]
    )
    program = lower(schedule, receives="late")
    run = simulate(program, Cost(forward=[1, 4]), Cluster(buffering=buffering))
    sends = [i for i in program if i.action == Action.SEND and i.stream.device == 0]

    assert [run.start[i.index] for i in sends] == sent_at


def test_joint_time_of_a_group() -> None:
    row = [
        *(F(0, 0), F(0, 1), I(0, 0), overlap(F(0, 2), I(0, 1), W(0, 0)), W(0, 1)),
        *(overlap(F(0, 3), B(0, 2)), B(0, 3)),
    ]
    program = lower(Schedule.of([row]))
    apart = Cost(forward=1, input_grad=2, weight_grad=3)
    together = Cost(forward=1, input_grad=2, weight_grad=3, overlap=4)

    assert apart.durations(program) == [1, 1, 2, 6, 3, 6, 5]
    assert together.durations(program) == [1, 1, 2, 4, 3, 4, 5]
    assert Cost(overlap=[7]).durations(program) == [1, 1, 1, 7, 1, 7, 2]


def test_a_share_of_a_device_costs_its_part() -> None:
    rows = [[F(0, 0), F(1, 0), F(2, 0), B(2, 0), B(1, 0), B(0, 0)], []]
    schedule = Schedule.of(
        [rows[0][:1] + rows[0][2:4] + rows[0][5:], [F(1, 0), B(1, 0)]],
        placement=Placement(((0, 1, 0),)),
    )
    program = lower(schedule)
    by_op = dict(
        zip(
            [program.label(i) for i in program.computes.tolist()],
            Cost(forward=3, input_grad=5, weight_grad=1).durations(program),
        )
    )

    assert by_op == {
        "0F0": Fraction(3, 2),
        "1F0": 3,
        "2F0": Fraction(3, 2),
        "0B0": 3,
        "1B0": 6,
        "2B0": 3,
    }
    assert Cost(forward=[1, 2, 3]).durations(program)[:3] == [1, 2, 3]


def test_names_the_cycle_of_a_deadlock() -> None:
    """Two messages sent in one order and awaited in the other, made by hand."""
    program = lower(catalog.make("gpipe", devices=2, micro_batches=1))
    labels = [instruction.label for instruction in program]
    first, gradient = labels.index("0F0"), labels.index("recv gradient 1→0:0")
    waits = [program.waits_for[i] for i in range(len(program))]
    waits[first] = [gradient]
    values = np.array([w for row in waits for w in row], dtype=np.int32)
    offsets = np.cumsum([0] + [len(row) for row in waits])
    broken = dataclasses.replace(program, waits_for=Lists(offsets, values))

    with pytest.raises(DeadlockError) as caught:
        simulate(broken)

    message = str(caught.value)
    assert message.startswith(
        "gpipe(devices=2, micro_batches=1): deadlock, 8 instructions never run: "
    )
    ring = message.split(": ", 2)[2].split(" waits for ")
    assert ring[0] == ring[-1]
    chain = [
        *("0F0 (device 0)", "recv gradient 1→0:0 (device 0)"),
        *("send gradient 1→0:0 (device 1)", "1B0 (device 1)", "1F0 (device 1)"),
        *("recv activation 0→1:0 (device 1)", "send activation 0→1:0 (device 0)"),
    ]
    at = chain.index(ring[0])
    assert ring[:-1] == chain[at:] + chain[:at]


@given(schedule=schedules(), policies=policies, k=st.integers(1, 3))
def test_no_program_deadlocks(schedule: Schedule, policies: Any, k: int) -> None:
    program = lower(schedule, **policies)
    for buffering in ("eager", "rendezvous", k):
        assert simulate(program, Cost(), Cluster(buffering=buffering)).makespan > 0


def test_progress_is_told_and_changes_nothing() -> None:
    told: list[tuple[int, int]] = []
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    cluster = Cluster(link_latency=1)

    watched = simulate(
        schedule,
        None,
        cluster,
        engine="events",
        progress=lambda *done: told.append(done),
    )

    assert watched.end.tolist() == simulate(schedule, None, cluster).end.tolist()
    assert told == [(0, 18), (18, 18)]  # 12 ops and 6 messages under way


def reductions(order_of_last: str) -> Schedule:
    """Two pipes on two devices; device 1 lists its reductions in another order."""
    return Schedule.parse(
        f"""\
devices: 2
placement: bidirectional
micro-batches: 3
pipes: 0 2 | 1

device 0 | 0F0 1F1 0F2 1B1 0B0 0B2 0REDUCE 1REDUCE
device 1 | 0F1 1F0 1B0 0B1 1F2 1B2 {order_of_last}
"""
    )


@pytest.mark.parametrize("last", ["0REDUCE 1REDUCE", "1REDUCE 0REDUCE"])
def test_devices_meet_in_their_reductions_in_one_order(last: str) -> None:
    program = lower(reductions(last))
    listed = [
        program.label(i)
        for stream, members in zip(program.streams, program.by_stream, strict=True)
        if stream.kind == StreamKind.REDUCE
        for i in members.tolist()
    ]

    assert listed[:2] == listed[2:]


def test_a_reduction_starts_when_the_last_replica_is_there() -> None:
    program = lower(reductions("0REDUCE 1REDUCE"))
    trace = simulate(program, Cost(forward=1, backward=2))
    reduced = np.flatnonzero(program.action == Action.REDUCE)

    done = [trace.end[program.by_stream[d]].max() for d in range(2)]
    assert done[0] != done[1]
    assert set(trace.start[reduced].tolist()) == {max(done)}


def test_ops_behind_a_reduction_need_not_wait_for_it() -> None:
    """Device 1 adds to stage 0 only after what device 0 does behind its REDUCE."""
    schedule = Schedule.parse(
        """\
devices: 2
placement: bidirectional
micro-batches: 2
pipes: 0 | 1

device 0 | 0F0 0B0 0REDUCE 1F1 1B1 1REDUCE
device 1 | 1F0 1B0 0F1 0B1 0REDUCE 1REDUCE
"""
    )
    trace = simulate(schedule, Cost(forward=1, backward=1))

    assert trace.grid().splitlines() == [
        "device 0 | 0F0 ... ... 0B0 1F1 1B1 ...",
        "device 1 | ... 1F0 1B0 0F1 ... ... 0B1",
    ]
