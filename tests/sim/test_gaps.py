"""Why devices idle, and what runs on the critical path."""

import dataclasses
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs_of_stages, policies, schedules, times

from pipeproof.sched import (
    Action,
    B,
    F,
    Kind,
    ParameterError,
    Placement,
    Schedule,
    Trace,
    catalog,
    lower,
    op,
)
from pipeproof.sched.causes import Why
from pipeproof.sched.gaps import Cause, Gap
from pipeproof.sched.parts import scale_of
from pipeproof.sched.trace import Timetable
from pipeproof.sim import Cluster, Cost, Link, simulate
from pipeproof.sim.cluster import STREAM_MODELS

ONE_TICK = Cost(forward=1, input_grad=1, weight_grad=0)


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


def gpipe(p: int, m: int) -> Schedule:
    return catalog.make("gpipe", devices=p, micro_batches=m)


def sentences(run: Trace, device: int | None = None) -> list[str]:
    return [gap.explain(run) for gap in run.gaps(device)]


# Pictures


def test_two_devices_with_links() -> None:
    """Each of the gaps, in a sentence::

    device 0 | F0 F1 .. .. .. B0 -- F2 .. .. B1 -- .. .. B2 --
    """
    run = simulate(one_f_one_b(2, 3), Cost(), Cluster(link_latency=Fraction(1, 2)))

    assert sentences(run) == [
        "device 0 waits for 1B0: its gradient arrives at 5 (idle 3, transit 0.5)",
        "device 0 waits for 1B2: its gradient arrives at 12 (idle 2, transit 0.5)",
        "device 1 has nothing to do before 0F0: its activation arrives at 1.5 "
        "(idle 1.5, transit 0.5)",
        "device 1 waits for 0F2: its activation arrives at 8.5 (idle 1, transit 0.5)",
        "device 1 has no more work: the step ends with 0B2 on device 0 at 14 "
        "(idle 2.5)",
    ]
    assert run.gaps().summaries() == [
        "device 0: 5 idle: 5 waits for gradients of stage 1",
        "device 1: 5 idle: 2.5 drain, 1.5 fill, 1 waits for activations of stage 0",
    ]
    assert run.gaps().blame() == [
        {"stage 1": 4, "link 1→0 latency": 1},
        {
            "stage 0": Fraction(7, 2),
            "link 0→1 latency": 1,
            "link 1→0 latency": Fraction(1, 2),
        },
    ]


def test_four_devices_with_links() -> None:
    run = simulate(one_f_one_b(4, 8), Cost(), Cluster(link_latency=Fraction(1, 2)))

    assert run.makespan == 41
    assert run.gaps().summaries() == [
        "device 0: 17 idle: 17 waits for gradients of stage 1",
        "device 1: 17 idle: 12 waits for gradients of stage 2, 2.5 drain, 1.5 fill, "
        "1 waits for activations of stage 0",
        "device 2: 17 idle: 6 waits for gradients of stage 3, 5 drain, 3 fill, "
        "3 waits for activations of stage 1",
        "device 3: 17 idle: 7.5 drain, 5 waits for activations of stage 2, 4.5 fill",
    ]
    assert [run.gaps()[i].explain(run) for i in run.gaps().longest(2)] == [
        "device 0 waits for 1B0: its gradient arrives at 13 (idle 9, transit 0.5)",
        "device 3 has no more work: the step ends with 0B7 on device 0 at 41 "
        "(idle 7.5)",
    ]


def test_the_parts_of_a_gap() -> None:
    """Device 0 idles from 4 to 13: down to stage 3, and up again."""
    run = simulate(one_f_one_b(4, 8), Cost(), Cluster(link_latency=Fraction(1, 2)))
    parts = run.gaps().parts
    first = parts.of == 0

    names, which = parts.names(kinds=True)
    assert [names[i] for i in which[first]] == [
        *("link 1→0 latency", "stage 1 B", "link 2→1 latency", "stage 2 B"),
        *("link 3→2 latency", "stage 3 B", "stage 3 F", "link 2→3 latency"),
    ]
    assert next(iter(parts.end[first])) == 13
    assert list(parts.start[first])[-1] == 4


def test_what_the_critical_path_spends_its_time_in() -> None:
    run = simulate(one_f_one_b(2, 2), ONE_TICK, Cluster(link_latency=1))

    assert run.critical_parts.by_name(kinds=True) == {
        "stage 1 B": 2,
        "stage 1 F": 2,
        "link 0→1 latency": 1,
        "link 1→0 latency": 1,
        "stage 0 B": 1,
        "stage 0 F": 1,
    }
    assert run.critical_parts.by_name() == {
        "stage 1": 4,
        "stage 0": 2,
        "link 0→1 latency": 1,
        "link 1→0 latency": 1,
    }


# Each cause


def test_a_send_that_blocks() -> None:
    program = lower(gpipe(2, 2), transfers="blocking")
    run = simulate(program, Cost(boundary_bytes=2), Cluster(link_bandwidth=1))

    assert sentences(run, 0)[0] == (
        "device 0 waits for its own send of 0F0's activation, which ends at 3 (idle 2)"
    )
    assert run.gaps().by_cause()[0][Cause.SEND] == 2


def test_messages_that_queue_on_their_link() -> None:
    run = simulate(gpipe(2, 2), Cost(boundary_bytes=4), Cluster(link_bandwidth=1))

    assert sentences(run, 1)[1] == (
        "device 1 waits for 0F1: its activation arrives at 9 (idle 3, transit 4, held "
        "back 3 behind others of its link)"
    )


def test_a_send_that_waits_for_its_receive() -> None:
    """Under rendezvous nothing leaves before the other device has time for it."""
    program = lower(gpipe(2, 2), receives="late")
    cost = Cost(forward=[1, 3], boundary_bytes=1)
    cluster = Cluster(link_bandwidth=1, buffering="rendezvous")
    run = simulate(program, cost, cluster)

    assert sentences(run, 1)[1] == (
        "device 1 waits for 0F1: its activation arrives at 6 (idle 1, transit 1, held "
        "back 3 until device 1 receives it)"
    )
    assert run.gaps(1)[1].cause == Cause.PARTNER


def test_a_send_that_waits_for_room() -> None:
    """Two buffers: micro-batch 2 leaves when micro-batch 0 has arrived."""
    cost = Cost(boundary_bytes=1)
    cluster = Cluster(link_latency=5, link_bandwidth=1, buffering=2)
    run = simulate(gpipe(2, 3), cost, cluster)

    assert sentences(run, 1)[1] == (
        "device 1 waits for 0F2: its activation arrives at 13 (idle 4, transit 6, held "
        "back 4 until its link has room)"
    )
    assert run.gaps(1)[1].cause == Cause.SLOT


def test_a_reload() -> None:
    row = [F(0, 0), op(Kind.OFFLOAD, 0, 0), op(Kind.RELOAD, 0, 0), B(0, 0)]
    cost = Cost(activation_bytes=3)
    run = simulate(Schedule.of([row]), cost, Cluster(host_bandwidth=1))

    assert sentences(run) == [
        "device 0 waits for 0RELOAD0: its activations are back at 7 (idle 6)"
    ]
    assert run.gaps().blame() == [
        {"copies from the host of device 0": 3, "copies to the host of device 0": 3}
    ]


def test_a_shared_processor() -> None:
    run = simulate(gpipe(2, 2), ONE_TICK, Cluster(shared_processor=True))

    assert sentences(run, 1)[0] == (
        "device 1 has nothing to do before 0F1 on the processor they share, which ends "
        "at 2 (idle 2)"
    )
    assert sentences(run, 1)[-2] == (
        "device 1 waits for 0B1 on the processor they share, which ends at 6 (idle 1)"
    )


def test_streams_that_are_one() -> None:
    """A receive in front of an op that does not need it holds it up all the same."""
    cluster = Cluster(link_latency=3, streams="sync")
    run = simulate(gpipe(2, 2), ONE_TICK, cluster)

    assert Cause.LATE not in set(run.gaps().cause.tolist())
    assert Why.TURN in set(run.causes.why.tolist())


def test_an_op_that_comes_late_without_a_reason() -> None:
    """As a measured trace has them: the device was busy with something else."""
    run = simulate(gpipe(1, 1), ONE_TICK)
    late = dataclasses.replace(run, timetable=Timetable(run.start + 2, run.end + 2))

    assert sentences(late) == [
        "device 0 runs 0F0 late, at 2, though nothing is missing (idle 2)"
    ]
    assert late.gaps().blame() == [{"lateness of device 0": 2}]


def test_a_measured_trace() -> None:
    """Real times meet no condition exactly: the last one met explains the gap."""
    run = simulate(one_f_one_b(2, 2), Cost(forward=1.0))
    jolt = np.where(run.program.action == Action.COMPUTE, 0.25, 0.0)
    jolt[run.program.computes[0]] = 0
    start, end = run.start.copy(), run.end.copy()
    for index in range(len(run.program)):  # each waits, hesitates, runs
        met = run.causes.of[index]
        start[index] = (end[met] if met >= 0 else 0) + jolt[index]
        if run.program.action[index] == Action.COMPUTE:
            end[index] = start[index] + (run.end - run.start)[index]
        else:
            end[index] = start[index]
    measured = dataclasses.replace(
        run, timetable=Timetable(start, end), source="measured"
    )

    first = measured.gaps(1)[0]
    assert (first.end, first.cause) == (1.25, Cause.FILL)
    assert first.explain(measured) == (
        "device 1 has nothing to do before 0F0: its activation arrives at 1 (idle "
        "1.25, late 0.25)"
    )


def test_nothing_waits_on_one_device() -> None:
    run = simulate(gpipe(1, 3), ONE_TICK)

    assert len(run.gaps()) == 0
    assert run.gaps().summaries() == ["device 0: never idle"]
    assert run.gaps().blame() == [{}]


# Laws


@st.composite
def runs(draw: st.DrawFn) -> Trace:
    schedule = draw(schedules())
    program = lower(schedule, **draw(policies))
    cost = dataclasses.replace(
        draw(costs_of_stages(schedule.stages)), boundary_bytes=draw(times)
    )
    shared = draw(st.booleans())
    cluster = Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(st.none() | st.integers(1, 4)),
        buffering=draw(st.sampled_from(["eager", "rendezvous", 1, 2])),
        shared_processor=shared,
        streams="dir" if shared else draw(st.sampled_from(STREAM_MODELS)),
        devices_per_node=1,
        nic_bandwidth=draw(st.none() | st.integers(1, 4)),
    )
    return simulate(program, cost, cluster)


@given(run=runs())
def test_gaps_and_work_fill_the_time(run: Trace) -> None:
    for device in range(run.program.schedule.devices):
        gaps = run.gaps(device)
        idle: Any = sum(gap.duration for gap in gaps)

        assert run.busy[device] + idle == run.makespan
        assert sum(run.gaps().by_cause()[device].values()) == idle
        assert sum(run.gaps().blame()[device].values()) == idle
        assert all(one.end <= other.start for one, other in pairwise(gaps))
        assert all(gap.explain(run) for gap in gaps)
    # Every time in a prediction has a reason.
    assert Cause.LATE not in set(run.gaps().cause.tolist())
    assert not run.gaps().parts.late.any()


@given(run=runs())
def test_the_parts_of_each_gap_fill_it(run: Trace) -> None:
    """Without overlap, each while its instruction ran or its message flew."""
    parts, gaps = run.gaps().parts, run.gaps()
    for number, gap in enumerate(gaps):
        mine = np.flatnonzero(parts.of == number)
        cuts = [gap.end, *parts.start[mine].tolist()]

        assert cuts[-1] == gap.start
        assert cuts[:-1] == parts.end[mine].tolist()
    for index, start, end in zip(parts.instruction, parts.start, parts.end):
        flies = run.program.action[index] == Action.RECV
        since = run.program.send_of[run.program.message[index]] if flies else index
        assert end <= run.end[index]
        assert start >= (run.end[since] if flies else run.start[index])


@given(run=runs())
def test_what_is_blamed_ends_a_transit_before_its_gap(run: Trace) -> None:
    """Unless its message was held back."""
    program = run.program
    for gap in run.gaps():
        if gap.cause not in (Cause.FILL, Cause.ACTIVATION, Cause.GRADIENT):
            continue
        if gap.message < 0 or run.causes.why[gap.waiting] == Why.TURN:
            continue
        message = program.message_at(gap.message)
        written = run.end[gap.waits_for]

        assert run.end[message.recv] == gap.end
        assert program.device[gap.waits_for] == message.source != gap.device
        assert gap.left == run.start[message.send] >= written
        alone = not program.posted_with(message.send)  # else it needs what they need
        if alone and run.causes.why[message.send] == Why.NEEDS:
            assert written == gap.end - (gap.end - gap.left)


@given(run=runs(), kinds=st.booleans())
def test_the_critical_path_fills_the_makespan(run: Trace, kinds: bool) -> None:
    """Each starts when the one before ends, but for messages under way."""
    path, parts = run.critical_path(), run.critical_parts
    recvs = run.program.action == Action.RECV

    assert run.start[path[0]] == 0
    assert run.end[path[-1]] == run.makespan
    for before, after in pairwise(path):
        flies = recvs[after] and run.end[after] > run.start[after]
        assert run.end[before] == run.start[after] or flies
    cuts = [run.makespan, *parts.start.tolist()]
    assert cuts[-1] == 0
    assert cuts[:-1] == parts.end.tolist()
    assert not parts.late.any()
    assert sum(parts.by_name(kinds=kinds).values()) == run.makespan


@given(run=runs())
def test_floats_have_the_same_reasons(run: Trace) -> None:
    """Whole times, which floats say exactly: shares of links can be 1/25 and less."""
    scale = scale_of(run.start, run.end) or 1
    whole = dataclasses.replace(
        run, timetable=Timetable(run.start * scale, run.end * scale)
    )
    floats = dataclasses.replace(
        whole,
        timetable=Timetable(whole.start.astype(float), whole.end.astype(float)),
    )

    assert [gap.explain(whole) for gap in whole.gaps()] == sentences(floats)
    assert floats.critical_parts.by_name() == whole.critical_parts.by_name()


def test_a_critical_path_follows_a_message_that_arrives_late() -> None:
    """The receive was posted after the send had ended, and still waited."""
    schedule = Schedule.of(
        [[F(0, range(2)), B(0, range(2))], [F(1, 0), B(1, 0), F(1, 1), B(1, 1)]]
    )
    program = lower(schedule, receives="late")
    run = simulate(program, ONE_TICK, Cluster(link_latency=5))
    labels = [run.program.label(i) for i in run.critical_path()]

    assert labels[:4] == [
        "0F0",
        "send activation 0→1:0",
        "recv activation 0→1:0",
        "1F0",
    ]


def test_reductions_start_together() -> None:
    """Device 1's waits for device 0, and so does the end of the step."""
    placement = Placement(((0, 1), (1, 0)))
    rows = [
        [F(0, 0), F(1, 1), B(1, 1), B(0, 0), op(Kind.REDUCE, [0, 1])],
        [F(0, 1), F(1, 0), B(1, 0), B(0, 1), op(Kind.REDUCE, [0, 1])],
    ]
    schedule = Schedule.of(rows, placement=placement, micro_batches=2, pipe_of=[0, 1])
    run = simulate(schedule, Cost(), Cluster(links={(1, 0): Link(latency=4)}))

    assert run.makespan == run.end[run.critical_path()[-1]]
    assert not run.critical_parts.late.any()
    assert Counter(gap.cause for gap in run.gaps())[Cause.LATE] == 0


# Refusals


def test_refuses_a_device_that_is_not_there() -> None:
    run = simulate(gpipe(2, 2), ONE_TICK)
    with pytest.raises(ParameterError, match="devices are 0 … 1, got 2"):
        run.gaps(2)


def test_gaps_are_a_sequence() -> None:
    gaps = simulate(gpipe(2, 2), ONE_TICK).gaps()

    assert isinstance(gaps[0], Gap)
    assert list(gaps[1:]) == list(gaps)[1:]
    assert gaps[-1] == list(gaps)[-1]
