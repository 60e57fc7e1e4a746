"""What is alive when, whose it is, and whether it fits."""

import dataclasses
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, whole_language

from pipeproof.sched import (
    B,
    BufferKind,
    F,
    Kind,
    ParameterError,
    Schedule,
    Trace,
    catalog,
    fits,
    op,
    recompute,
)
from pipeproof.sched.lists import Lists
from pipeproof.sched.memory import Held, Ledger
from pipeproof.sched.peaks import peaks_by_buffer, peaks_by_op
from pipeproof.sched.program import Stored
from pipeproof.sched.weights import Weights
from pipeproof.sim import Cost, simulate

TINY = Fraction(1, 2**61)
"""Of numbers with it, whole parts cannot be added up in 64 bits."""
COST = Cost(
    forward=2,
    input_grad=2,
    weight_grad=1,
    weight_bytes=1000,
    gradient_bytes=2000,
    optimizer_bytes=3000,
    activation_bytes=100,
    boundary_bytes=10,
    workspace_bytes=7,
    weight_grad_memory=Fraction(1, 3),
)


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


def counted(trace: Trace, device: int) -> list[Any]:
    """All that is ever alive at once, instruction by instruction."""
    program, size = trace.program, trace.sizes.known_bytes()
    part = Fraction(7, program.schedule.slices)
    seen: set[int] = set()
    events: list[tuple[Any, int, Any]] = []
    for instruction in program:
        i = instruction.index
        for buffer in instruction.writes:
            here = buffer.device == device and buffer.kind != BufferKind.HOST
            if here and buffer.kind != BufferKind.GRADIENT and buffer.index not in seen:
                events.append((trace.start[i], 2 * i, size[buffer.index]))
            seen.add(buffer.index)
        for buffer in instruction.frees:
            if buffer.device == device and buffer.kind != BufferKind.HOST:
                events.append((trace.end[i], 2 * i + 1, -size[buffer.index]))
        backward = {Kind.B, Kind.I} & {o.kind for o in instruction.ops}
        if backward and instruction.stream.device == device:
            events.append((trace.start[i], 2 * i, part))
            events.append((trace.end[i], 2 * i + 1, -part))
    alive, result = resident(trace, device), []
    for _, _, change in sorted(events, key=lambda event: event[:2]):
        alive += change
        result.append(alive)
    return result


def resident(trace: Trace, device: int) -> Any:
    return sum(row[device] for row in (trace.sizes.resident or {}).values())


@given(data=st.data(), schedule=schedules())
def test_peaks_are_counted_instruction_by_instruction(
    data: st.DataObject, schedule: Schedule
) -> None:
    one = data.draw(st.integers(1, 9))
    trace = simulate(schedule, dataclasses.replace(COST, forward=one))
    peaks = trace.peak_bytes

    assert peaks is not None
    for device in range(schedule.devices):
        alive, always = counted(trace, device), resident(trace, device)
        peak, curve = trace.peak(device), trace.memory(device)
        assert peaks[device] == peak.total == curve.peak == max(alive, default=always)
        assert curve.at_peak() == peak.by_class
        assert curve.total[-1] == always
        held = sum(one.bytes for one in peak.held)
        assert peak.total == held + always + peak.by_class["workspace"]


@given(
    schedule=schedules() | whole_language(),
    numbers=st.tuples(*[st.integers(0, 4) | st.fractions(0, 4)] * 3),
    part=st.fractions(0, 1, max_denominator=99) | st.just(TINY),
)
def test_peaks_from_what_ops_do_are_those_of_the_buffers(
    schedule: Schedule, numbers: tuple[Any, Any, Any], part: Fraction
) -> None:
    """From ops, with copies or without, from buffers, and with all events in order.

    Sums of large numerators once ran over 64 bits in the second.
    """
    trace = simulate(schedule, Cost(*numbers, weight_grad_memory=part))
    weights, program, times = trace.sizes.activations, trace.program, trace.timetable
    assert isinstance(weights, Weights)
    column = weights.column(program)
    ledger = Ledger(trace, column)
    every = [ledger.curve(device).peak for device in range(schedule.devices)]

    assert trace.peak_activations == every
    by_op = peaks_by_op(program, weights, times.start, times.end)
    assert (by_op is None) == (part == TINY)
    for swept in (by_op, peaks_by_buffer(program, column, times.start, times.end)):
        for device, peak in enumerate(swept or []):
            assert peak in (None, every[device])


def test_a_program_made_by_hand_is_not_taken_for_its_ops() -> None:
    """Without the buffers that it has lost, nothing is alive."""
    trace = simulate(one_f_one_b(2, 3))
    program = trace.program
    none = Lists.of([[]] * len(program))
    stored = Stored(program.messages, program.buffers, none, none, none)
    bare = dataclasses.replace(program, storage=stored)

    assert trace.peak_activations == [2, 1]
    assert dataclasses.replace(trace, program=bare).peak_activations == [0, 0]


def test_the_peak_of_a_small_timetable() -> None:
    """Device 0 peaks in B0: two micro-batches, a gradient, and the backward's own::

    device 0 | F0 F1 .. B0 .. B1
    device 1 | .. F0 B0 F1 B1 ..
    """
    trace = simulate(
        one_f_one_b(2, 2), dataclasses.replace(COST, forward=5, workspace_bytes=50)
    )
    peak = trace.peak(0)

    assert (peak.device, peak.time, peak.total) == (0, 13, 6000 + 200 + 10 + 50)
    assert trace.program.label(peak.op) == "0B0"
    assert peak.held == (Held(0, 0, 110), Held(0, 1, 100))
    assert peak.by_class == {
        "weights": 1000,
        "gradients": 2000,
        "optimizer": 3000,
        "activations": 200,
        "stored_inputs": 0,
        "weight_grad_stash": 0,
        "boundary": 10,
        "workspace": 50,
        "host": 0,
        "offloaded": 0,
    }


def lines(trace: Trace, name: str, device: int = 0) -> dict[Any, Any]:
    """A class over time, once all that happens at a time has happened."""
    curve = trace.memory(device)
    return dict(zip(curve.time.tolist(), curve.by_class[name].tolist()))


def test_what_w_needs_turns_from_activations_into_its_stash() -> None:
    """F 0-2, I 2-4, W 4-5; I leaves a third of the 90 beside the input of 10."""
    row = [F(0, 0), op(Kind.I, 0, 0), op(Kind.W, 0, 0)]
    cost = dataclasses.replace(COST, input_bytes=10)
    trace = simulate(Schedule.of([row]), cost)

    assert lines(trace, "activations") == {0: 100, 2: 100, 4: 10, 5: 0}
    assert lines(trace, "weight_grad_stash") == {0: 0, 2: 0, 4: 30, 5: 0}
    assert lines(trace, "workspace") == {0: 0, 2: 7, 4: 0, 5: 0}


def test_an_input_is_boundary_until_a_forward_takes_it_up() -> None:
    """Device 0 runs F0 F1 from 0 to 4; device 1 F0 from 2 to 12: input 1 waits."""
    rows = [[F(0, [0, 1]), B(0, [0, 1])], [F(1, [0, 1]), B(1, [0, 1])]]
    cost = dataclasses.replace(COST, forward=[2, 10])
    trace = simulate(Schedule.of(rows), cost)
    activations, boundary = lines(trace, "activations", 1), lines(trace, "boundary", 1)

    assert (activations[2], activations[12]) == (100, 200)
    assert (boundary[2], boundary[12]) == (10, 0)
    assert trace.memory(1).total[-1] == 6000


def test_stored_and_rebuilt_bytes() -> None:
    """F keeps 40 of 100, R adds 25 and not the other 60; nothing arrives with it."""
    schedule = recompute(one_f_one_b(2, 2), "always")
    cost = dataclasses.replace(COST, stored_bytes=40, rebuilt_bytes=25)
    trace = simulate(schedule, cost)

    assert max(lines(trace, "stored_inputs", 0).values()) == 80
    assert max(lines(trace, "activations", 0).values()) == 25
    assert max(lines(trace, "stored_inputs", 1).values()) == 40
    assert max(lines(trace, "boundary", 1).values()) <= 2 * 10
    rest = dataclasses.replace(cost, rebuilt_bytes=None)
    assert max(lines(simulate(schedule, rest), "activations").values()) == 60
    kept = simulate(one_f_one_b(2, 2), cost)
    assert max(lines(kept, "activations").values()) == 200


def test_a_stage_of_its_own_part_for_w() -> None:
    schedule = catalog.make("zb-h1", devices=2, micro_batches=2)
    cost = Cost(
        activation_bytes=12, weight_grad_memory=[Fraction(1, 2), Fraction(1, 4)]
    )
    trace = simulate(schedule, cost)
    sizes = {
        (buffer.stage, trace.sizes.known_bytes()[buffer.index])
        for buffer in map(trace.program.buffer_at, range(len(trace.program.buffers)))
        if buffer.kind == BufferKind.WEIGHT_STASH
    }

    assert sizes == {(0, 6), (1, 3)}
    with pytest.raises(ParameterError, match="weight_grad_memory has 3 numbers for 2"):
        simulate(schedule, Cost(weight_grad_memory=[1, 1, 1]))


def test_replicas_count_on_every_device() -> None:
    """Chimera has both pipes' stages on each device, with all that belongs to them."""
    schedule = catalog.make("chimera", devices=4, micro_batches=4)
    trace = simulate(schedule, COST)

    assert trace.peak(0).by_class["optimizer"] == 2 * 3000
    stages = Counter(one.stage for one in trace.peak(0).held)
    assert set(stages) == {0, 3}


# Fits


def test_what_fits_and_what_does_not() -> None:
    trace = simulate(
        one_f_one_b(2, 2), dataclasses.replace(COST, forward=5, workspace_bytes=50)
    )

    assert fits(trace, memory=6260).ok
    assert str(fits(trace, memory=[6260, 6260])).endswith("micro_batches=2): fits")
    report = fits(trace, memory=6259)
    (finding,) = report.findings
    assert (finding.rule, finding.device, finding.step) == ("memory", 0, 2)
    assert finding.op == B(0, 0)
    assert str(report).splitlines()[:4] == [
        "1f1b(devices=2, micro_batches=2) breaks 1 rule:",
        "  device 0, step 2: 6,260 bytes at 0B0: weights 1,000, gradients 2,000, "
        "optimizer 3,000, activations 200, boundary 10, workspace 50; 2 "
        "(stage:micro-batch) hold it, 0:0 0:1",
        "    device 0 | F0 F1 B0 B1",
        "                     ^^",
    ]
    assert "or allow 6,260 bytes." in str(report)


@given(schedule=schedules(), cap=st.integers(0, 8))
def test_a_cap_on_activations_finds_each_device_above_it(
    schedule: Schedule, cap: int
) -> None:
    trace = simulate(schedule)
    peaks = trace.peak_activations
    above = [device for device, peak in enumerate(peaks) if peak > cap]

    assert [
        finding.device for finding in fits(trace, activations=cap).findings
    ] == above
    assert fits(trace, activations=peaks).ok


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({}, "nothing to hold against: give memory, activations or host_memory"),
        ({"memory": 5}, "no bytes are known"),
        ({"activations": -1}, "activations must be a number of at least 0, .* got -1"),
        ({"activations": [1, 2, 3]}, "activations has 3 numbers for 2 devices"),
    ],
)
def test_refuses_a_cap(caps: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        fits(simulate(one_f_one_b(2, 2)), **caps)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"stored_bytes": 5}, "stage 1: an input of 10 bytes exceeds the 5 stored"),
        ({"stored_bytes": 200}, "a store of 200 bytes exceeds the 100 activation"),
        ({"activation_bytes": 9}, "stage 1: an input of 10 bytes exceeds the 9 activ"),
        ({"workspace_bytes": -1}, "workspace_bytes must be a finite number"),
    ],
)
def test_refuses_bytes_that_cannot_be(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        simulate(one_f_one_b(2, 2), dataclasses.replace(COST, **given_))
