"""What every row of the catalogue keeps, whatever its name."""

import inspect
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, sizes

from pipeproof.sched import (
    CATALOG,
    Action,
    BufferKind,
    ParameterError,
    Program,
    Schedule,
    Trace,
    catalog,
    check,
    lower,
)
from pipeproof.sched.row import Case, Row
from pipeproof.sim import Cost, simulate

ROWS = [pytest.param(row, id=name) for name, row in CATALOG.items()]
SIZES = [
    (p, m)
    for p in (*range(1, 9), 16)
    for m in sorted({1, max(1, p - 1), p, 2 * p, 3 * p + 1})
]
POLICIES: list[dict[str, Any]] = [
    *(
        {"transfers": transfers, "receives": receives}
        for transfers in ("overlapped", "blocking")
        for receives in ("early", "late")
    ),
    {"messages": "grouped"},
    {"messages": "grouped", "transfers": "blocking", "receives": "late"},
]

each_row = pytest.mark.parametrize("row", ROWS)
each_size = pytest.mark.parametrize(("p", "m"), SIZES)


def idle_of(run: Trace, row: Row) -> Any:
    """The idle time that the row's formula is about."""
    match row.idle_of:
        case "step":
            return run.makespan - run.ideal
        case "span":
            return run.span - run.ideal
        case "most":
            return run.makespan - min(run.busy)


def keeps_its_formulas(row: Row, case: Case) -> None:
    """Exact where they hold; within the row's bounds where they do not."""
    if not row.allows(case):
        with pytest.raises(ParameterError):
            row.make(case)
        return
    schedule = row.make(case)
    cost = Cost(case.forward, case.input_grad, case.weight_grad, overlap=case.overlap)
    run = simulate(schedule, cost)
    assert str(check(schedule)).endswith("complete, ordered and free of cycles")
    idle = idle_of(run, row)
    if row.holds(case):
        assert idle == row.idle(case)
        peaks = [row.peak_of(case, d) for d in range(schedule.devices)]
        assert run.peak_activations == peaks
    else:
        low, high = row.bounds(case)
        assert low <= idle
        assert high is None or idle <= high


@each_row
@each_size
def test_is_clean_and_as_good_as_published(row: Row, p: int, m: int) -> None:
    keeps_its_formulas(row, Case(p, m))


@each_row
@given(p=sizes, m=sizes, cost=costs)
def test_formulas_hold_for_other_times(row: Row, p: int, m: int, cost: Cost) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad

    keeps_its_formulas(row, Case(p, m, {}, *times))


@each_row
@each_size
def test_text_form_round_trips(row: Row, p: int, m: int) -> None:
    if not row.allows(Case(p, m)):
        return
    schedule = row.generator(p, m)
    text = schedule.format()
    again = Schedule.parse(text)

    assert again == schedule
    assert (again.name, again.format()) == (schedule.name, text)
    assert f"name: {row.name}\n" in text


@each_row
@each_size
def test_program_keeps_its_promises(row: Row, p: int, m: int) -> None:
    if not row.allows(Case(p, m)):
        return
    for policy in POLICIES:
        keeps_its_promises(lower(row.generator(p, m), **policy))


def keeps_its_promises(program: Program) -> None:
    """Acyclic as listed, links first in first out, buffers born, read and freed."""
    stream, device = program.stream.tolist(), program.device.tolist()
    for i, waits in enumerate(program.waits_for.to_lists()):
        assert all(j < i and stream[j] != stream[i] for j in waits)
        assert all(device[j] == device[i] for j in waits)
    links: dict[tuple[int, int], tuple[list[int], list[int]]]
    links = defaultdict(lambda: ([], []))
    for i in np.flatnonzero(program.message >= 0).tolist():
        instruction = program[i]
        message = instruction.message
        assert message is not None
        side = instruction.action == Action.RECV
        ends = message.source, message.target
        links[ends][side].append(message.index)
        assert (instruction.stream.device, instruction.stream.peer) == ends[
            :: 1 - 2 * side
        ]
        assert i == (message.recv if side else message.send)
        assert message.send < message.recv
    assert all(sent == received for sent, received in links.values())
    stays_in_its_own_memory(program)
    buffers_are_sound(program)


def stays_in_its_own_memory(program: Program) -> None:
    """Only copies touch buffers elsewhere, on the device that `offload_to` names."""
    home = program.buffers[:, 1]
    guests = program.buffers[:, 0] == BufferKind.OFFLOADED
    for touched in (program.reads, program.writes, program.frees):
        device = program.device[touched.owner]
        away = guests[touched.values]
        assert (home[touched.values[~away]] == device[~away]).all()
        for i, buffer in zip(touched.owner[away], touched.values[away]):
            stream = program.streams[program.stream[i]]
            assert program.action[i] == Action.COPY
            assert stream.peer == home[buffer] != stream.device
            assert stream.peer == program.schedule.offload_to[stream.device]


def buffers_are_sound(program: Program) -> None:
    """Written before read, freed once and last, slots taken over only when free."""
    reads, writes = program.reads.to_lists(), program.writes.to_lists()
    behind = ancestors(program)
    written_by: dict[int, int] = {}
    freed_by: dict[int, int] = {}
    for i, freed in enumerate(program.frees.to_lists()):
        for buffer in writes[i]:
            written_by.setdefault(buffer, i)
        for buffer in reads[i]:
            assert buffer not in freed_by
            assert (behind[i] | 1 << i) >> written_by[buffer] & 1
        for buffer in freed:
            assert freed_by.setdefault(buffer, i) == i
    for buffer, (kind, *_, takes_over) in enumerate(program.buffers.tolist()):
        stays = (BufferKind.GRADIENT, BufferKind.TIED)
        assert (buffer in freed_by) == (kind not in stays)
        if takes_over >= 0:
            assert behind[written_by[buffer]] >> freed_by[takes_over] & 1
    slots = program.buffers[:, 5]
    assert np.bincount(slots[slots >= 0]).max(initial=0) <= 1


def ancestors(program: Program) -> list[int]:
    """For each instruction all that is done before it starts, as a set of bits."""
    result: list[int] = []
    last: dict[int, int] = {}
    for i, stream in enumerate(program.stream.tolist()):
        direct = [*program.waits_for[i], *([last[stream]] if stream in last else [])]
        before = 0
        for other in direct:
            before |= result[other] | 1 << other
        if program.action[i] == Action.RECV:  # what it brings was written before
            send = int(program.send_of[program.message[i]])
            before |= result[send] | 1 << send
        result.append(before)
        last[stream] = i
    return result


@each_row
def test_docstring_draws_what_is_simulated(row: Row) -> None:
    text = inspect.getdoc(row.generator)
    assert text is not None
    ((head, picture),) = re.findall(
        r"With (p=.*?), every op one tick::\n\n((?: {4}device .*\n)+)", text
    )
    given = dict(re.findall(r"(\w+)=(\d+)", head))
    options = {key: int(value) for key, value in given.items() if key not in "pm"}
    schedule = row.generator(int(given["p"]), int(given["m"]), **options)
    run = simulate(schedule, Cost(forward=1, input_grad=1, weight_grad=0))

    assert run.grid() == inspect.cleandoc(picture)


@each_row
def test_docstring_has_its_parts_in_order(row: Row) -> None:
    text = inspect.getdoc(row.generator)
    assert text is not None
    parts = ["Placement:", "Bubble:", "Peak memory:", "Args:", "Raises:", "Source:"]
    places = [text.find(f"\n{part}") for part in parts]

    assert -1 not in places
    assert places == sorted(places)


@each_row
@given(wrong=st.sampled_from([0, -3]))
def test_says_which_size_is_wrong(row: Row, wrong: int) -> None:
    for name in ("devices", "micro_batches"):
        sizes_ = {"devices": 2, "micro_batches": 2, name: wrong}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {wrong}"):
            catalog.make(row.name, **sizes_)
