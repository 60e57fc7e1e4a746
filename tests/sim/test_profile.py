"""Traces of several schedules as one cost, and its file."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeproof.sched import ParameterError, ParseError, catalog, recompute
from pipeproof.sched.trace import Timetable
from pipeproof.sim import (
    Cluster,
    Cost,
    Link,
    Measured,
    cost_of,
    links_of,
    read_cost,
    simulate,
    write_cost,
)

times = st.lists(st.integers(1, 50).map(float), min_size=3, max_size=3).map(tuple)


@given(times, times, times, times, times)
def test_what_several_schedules_tell_together(
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    input_grad: tuple[float, ...],
    weight_grad: tuple[float, ...],
    again: tuple[float, ...],
) -> None:
    cost = Cost(forward, input_grad, weight_grad, backward, again)
    whole = catalog.make("gpipe", devices=3, micro_batches=4)
    halves = catalog.make("zb-h1", devices=3, micro_batches=4)

    found = cost_of(
        [simulate(s, cost) for s in (whole, halves, recompute(whole, "always"))]
    )

    assert found == cost


def test_idle_time_that_nothing_explains_is_an_op_s() -> None:
    """A device that is not ready when it could be: what it does counts as its ops'."""
    schedule = catalog.make("gpipe", devices=1, micro_batches=2)
    trace = simulate(schedule, Cost(forward=2.0, backward=4.0))
    late = trace.end + 0.5 * (1 + trace.program.computes.argsort())

    found = cost_of([replace(trace, timetable=Timetable(trace.start, late))])

    assert found.forward == (2.5,)
    assert found.backward == (4.5,)


def test_links_are_measured_each_by_itself() -> None:
    links = {(0, 1): Link(latency=0.25), (1, 0): Link(latency=0.5)}
    trace = simulate(
        catalog.make("1f1b", devices=2, micro_batches=4),
        Cost(1.0),
        Cluster(links=links),
    )

    assert links_of([trace]) == links


def test_a_link_whose_receives_all_came_late_is_not_lost() -> None:
    """On a busy machine none was posted in time, and the link was left out."""
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    trace = simulate(schedule, Cost(1.0), Cluster(link_latency=2.0))
    messages = trace.program.messages
    recv = messages[messages[:, 6] == 0, 9]
    start = trace.start.copy()
    start[recv] = trace.end[recv] - 0.5
    late = replace(trace, timetable=Timetable(start, trace.end))

    assert links_of([late]) == {(0, 1): Link(0.5), (1, 0): Link(2.0)}


def test_a_link_s_rate_is_told_from_its_latency() -> None:
    links = {(0, 1): Link(0.25, 8.0), (1, 0): Link(0.5, 16.0)}
    cost = Cost(1.0, boundary_bytes=[2, 0])
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    trace = simulate(schedule, cost, Cluster(links=links))

    assert links_of([trace], {(0, 1): 8.0, (1, 0): 16.0}, cost) == links


def test_of_other_devices() -> None:
    one, two = (
        simulate(catalog.make(name, devices=2, micro_batches=2))
        for name in ("1f1b", "interleaved")
    )

    with pytest.raises(ParameterError, match="traces of 2 placements do not have the"):
        cost_of([one, two])
    with pytest.raises(ParameterError, match="made of at least one trace, got none"):
        cost_of([])


MEASURED = Measured(
    Cost(
        forward=(0.001, 0.1 + 0.2),
        input_grad=(1e-3, 2e-3),
        weight_grad=(1e-3, 3e-3),
        activation_bytes=(4096, 1024),
    ),
    {(0, 1): Link(latency=1e-4), (1, 0): Link(latency=2e-4, bandwidth=1e9)},
    4e-4,
    "a test",
)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    with path.open("w") as file:
        write_cost(MEASURED, file)

    assert read_cost(path) == MEASURED


def test_another_unit_of_time() -> None:
    found = MEASURED.in_units(1000)

    assert found.cost.forward == (1.0, 1000 * (0.1 + 0.2))
    assert found.cost.activation_bytes == (4096, 1024)
    assert found.links[1, 0] == Link(latency=0.2, bandwidth=1e6)
    assert found.step_outside == pytest.approx(0.4)


def written() -> dict:
    file = io.StringIO()
    write_cost(MEASURED, file)
    return json.loads(file.getvalue())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pipeproof cost 9"}, "a file of format 'pipeproof cost 1', found"),
        ({"speed": 3}, "the file has 'speed': expected cost, format, links, measured"),
        ({"cost": {"forwards": [1]}}, "cost has 'forwards': expected activation_bytes"),
        ({"cost": {"forward": [-1]}}, "forward must be a finite number of at least 0"),
        ({"links": [{"source": 0}]}, "a link joins two devices, found"),
        ({"links": 3}, "links must be a list, found 3"),
        ({"links": [3]}, "a link must be an object, found 3"),
        ({"step_outside": "1"}, "step_outside must be seconds, found '1'"),
    ],
)
def test_a_file_that_is_none(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(written() | change))

    with pytest.raises(ParseError, match=message):
        read_cost(path)


def test_a_file_that_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(written())[:-9])

    with pytest.raises(ParseError, match=r"cost.json: expected JSON as `pipeproof pro"):
        read_cost(path)


def test_a_file_of_brackets(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text("[" * 100_000)

    with pytest.raises(ParseError, match=r"cost.json: expected JSON with few brackets"):
        read_cost(path)
