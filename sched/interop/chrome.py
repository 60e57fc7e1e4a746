"""A trace as Chrome's trace events, for Perfetto and chrome://tracing.

A device is a process, a stream a thread. Each instruction is a complete event
("X"); an arrow ("s" to "f") leads from each SEND to its RECV; counters ("C")
show what is alive on each device: activations, in micro-batches of its share,
and bytes by class where the costs give some.

Chrome counts in microseconds and Perfetto in whole nanoseconds. So times are
rounded to nanoseconds here, each end by itself: what does not overlap in the
trace does not overlap in the file. A measured trace is in seconds. For a
predicted one the caller says how long a unit of its costs is.

Events go out one by one, so that a million of them need no more memory than the
trace itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import STAGE_KINDS, Kind, Op
from pipeproof.sched.memory import Curve, Ledger
from pipeproof.sched.trace import Trace

Event = dict[str, Any]

UNITS: dict[str, float] = {"s": 1e6, "ms": 1e3, "us": 1, "ns": 1e-3}
"""Microseconds of each unit that a predicted trace may be in."""

CATEGORIES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.R: "recompute",
    Kind.STEP: "optimizer step",
}


def write_chrome(
    trace: Trace,
    file: TextIO,
    *,
    microseconds: Number | None = None,
    beside: Trace | None = None,
) -> None:
    """Write a trace as one JSON object of trace events.

    Args:
        trace: predicted or measured.
        file: open for writing text.
        beside: another in the same unit of time, such as what was predicted of a
            measured one; its devices follow those of the first.
        microseconds: how many a unit of the trace's time is. Default: a
            million if measured, since that is in seconds; a thousand if
            predicted, taking the costs for milliseconds.

    Raises:
        ParameterError: microseconds not above 0, or times beyond 2⁵³
            nanoseconds (104 days).
    """
    schedule = trace.program.schedule
    about = {
        "schedule": schedule.summary,
        "digest": schedule.digest,
        "source": trace.source,
        "microseconds_per_unit": float(_scale(trace, microseconds)),
        "notes": list(trace.notes),
    }
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},')
    file.write('"traceEvents":[')
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    between = "\n"
    events = chrome_events(trace, microseconds=microseconds)
    if beside is not None:
        second = chrome_events(beside, microseconds=_scale(trace, microseconds))
        moved = _behind(trace, second)
        events = chain(_said(trace, events), _said(beside, moved))
    for event in events:
        file.write(between + encode(event))
        between = ",\n"
    file.write("\n]}\n")


def chrome_events(
    trace: Trace, *, microseconds: Number | None = None
) -> Iterator[Event]:
    """The events, one at a time; arguments as of `write_chrome`.

    Each thread's are in the order of time, and so is each counter.
    """
    scale = float(_scale(trace, microseconds)) * 1e3
    clock = _Clock(scale)
    yield from _names(trace)
    for number in range(len(trace.program.streams)):
        yield from _stream(trace, number, clock)
    ledger = Ledger(trace, trace.sizes.activations)
    for device in range(trace.program.schedule.devices):
        alive = ledger.curve(device)
        total = Curve(alive.time, {"activations": alive.total})
        yield from _counter("activations", device, total, clock)
        if trace.sizes.bytes is not None:
            yield from _counter("bytes", device, trace.memory(device), clock)


def _said(trace: Trace, events: Iterator[Event]) -> Iterator[Event]:
    """With what each device's trace is: predicted or measured."""
    for event in events:
        if event["name"] == "process_name":
            name = f"{event['args']['name']}, {trace.source}"
            event = {**event, "args": {"name": name}}
        yield event


def _behind(trace: Trace, events: Iterator[Event]) -> Iterator[Event]:
    """Another trace's, with numbers of their own behind those of this one."""
    devices, messages = trace.program.schedule.devices, len(trace.program.messages)
    for event in events:
        event["pid"] += devices
        if event["name"] == "process_sort_index":
            event["args"] = {"sort_index": event["args"]["sort_index"] + devices}
        if "id" in event:
            event["id"] += messages
        yield event


def _scale(trace: Trace, microseconds: Number | None) -> Number:
    if microseconds is None:
        return UNITS["s"] if trace.source == "measured" else UNITS["ms"]
    if not microseconds > 0:
        raise ParameterError(f"microseconds must be above 0, got {microseconds}")
    return microseconds


class _Clock:
    """Times of a trace in whole nanoseconds, and as Chrome writes them."""

    def __init__(self, nanoseconds: float) -> None:
        self._nanoseconds = nanoseconds

    def __call__(self, times: NDArray[Any]) -> list[int]:
        scaled = np.rint(times.astype(np.float64) * self._nanoseconds)
        if not (np.abs(scaled) <= 2**53).all():
            raise ParameterError(
                "times exceed 104 days, all that a Chrome trace can tell apart to "
                "the nanosecond: give a smaller unit of time"
            )
        return [int(time) for time in scaled.tolist()]


def _names(trace: Trace) -> Iterator[Event]:
    program = trace.program

    def name(what: str, device: int, **args: Any) -> Event:
        thread = {"tid": args.pop("tid")} if "tid" in args else {}
        return {"ph": "M", "name": what, "pid": device, **thread, "args": args}

    for device in range(program.schedule.devices):
        yield name("process_name", device, name=f"device {device}")
        yield name("process_sort_index", device, sort_index=device)
    for tid, stream in enumerate(program.streams):
        yield name("thread_name", stream.device, tid=tid, name=str(stream))
        yield name("thread_sort_index", stream.device, tid=tid, sort_index=tid)


def _stream(trace: Trace, number: int, clock: _Clock) -> Iterator[Event]:
    program = trace.program
    device = program.streams[number].device
    members = program.by_stream[number]
    columns = (
        members.tolist(),
        program.action[members].tolist(),
        clock(trace.start[members]),
        clock(trace.end[members]),
    )
    for index, action, start, end in zip(*columns):
        where = {"pid": device, "tid": number}
        what = (
            _computed(trace, index)
            if action == Action.COMPUTE
            else _moved(trace, index, Action(action))
        )
        times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
        yield {"ph": "X", **what, **where, **times}
        arrow = {"name": "message", "cat": "message"}
        message = int(program.message[index])
        if action == Action.SEND:
            yield {"ph": "s", "id": message, **arrow, **where, "ts": start / 1e3}
        elif action == Action.RECV:
            at = {"ts": end / 1e3, "bp": "e"}
            yield {"ph": "f", "id": message, **arrow, **where, **at}


def _computed(trace: Trace, index: int) -> Event:
    program = trace.program
    first, count = int(program.first_op[index]), int(program.op_count[index])
    ops = [program.schedule.ops[first + i] for i in range(count)]
    label = "&".join(map(str, ops))
    category = "overlap" if count > 1 else _category(ops[0])
    about = {"op": label, **_place(ops[0]), "instruction": index}
    return {"name": label, "cat": category, "args": about}


def _category(op: Op) -> str:
    return CATEGORIES.get(op.kind, op.kind.name.lower())


def _place(op: Op) -> Event:
    if op.kind in STAGE_KINDS:
        return {"stage": op.stage}
    place = {"stage": op.stage, "micro_batch": op.micro_batch}
    return place | ({"slice": op.slice} if op.slice else {})


def _moved(trace: Trace, index: int, action: Action) -> Event:
    program = trace.program
    verb = action.name.lower()
    about: Event = {"op": action.name, "instruction": index}
    if program.message[index] < 0:
        return {"name": program.label(index), "cat": verb, "args": about}
    message = program.message_at(int(program.message[index]))
    mine = message.source_stage if action == Action.SEND else message.target_stage
    about |= {
        "message": str(message),
        "stage": mine,
        "micro_batch": message.micro_batch,
    }
    return {"name": f"{verb} {message}", "cat": verb, "args": about}


def _counter(name: str, device: int, curve: Curve, clock: _Clock) -> Iterator[Event]:
    lines = {key: line for key, line in curve.by_class.items() if (line != 0).any()}
    if not lines:
        return
    columns = [line.tolist() for line in lines.values()]
    for time, *values in zip(clock(curve.time), *columns):
        alive = dict(zip(lines, map(_plain, values)))
        yield {
            "ph": "C",
            "name": name,
            "pid": device,
            "ts": time / 1e3,
            "args": alive,
        }


def _plain(number: Any) -> int | float:
    return number if isinstance(number, int) else float(number)
