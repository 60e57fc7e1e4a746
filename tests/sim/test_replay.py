"""The replay against the discrete-event engine, to the last bit."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    costs_of_stages,
    policies,
    positive_times,
    schedules,
    times,
    whole_language,
)

from pipeproof.sched import CATALOG, Program, Schedule, Trace, catalog, kernels, lower
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.lists import Lists
from pipeproof.sched.row import Case
from pipeproof.sched.trace import Timetable
from pipeproof.sim import (
    Cluster,
    Cost,
    DeadlockError,
    Link,
    many,
    simulate,
    simulate_many,
)
from pipeproof.sim.engine import play
from pipeproof.sim.timing import Timing

BUFFERING = ["eager", "rendezvous", 1, 2, 3]


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Links of any speed, any buffering, any streams that are one."""
    link = st.builds(Link, times, st.none() | positive_times)
    pair = st.tuples(st.integers(0, 3), st.integers(0, 3))
    return Cluster(
        link_latency=draw(times),
        link_bandwidth=draw(st.none() | positive_times),
        links=draw(st.dictionaries(pair, link, max_size=3)),
        host_bandwidth=draw(st.none() | positive_times),
        buffering=draw(st.sampled_from(BUFFERING)),
        shared_processor=draw(st.booleans()),
        streams=draw(st.sampled_from(["dir", "pair", "one", "sync"])),
        speeds=draw(st.dictionaries(st.integers(0, 3), positive_times, max_size=2)),
    )


def of_floats(thing: Any) -> Any:
    """The same cost or cluster with each exact time as a float that has no end."""
    if isinstance(thing, Fraction) or type(thing) is int:
        return float(thing) / 7
    if isinstance(thing, tuple):
        return tuple(map(of_floats, thing))
    if isinstance(thing, Link):
        return Link(of_floats(thing.latency), of_floats(thing.bandwidth))
    if isinstance(thing, Cluster):
        links = {pair: of_floats(link) for pair, link in thing.links.items()}
        names = ("link_latency", "link_bandwidth")
        floats = {name: of_floats(getattr(thing, name)) for name in names}
        return dataclasses.replace(thing, links=links, **floats)
    if isinstance(thing, Cost):
        names = ("forward", "input_grad", "weight_grad", "backward", "recompute")
        return dataclasses.replace(
            thing, **{name: of_floats(getattr(thing, name)) for name in names}
        )
    return thing


def both(program: Program, cost: Cost, cluster: Cluster) -> Trace | None:
    """The trace by the engine, after comparing the replay; None for a deadlock."""
    try:
        events = simulate(program, cost, cluster, engine="events")
    except DeadlockError:
        with pytest.raises(UnsupportedError, match="stands before one that it waits"):
            simulate(program, cost, cluster, engine="replay")
        return None
    replay = simulate(program, cost, cluster, engine="replay")
    assert {events.start.dtype, events.end.dtype} == {replay.start.dtype}
    assert replay.start.dtype == replay.end.dtype
    assert events.start.tolist() == replay.start.tolist()
    assert events.end.tolist() == replay.end.tolist()
    return events


@given(
    data=st.data(),
    schedule=schedules() | whole_language(),
    cluster=clusters(),
    policies=policies,
)
def test_equals_the_engine(
    data: st.DataObject, schedule: Schedule, cluster: Cluster, policies: dict[str, Any]
) -> None:
    program = lower(schedule, **policies)
    cost = dataclasses.replace(
        data.draw(costs_of_stages(schedule.stages)),
        boundary_bytes=3,
        activation_bytes=99,
    )
    exact = both(program, cost, cluster)
    floats = both(program, of_floats(cost), of_floats(cluster))

    assert exact is None or exact.end.dtype != np.float64
    assert floats is None or floats.end.dtype == np.float64


@pytest.mark.parametrize("name", CATALOG)
def test_equals_the_engine_on_the_catalogue(name: str) -> None:
    """Overlap groups, reductions, bidirectional pipes, slices."""
    p, m = next(
        size for size in ((4, 8), (4, 4), (3, 4)) if CATALOG[name].allows(Case(*size))
    )
    program = lower(catalog.make(name, devices=p, micro_batches=m))
    cost = Cost(forward=2, input_grad=3, weight_grad=Fraction(1, 2), overlap=4)
    for buffering in BUFFERING:
        assert both(program, cost, Cluster(1, buffering=buffering))


def test_one_pass_gives_the_timetable() -> None:
    trace = simulate(
        catalog.make("1f1b", devices=2, micro_batches=3),
        Cost(forward=1, backward=2),
        Cluster(link_latency=1),
        engine="replay",
    )

    assert trace.grid().splitlines() == [
        "device 0 | F0 F1 .. .. .. .. B0 -- F2 B1 -- .. .. .. B2 --",
        "device 1 | .. .. F0 B0 -- F1 B1 -- .. .. F2 B2 -- .. .. ..",
    ]


def test_ints_beyond_64_bits_stay_exact() -> None:
    program = lower(catalog.make("gpipe", devices=2, micro_batches=2))
    trace = both(program, Cost(forward=2**61), Cluster(link_latency=Fraction(1, 3)))

    assert trace is not None
    assert trace.makespan == 3 * 2**61 + 6 + Fraction(2, 3)


def with_wait(program: Program, instruction: int, wait: int) -> Program:
    """A program with one more wait, made by hand."""
    waits = program.waits_for.to_lists()
    waits[instruction] = [*waits[instruction], wait]
    offsets = np.cumsum([0, *map(len, waits)])
    values = np.array([other for row in waits for other in row], dtype=np.int32)
    return dataclasses.replace(program, waits_for=Lists(offsets, values))


def test_an_instruction_before_one_it_waits_for_is_found() -> None:
    """Device 1 sits out its first forward until device 0 has done its second."""
    lowered = lower(catalog.make("gpipe", devices=2, micro_batches=2))
    labels = [instruction.label for instruction in lowered]
    early = next(i for i, label in enumerate(labels) if label == "0F1")
    late = next(i for i, label in enumerate(labels) if label == "recv activation 0→1:0")
    assert late < early
    program = with_wait(lowered, late, early)

    auto = simulate(program)
    events = simulate(program, engine="events")

    assert auto.end.tolist() == events.end.tolist()
    assert auto.makespan > simulate(lowered).makespan
    where = rf"instruction {late}, recv activation 0→1:0 \(device 1\), stands before"
    with pytest.raises(UnsupportedError, match=where):
        simulate(program, engine="replay")
    with pytest.raises(UnsupportedError, match=where):
        simulate_many(program, np.ones((1, len(program.computes))))


def test_a_deadlock_is_named_by_the_engine() -> None:
    """One stream for everything cannot post a receive while it waits to send."""
    program = lower(catalog.make("gpipe", devices=2, micro_batches=1))
    alone = Cluster(shared_processor=True, streams="sync", buffering="rendezvous")

    assert both(program, Cost(), alone) is None
    with pytest.raises(DeadlockError, match="instructions never run"):
        simulate(program, None, alone)


SHARED = Cluster(devices_per_node=2, nic_bandwidth=1)


def test_shared_links_are_left_to_the_engine() -> None:
    schedule = catalog.make("interleaved", devices=4, micro_batches=4, chunks=2)
    cost = Cost(boundary_bytes=1)

    auto = simulate(schedule, cost, SHARED)

    assert (
        auto.end.tolist()
        == simulate(schedule, cost, SHARED, engine="events").end.tolist()
    )
    with pytest.raises(UnsupportedError, match="share a network card"):
        simulate(schedule, cost, SHARED, engine="replay")
    with pytest.raises(UnsupportedError, match="share a network card"):
        simulate_many(schedule, np.ones((1, len(schedule))), cost, SHARED)


def test_says_which_engines_there_are() -> None:
    schedule = catalog.make("gpipe", devices=1, micro_batches=1)
    with pytest.raises(ParameterError, match="auto, events, replay, got 'simpy'"):
        simulate(schedule, engine="simpy")  # type: ignore[arg-type]


KINDS = {"int": int, "float": lambda n: n / 7, "Fraction": lambda n: Fraction(n, 7)}


@given(
    data=st.data(),
    schedule=schedules(),
    policies=policies,
    cluster=clusters(),
    kind=st.sampled_from(sorted(KINDS)),
    few=st.booleans(),
)
def test_many_at_once_are_each_alone(
    data: st.DataObject,
    schedule: Schedule,
    policies: dict[str, Any],
    cluster: Cluster,
    kind: str,
    few: bool,
) -> None:
    cluster = dataclasses.replace(cluster, speeds={}, shared_processor=False)
    program = lower(schedule, **policies)
    bytes_only = Cost(boundary_bytes=3)
    numbers = st.integers(0, 9).map(KINDS[kind])
    row = st.lists(
        numbers, min_size=len(program.computes), max_size=len(program.computes)
    )
    durations = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(many, "BLOCK", 2 * len(program))
        patch.setattr(many, "FEW", 9 if few and data.draw(st.booleans()) else 1)
        batch = simulate_many(program, durations, bytes_only, cluster)
    for place, times_of_row in enumerate(durations.tolist()):
        trace = alone(program, times_of_row, bytes_only, cluster)
        assert batch.makespan[place] == trace.makespan
        assert batch.spans[place].tolist() == trace.spans
        assert batch.busy[place].tolist() == trace.busy


def alone(
    program: Program, durations: list[Any], cost: Cost, cluster: Cluster
) -> Trace:
    """One evaluation by the discrete-event engine."""
    sizes = cost.sizes(program)
    timing = Timing.of(program, cost, cluster, sizes)
    takes = timing.unscaled(timing.durations).astype(object)
    takes[program.computes] = durations
    latencies = timing.unscaled(timing.latencies).astype(object)
    if any(isinstance(number, float) for number in (*takes, *latencies)):
        takes, latencies = takes.astype(float), latencies.astype(float)
    start, end = play(program, Timing.each(takes, latencies, 1), cluster)
    return Trace(program, Timetable(start, end), "predicted", sizes)


def test_many_by_hand() -> None:
    """Slower and slower backwards of two devices."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    program = lower(schedule)
    rows = [Cost(forward=1, backward=b).durations(program) for b in (1, 2, 5)]

    batch = simulate_many(program, np.array(rows), Cost(0.5))

    assert batch.makespan.tolist() == [6, 9, 18]
    assert batch.busy.tolist() == [[4, 4], [6, 6], [12, 12]]
    assert batch.spans.tolist() == [[6, 4], [9, 6], [18, 12]]
    assert batch.makespan.dtype == np.int64


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        (np.ones((2, 7)), r"8 columns, one for each compute .*, got shape \(2, 7\)"),
        (np.ones(8), r"got shape \(8,\)"),
        (np.full((1, 8), -1), "at least 0"),
        (np.full((1, 8), np.nan), "finite"),
        (np.full((1, 8), "x"), "must be numbers, got <U1"),
        (np.full((1, 8), None), "must be numbers, got object"),
    ],
)
def test_durations_that_do_not_fit(durations: Any, message: str) -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match=message):
        simulate_many(schedule, durations)


@pytest.mark.parametrize("number", [int, float])
def test_compiled_and_plain_agree(number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = lower(catalog.make("interleaved", devices=4, micro_batches=8, chunks=2))
    cost = Cost(number(2), number(4), number(6))
    plain = simulate(program, cost, Cluster(1, buffering="rendezvous"))
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    compiled = simulate(program, cost, Cluster(1, buffering="rendezvous"))

    assert plain.end.dtype == (np.float64 if number is float else np.int64)
    assert compiled.end.dtype == plain.end.dtype
    assert compiled.start.tolist() == plain.start.tolist()
    assert compiled.end.tolist() == plain.end.tolist()
