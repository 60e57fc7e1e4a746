"""Links that several devices share: the rates of transfers, and what follows."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costs_of_stages, policies, positive_times, schedules, times

from pipeproof.sched import (
    Action,
    Program,
    Schedule,
    Trace,
    UnsupportedError,
    catalog,
    lower,
)
from pipeproof.sched.exact import Number, plain
from pipeproof.sim import Cluster, Cost, Link, simulate
from pipeproof.sim.fair import fair_rates
from pipeproof.sim.topology import contended

ROUTES = st.dictionaries(
    st.integers(0, 9),
    st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True).map(tuple),
    min_size=1,
)
BANDWIDTHS = st.lists(positive_times, min_size=5, max_size=5)


def test_one_link_is_shared_alike_and_what_is_left_goes_to_others() -> None:
    """Two transfers fill link 0; one of them leaves 5/2 of link 1 to a third."""
    rates = fair_rates({0: (0,), 1: (0, 1), 2: (1,)}, [1, 3])

    assert rates == {0: Fraction(1, 2), 1: Fraction(1, 2), 2: Fraction(5, 2)}


@given(routes=ROUTES, bandwidths=BANDWIDTHS)
def test_rates_are_max_min_fair(
    routes: dict[int, tuple[int, ...]], bandwidths: list[Number]
) -> None:
    """Each transfer takes a full link on which no other one is faster.

    That is so for the max-min fair rates and for no others.
    """
    rates = fair_rates(routes, bandwidths)
    on = {link: [i for i, r in routes.items() if link in r] for link in range(5)}
    load = {link: sum(rates[i] for i in users) for link, users in on.items()}

    assert all(load[link] <= bandwidths[link] for link in on)
    for index, route in routes.items():
        assert any(
            load[link] == bandwidths[link]
            and rates[index] == max(rates[other] for other in on[link])
            for link in route
        )


TWO_PIPES = Schedule.parse(
    """\
devices: 4
placement: [0 2 | 1 3]
micro-batches: 2
pipes: 0 | 1

device 0 | 0F0 0B0 0REDUCE
device 1 | 0F1 0B1 0REDUCE
device 2 | 1F0 1B0 1REDUCE
device 3 | 1F1 1B1 1REDUCE
"""
)
"""Micro-batch 0 goes from device 0 to 2, micro-batch 1 from 1 to 3."""

TICKS = Cost(forward=1, backward=1, boundary_bytes=2)


def test_two_devices_of_a_node_send_over_one_card() -> None:
    """2 bytes at 1 byte a tick take 2 ticks, and two such messages at once take 4."""
    a_card_each = Cluster(devices_per_node=2, nic_bandwidth=1, devices_per_nic=1)
    one_card = Cluster(devices_per_node=2, nic_bandwidth=1)

    assert simulate(TWO_PIPES, TICKS, a_card_each).grid().splitlines() == [
        "device 0 | 0F0 ... ... ... ... ... ... 0B0",
        "device 1 | 0F1 ... ... ... ... ... ... 0B1",
        "device 2 | ... ... ... 1F0 1B0 ... ... ...",
        "device 3 | ... ... ... 1F1 1B1 ... ... ...",
    ]
    shared = simulate(TWO_PIPES, TICKS, one_card).grid().splitlines()
    assert shared == [
        "device 0 | 0F0 ... ... ... ... ... ... ... ... ... ... 0B0",
        "device 1 | 0F1 ... ... ... ... ... ... ... ... ... ... 0B1",
        "device 2 | ... ... ... ... ... 1F0 1B0 ... ... ... ... ...",
        "device 3 | ... ... ... ... ... 1F1 1B1 ... ... ... ... ...",
    ]
    # Senders on two nodes, and only the receivers share a card.
    card_of_receivers = Cluster(node_of=[0, 1, 2, 2], nic_bandwidth=1)
    assert simulate(TWO_PIPES, TICKS, card_of_receivers).grid().splitlines() == shared


def test_a_transfer_slows_down_while_another_one_is_there() -> None:
    """Device 1 computes at half speed, so its message sets out a tick later.

    ::

        tick       1   2   3   4   5
        message 0  |1  |1/2 1/2|        bytes sent in it, 2 in all
        message 1      |1/2 1/2|1  |
    """
    cluster = Cluster(devices_per_node=2, nic_bandwidth=1, speeds={1: Fraction(1, 2)})

    assert simulate(TWO_PIPES, TICKS, cluster).grid().splitlines() == [
        "device 0 | 0F0 ... ... ... ... ... ... ... ... 0B0 ... ...",
        "device 1 | 0F1 --- ... ... ... ... ... ... ... ... 0B1 ---",
        "device 2 | ... ... ... ... 1F0 1B0 ... ... ... ... ... ...",
        "device 3 | ... ... ... ... ... 1F1 1B1 ... ... ... ... ...",
    ]


def test_a_card_has_two_directions() -> None:
    """What leaves node 1 does not slow down what arrives there."""
    cluster = Cluster(devices_per_node=1, nic_bandwidth=1)
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    free = Cluster(link_bandwidth=1)

    shared, alone = (simulate(schedule, TICKS, each) for each in (cluster, free))

    assert shared.end.tolist() == alone.end.tolist()


def test_copies_of_a_node_share_its_way_to_the_host() -> None:
    """8 bytes: alone 4 ticks at 2 a tick, of two devices together 8 at 1 each."""
    away = Schedule.parse(
        """\
devices: 2
placement: [0 | 1]
micro-batches: 2
pipes: 0 | 1

device 0 | 0F0 0OFFLOAD0 0RELOAD0 0B0 0REDUCE
device 1 | 0F1 0OFFLOAD1 0RELOAD1 0B1 0REDUCE
"""
    )
    cost = Cost(forward=4, backward=6, activation_bytes=8)
    alone = Cluster(host_bandwidth=2)
    together = Cluster(host_bandwidth=2, node_host_bandwidth=2, devices_per_node=2)

    assert simulate(away, cost, alone).grid(2).splitlines() == [
        "device 0 | 0F0 --- ... ... ... ... 0B0 --- ---",
        "device 1 | 0F1 --- ... ... ... ... 0B1 --- ---",
    ]
    assert simulate(away, cost, together).grid(2).splitlines() == [
        "device 0 | 0F0 --- ... ... ... ... ... ... ... ... 0B0 --- ---",
        "device 1 | 0F1 --- ... ... ... ... ... ... ... ... 0B1 --- ---",
    ]


nodes = st.lists(st.integers(0, 2), min_size=4, max_size=4)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Program, Cost, Cluster]:
    """A program on up to three nodes of any devices, without cards yet."""
    schedule = draw(schedules())
    cost = dataclasses.replace(
        draw(costs_of_stages(schedule.stages)), boundary_bytes=draw(positive_times)
    )
    cluster = Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(positive_times),
        within_node=Link(bandwidth=draw(st.none() | positive_times)),
        buffering=draw(st.sampled_from(["eager", "rendezvous", 1, 2])),
        node_of=draw(nodes),
    )
    return lower(schedule, **draw(policies)), cost, cluster


@settings(max_examples=20)
@given(run=runs())
def test_a_card_that_is_fast_enough_changes_nothing(
    run: tuple[Program, Cost, Cluster],
) -> None:
    """A transfer that goes at its own pace takes its duration, to the last bit."""
    program, cost, cluster = run
    for exact in (True, False):
        if not exact:
            cost = dataclasses.replace(cost, forward=1 / 7, boundary_bytes=0.3)
        wide = dataclasses.replace(cluster, nic_bandwidth=1000)
        one, other = (
            simulate(program, cost, each, engine="events") for each in (cluster, wide)
        )
        assert one.end.tolist() == other.end.tolist()
        assert one.start.tolist() == other.start.tolist()


@settings(max_examples=25)
@given(run=runs(), bandwidth=positive_times)
def test_no_card_takes_more_than_its_bandwidth(
    run: tuple[Program, Cost, Cluster], bandwidth: Number
) -> None:
    """Of any stretch of time: what is sent within it fits, and all are later."""
    program, cost, cluster = run
    cluster = dataclasses.replace(cluster, nic_bandwidth=bandwidth)
    shared = simulate(program, cost, cluster)
    alone = dataclasses.replace(cluster, devices_per_nic=1, nic_bandwidth=1000)

    assert (shared.start >= simulate(program, cost, alone).start).all()
    for sends in sent_through_each_card(shared, cluster).values():
        for begin in {start for start, _, _ in sends}:
            for end in {end for _, end, _ in sends}:
                within: Any = sum(
                    size for a, b, size in sends if begin <= a and b <= end
                )
                assert within <= bandwidth * max(0, end - begin)


def sent_through_each_card(
    trace: Trace, cluster: Cluster
) -> dict[tuple[int, str], list[tuple[Any, Any, Any]]]:
    """(node, direction) → start, end and bytes of each transfer."""
    sizes: Any = trace.sizes.bytes
    result: dict[tuple[int, str], list[tuple[Any, Any, Any]]] = {}
    for instruction in trace.program:
        message = instruction.message
        if instruction.action != Action.SEND or message is None:
            continue
        out, into = cluster.node(message.source), cluster.node(message.target)
        if out != into:
            what = (
                trace.start[instruction.index],
                trace.end[instruction.index],
                sizes[instruction.reads[0].index],
            )
            result.setdefault((out, "out"), []).append(what)
            result.setdefault((into, "in"), []).append(what)
    return result


def arrivals(trace: Trace) -> list[Any]:
    """When each message is there, in the program's order."""
    return [plain(trace.end[recv]) for recv in trace.program.recv_of.tolist()]


def test_sharing_is_exact_in_fractions_and_close_in_floats() -> None:
    """Message 0 sets out at 1, message 1 at 3/2.

    At 3/2, 1/2 byte of message 0 is sent; the rest takes 3 ticks at half the
    bandwidth. By then message 1 has sent as much, and its last 1/2 byte takes 1/2.
    """
    cluster = Cluster(devices_per_node=2, nic_bandwidth=1, speeds={1: Fraction(2, 3)})

    exact = simulate(TWO_PIPES, TICKS, cluster)
    cost = dataclasses.replace(TICKS, forward=1.0)
    floats = simulate(TWO_PIPES, cost, dataclasses.replace(cluster, speeds={1: 2 / 3}))

    assert arrivals(exact)[:2] == [Fraction(9, 2), 5]
    assert floats.end.dtype == np.float64
    np.testing.assert_allclose(floats.end, exact.end.astype(float), rtol=1e-12)


def test_the_replay_leaves_shared_links_to_the_engine() -> None:
    cluster = Cluster(devices_per_node=2, nic_bandwidth=1)

    assert contended(lower(TWO_PIPES), cluster)
    with pytest.raises(UnsupportedError, match="share a network card"):
        simulate(TWO_PIPES, TICKS, cluster, engine="replay")


def test_cards_that_one_stream_uses_are_not_contended() -> None:
    """A line through two nodes crosses once, in each direction by one stream."""
    cluster = Cluster(devices_per_node=2, nic_bandwidth=1)

    assert not contended(
        lower(catalog.make("1f1b", devices=4, micro_batches=4)), cluster
    )


def test_progress_ends_where_it_should() -> None:
    told: list[tuple[int, int]] = []
    cluster = Cluster(devices_per_node=2, nic_bandwidth=1)

    simulate(TWO_PIPES, TICKS, cluster, progress=lambda *done: told.append(done))

    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    assert all(done <= total for done, total in told)
