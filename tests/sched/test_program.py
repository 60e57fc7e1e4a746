import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from strategies import BESIDE, schedules, whole_language
from test_contract import POLICIES, keeps_its_promises

import pipeproof.sched
from pipeproof.sched import (
    Action,
    B,
    BufferKind,
    F,
    I,
    Kind,
    Placement,
    Program,
    Schedule,
    W,
    catalog,
    lower,
    op,
)

TWO_DEVICES = lower(catalog.make("1f1b", devices=2, micro_batches=3))


def test_the_chapter_lists_what_is_lowered() -> None:
    assert pipeproof.sched.__file__ is not None
    chapter = Path(pipeproof.sched.__file__).with_name("PROGRAM.md").read_text("utf-8")

    assert f"```\n{TWO_DEVICES.describe()}\n```\n" in chapter
    rows = "\n".join(TWO_DEVICES.schedule.format().splitlines()[-2:])
    assert f"```\n{rows}\n```\n" in chapter


def test_an_instruction_spells_out_what_it_touches() -> None:
    recv = TWO_DEVICES[14]

    assert (recv.label, str(recv.stream)) == (
        "recv activation 0→1:2",
        "receive from 0",
    )
    assert recv.message is not None
    assert (recv.message.send, recv.message.recv) == (13, 14)
    assert recv.waits_for == (7,)
    assert [str(b) for b in recv.writes] == ["input 1:2"]
    taken = TWO_DEVICES.buffer_at(recv.writes[0].takes_over)
    assert str(taken) == "input 1:0"
    assert taken in TWO_DEVICES[7].frees
    assert TWO_DEVICES[-1].index == len(TWO_DEVICES) - 1
    with pytest.raises(IndexError, match="instruction 24 of 24"):
        TWO_DEVICES[24]


def test_a_turn_is_handed_over_on_the_device() -> None:
    schedule = Schedule.of(
        [[F(0, 0), F(1, 0), B(1, 0), B(0, 0)]], placement=Placement.v(1)
    )

    assert lower(schedule).describe().splitlines() == [
        "device 0, compute:",
        "    0 0F0; writes activation 0:0, input 0:0, output 0:0",
        "    1 local output 0:0; reads output 0:0; writes input 1:0; frees output 0:0",
        "    2 1F0; reads input 1:0; writes activation 1:0",
        "    3 1B0; reads activation 1:0, input 1:0; writes input_grad 1:0, gradient "
        "1; frees activation 1:0, input 1:0",
        "    4 local input_grad 1:0; reads input_grad 1:0; writes output_grad 0:0; "
        "frees input_grad 1:0",
        "    5 0B0; reads activation 0:0, input 0:0, output_grad 0:0; writes gradient "
        "0; frees activation 0:0, input 0:0, output_grad 0:0",
    ]


def test_a_split_backward_stashes_for_w_and_recompute_stores_its_input() -> None:
    schedule = Schedule.of([[F(0, 0), pipeproof.sched.R(0, 0), I(0, 0), W(0, 0)]])
    program = lower(schedule)
    kinds = [BufferKind(int(kind)).name for kind in program.buffers[:, 0]]

    assert kinds == ["ACTIVATION", "WEIGHT_STASH", "STORED_INPUT", "GRADIENT"]
    assert program.describe().splitlines()[1:] == [
        "    0 0F0; writes stored_input 0:0",
        "    1 0R0; reads stored_input 0:0; writes activation 0:0, weight_stash 0:0",
        "    2 0I0; reads activation 0:0; writes weight_stash 0:0; frees "
        "activation 0:0",
        "    3 0W0; reads weight_stash 0:0, stored_input 0:0; writes gradient 0; frees "
        "weight_stash 0:0, stored_input 0:0",
    ]


@given(schedule=schedules() | whole_language())
def test_any_schedule_lowers_to_a_sound_program(schedule: Schedule) -> None:
    rows = [
        [op for op in schedule.row(d) if op.kind not in BESIDE]
        for d in range(schedule.devices)
    ]
    for policy in POLICIES:
        program = lower(schedule, **policy)
        keeps_its_promises(program)
        assert computed(program) == rows


def computed(program: Program) -> list[list[object]]:
    """The ops of each compute stream, in order."""
    streams = program.by_stream[: program.schedule.devices]
    return [[op for i in members for op in program[i].ops] for members in streams]


@given(schedule=schedules() | whole_language())
def test_lowers_the_same_every_time(schedule: Schedule) -> None:
    """Ranks lower for themselves, and must agree."""
    first, again = lower(schedule), lower(Schedule.parse(schedule.format()))

    assert first.describe() == again.describe()
    assert first.streams == again.streams
    for field in dataclasses.fields(first):
        column = getattr(first, field.name)
        if isinstance(column, np.ndarray):
            assert (column == getattr(again, field.name)).all()


def test_a_replica_that_no_micro_batch_passes_is_reduced_too() -> None:
    """Its REDUCE once read the gradient of another device."""
    program = lower(
        Schedule.of(
            [[op(Kind.REDUCE, 0)], [F(0, 0), B(0, 0), op(Kind.REDUCE, 0)]],
            placement=Placement(((1,), (0,))),
            pipe_of=[0],
        )
    )
    reductions = [program[i] for i in np.flatnonzero(program.action == Action.REDUCE)]

    assert [[buffer.device for buffer in r.reads] for r in reductions] == [[0], [1]]


def test_more_than_a_hundred_stages() -> None:
    """A kind of message is a byte, and was multiplied by the number of stages."""
    program = lower(catalog.make("1f1b", devices=200, micro_batches=2))

    assert (program.action == Action.SEND).sum() == 2 * 2 * 199
