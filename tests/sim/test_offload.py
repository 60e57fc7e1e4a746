"""Activations that go to the host, or to another device, and come back."""

from fractions import Fraction

import pytest
from hypothesis import given
from strategies import whole_language

from pipeproof.sched import Action, Schedule, Trace, UnsupportedError, lower
from pipeproof.sched.interop.chrome import chrome_events
from pipeproof.sched.interop.svg import draw_svg
from pipeproof.sim import Cluster, Cost, Link, simulate

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


TO_THE_OTHER = Schedule.parse(
    """\
devices: 2
placement: linear
micro-batches: 2
offload-to: 1 host

device 0 | 0F0 0OFFLOAD0 0F1 0B1 0RELOAD0 0B0
device 1 | 1F0 1F1 1B1 1B0
"""
)
SLOW = Cluster(links={(0, 1): Link(3, 2), (1, 0): Link(1, 8)})


def copies_of(trace: Trace) -> list[tuple[str, int, int]]:
    copies = [i for i in trace.program if i.action == Action.COPY]
    return [
        (i.label, int(trace.start[i.index]), int(trace.end[i.index])) for i in copies
    ]


def test_copies_to_a_device_take_the_time_of_the_link_that_way() -> None:
    """8 bytes: away at 2 a tick and 3 under way, back at 8 a tick and 1 under way."""
    trace = simulate(TO_THE_OTHER, COST, SLOW)

    assert trace.grid().splitlines() == [
        "device 0 | F0 -- -- -- F1 -- -- -- .. .. .. .. .. .. .. .. .. .. .. .. .. .. "
        "B1 -- -- -- -- -- .. .. B0 -- -- -- -- --",
        "device 1 | .. .. .. .. .. .. .. F0 -- -- -- F1 -- -- -- B1 -- -- -- -- -- B0 "
        "-- -- -- -- -- .. .. .. .. .. .. .. .. ..",
    ]
    assert copies_of(trace) == [("0OFFLOAD0", 4, 11), ("0RELOAD0", 28, 30)]


def test_what_is_away_counts_on_the_device_that_keeps_it() -> None:
    trace = simulate(TO_THE_OTHER, COST, SLOW)
    memory = trace.memory(1)

    assert trace.peak_activations == [2, 3]
    assert trace.peak_bytes == [16, 24]
    assert trace.link_bytes() == {(0, 1): 8, (1, 0): 8}
    assert max(memory.by_class["offloaded"].tolist()) == 8
    assert memory.total[-1] == 0
    assert max(trace.memory(0).by_class["offloaded"].tolist()) == 0
    assert max(trace.memory().by_class["host"].tolist()) == 0


def test_a_free_link_takes_no_time() -> None:
    trace = simulate(TO_THE_OTHER, Cost())

    assert [start == end for _, start, end in copies_of(trace)] == [True, True]
    assert trace.peak_activations == [1, 3]


def test_a_gap_names_the_copy_that_it_waits_for() -> None:
    trace = simulate(TO_THE_OTHER, COST, SLOW)

    assert trace.gaps(0)[-1].explain(trace) == (
        "device 0 waits for 0RELOAD0: its activations are back at 30 (idle 2)"
    )


def test_the_bandwidth_of_the_host_is_another_matter() -> None:
    host = Cluster(host_bandwidth=Fraction(1, 100))

    assert simulate(TO_THE_OTHER, COST, host).makespan == (
        simulate(TO_THE_OTHER, COST).makespan
    )


def test_a_program_says_where_its_copies_go() -> None:
    lines = lower(TO_THE_OTHER).describe().splitlines()

    assert lines[lines.index("device 0, to device 1:") + 1] == (
        "    3 0OFFLOAD0 after 0; reads activation 0:0, input 0:0; writes offloaded "
        "0:0 on device 1, offloaded 0:0 on device 1; frees activation 0:0, input 0:0"
    )
    assert "device 0, from device 1:" in lines


@given(schedule=whole_language())
def test_nothing_is_left_behind(schedule: Schedule) -> None:
    """Split backwards, slices, pipes: what goes away comes back, wherever to."""
    cost = Cost(activation_bytes=8, boundary_bytes=1, weight_grad_memory=Fraction(1, 3))
    trace = simulate(schedule, cost)

    for device in range(schedule.devices):
        assert trace.memory(device).total[-1] == 0
        assert min(trace.memory(device).total.tolist()) >= 0


def test_exports_draw_the_copies() -> None:
    trace = simulate(TO_THE_OTHER, COST, SLOW)
    events = list(chrome_events(trace, microseconds=1))

    threads = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert [
        (threads[event["tid"]], event["name"], event["pid"], event["ts"], event["dur"])
        for event in events
        if event.get("cat") == "copy"
    ] == [
        ("to device 1", "0OFFLOAD0", 0, 4, 7),
        ("from device 1", "0RELOAD0", 0, 28, 2),
    ]


def test_the_chart_has_copies_along_the_edges_of_their_row() -> None:
    drawn = draw_svg(simulate(TO_THE_OTHER, COST, SLOW), width=88 + 360)

    for strip in (
        "<title>0OFFLOAD0: 4 – 11, to device 1</title>"
        "<rect x='116.50' y='68.0' width='69.00' height='4.0'",
        "<title>0RELOAD0: 28 – 30, from device 1</title>"
        "<rect x='356.50' y='46.0' width='19.00' height='4.0'",
    ):
        assert strip in drawn
    assert ">offload<" in drawn
    assert "OFFLOAD" not in draw_svg(simulate(TO_THE_OTHER, Cost()))
