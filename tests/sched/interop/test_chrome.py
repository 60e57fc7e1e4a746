import io
import json
from collections import defaultdict
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import sizes_of

from pipeproof.sched import (
    CATALOG,
    POLICIES,
    Action,
    F,
    I,
    Kind,
    ParameterError,
    Placement,
    Schedule,
    Trace,
    W,
    catalog,
    overlap,
    recompute,
)
from pipeproof.sched.interop.chrome import write_chrome
from pipeproof.sim import Cluster, Cost, simulate

Event = dict[str, Any]

BYTES = Cost(activation_bytes=100, boundary_bytes=10, weight_bytes=7, gradient_bytes=7)


def exported(trace: Trace, **options: Any) -> dict[str, Any]:
    file = io.StringIO()
    write_chrome(trace, file, **options)
    result: dict[str, Any] = json.loads(file.getvalue())
    return result


def of_phase(events: list[Event], phase: str) -> list[Event]:
    return [event for event in events if event["ph"] == phase]


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


def assert_valid(trace: Trace, events: list[Event]) -> None:
    spans = of_phase(events, "X")
    assert len(spans) == len(trace.program)
    assert sorted(event["args"]["instruction"] for event in spans) == list(
        range(len(trace.program))
    )

    by_thread = defaultdict(list)
    for event in events:
        if event["ph"] in "Xsf":
            by_thread[event["pid"], event["tid"]].append(event)
    named = {
        (e["pid"], e["tid"])
        for e in of_phase(events, "M")
        if e["name"] == "thread_name"
    }
    assert by_thread.keys() <= named
    for thread in by_thread.values():
        times = [event["ts"] for event in thread]
        assert times == sorted(times)
        free_at = 0
        for event in of_phase(thread, "X"):
            start, dur = nanoseconds(event["ts"]), nanoseconds(event["dur"])
            assert start >= free_at
            assert dur >= 0
            free_at = start + dur

    sends = {event["id"]: event for event in of_phase(events, "s")}
    recvs = {event["id"]: event for event in of_phase(events, "f")}
    assert sends.keys() == recvs.keys() == set(range(len(trace.program.messages)))
    assert len(of_phase(events, "s")) == len(of_phase(events, "f")) == len(sends)
    for number, send in sends.items():
        assert send["ts"] <= recvs[number]["ts"]
        assert send["pid"] != recvs[number]["pid"]

    resident = {"weights", "gradients", "optimizer"}
    counters = defaultdict(list)
    for event in of_phase(events, "C"):
        counters[event["name"], event["pid"]].append(event)
    for (name, device), counter in counters.items():
        times = [event["ts"] for event in counter]
        assert times == sorted(times)
        last = counter[-1]["args"]
        assert not any(last[key] for key in last.keys() - resident)
        peak = max(
            sum(size for where, size in event["args"].items() if where != "host")
            for event in counter
        )
        if name == "bytes":
            assert trace.peak_bytes is not None
            assert peak == pytest.approx(float(trace.peak_bytes[device]))
        else:
            assert peak == pytest.approx(float(trace.peak_activations[device]))


@pytest.mark.parametrize("name", CATALOG)
@given(
    data=st.data(),
    policy=st.sampled_from(POLICIES),
    latency=st.sampled_from([0, 1, 0.3, Fraction(1, 3)]),
)
def test_every_schedule_exports_a_valid_trace(
    name: str, data: st.DataObject, policy: Any, latency: Any
) -> None:
    p, m = data.draw(sizes_of(name))
    schedule = catalog.make(name, devices=p, micro_batches=m)
    if not schedule.has(Kind.OFFLOAD):  # the two together are not lowered
        schedule = recompute(schedule, policy)
    trace = simulate(schedule, BYTES, Cluster(link_latency=latency))

    assert_valid(trace, exported(trace)["traceEvents"])


def test_an_overlap_group_is_one_span() -> None:
    schedule = Schedule.of(
        [
            [
                *(F(0, 0), F(1, 0), overlap(F(0, 1), I(1, 0)), F(1, 1), I(1, 1)),
                *(W(1, 0), I(0, 0), I(0, 1), W(1, 1), W(0, 0), W(0, 1)),
            ]
        ],
        placement=Placement(((0, 0),)),
    )
    trace = simulate(schedule, BYTES)

    events = exported(trace)["traceEvents"]

    assert_valid(trace, events)
    (group,) = [event for event in events if event.get("cat") == "overlap"]
    assert group["name"] == "0F1&1I0"


def test_two_devices_one_micro_batch() -> None:
    trace = simulate(
        catalog.make("gpipe", devices=2, micro_batches=1), BYTES, Cluster(1)
    )

    form = exported(trace, microseconds=1)

    assert form["otherData"]["schedule"] == "gpipe(devices=2, micro_batches=1)"
    compute = [e for e in of_phase(form["traceEvents"], "X") if "F" in e["name"]]
    assert compute[1] == {
        "ph": "X",
        "name": "1F0",
        "cat": "forward",
        "args": {"op": "1F0", "stage": 1, "micro_batch": 0, "instruction": 3},
        "pid": 1,
        "tid": 1,
        "ts": 2,
        "dur": 1,
    }
    (arrow,) = [e for e in of_phase(form["traceEvents"], "f") if e["pid"] == 1]
    assert arrow["ts"] == 2
    names = {
        (e["pid"], e["args"]["name"])
        for e in of_phase(form["traceEvents"], "M")
        if "name" in e["args"]
    }
    assert {(0, "device 0"), (0, "compute"), (0, "send to 1")} <= names
    assert (1, "receive from 0") in names


def test_without_bytes_only_activations_are_counted() -> None:
    trace = simulate(catalog.make("1f1b", devices=2, micro_batches=3))

    counters = of_phase(exported(trace)["traceEvents"], "C")

    assert {event["name"] for event in counters} == {"activations"}


def test_a_measured_trace_is_in_seconds() -> None:
    predicted = simulate(catalog.make("naive", devices=1, micro_batches=1))
    measured = Trace(
        predicted.program,
        predicted.timetable,
        "measured",
        predicted.sizes,
    )

    spans = of_phase(exported(measured)["traceEvents"], "X")

    assert [event["dur"] for event in spans] == [1e6, 2e6]
    assert exported(measured)["otherData"]["source"] == "measured"


@pytest.mark.parametrize("scale", [0, -1, float("nan")])
def test_refuses_a_scale_that_is_none(scale: float) -> None:
    trace = simulate(catalog.make("naive", devices=1, micro_batches=1))

    with pytest.raises(ParameterError, match="microseconds must be above 0, got"):
        exported(trace, microseconds=scale)


def test_refuses_times_that_would_lose_their_order() -> None:
    trace = simulate(
        catalog.make("naive", devices=1, micro_batches=1), Cost(forward=10**20)
    )

    with pytest.raises(ParameterError, match="times exceed 104 days"):
        exported(trace)


def test_writes_as_it_goes() -> None:
    """A million events were once joined before the first was written."""

    class Counting(io.StringIO):
        longest = 0

        def write(self, text: str) -> int:
            self.longest = max(self.longest, len(text))
            return super().write(text)

    trace = simulate(catalog.make("gpipe", devices=4, micro_batches=64))
    file = Counting()

    write_chrome(trace, file)

    assert (trace.program.action == Action.SEND).sum() == 2 * 3 * 64
    assert file.longest < 1000
