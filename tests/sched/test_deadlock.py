"""Deadlocks: the graph of waits against the engine that plays the program."""

import dataclasses
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import assembled, parts_of
from strategies import schedules
from test_contract import POLICIES, each_row

from pipeproof.sched import (
    Action,
    B,
    F,
    ParameterError,
    Program,
    Schedule,
    catalog,
    check,
    lower,
)
from pipeproof.sched.cycles import DRAWN, drawn
from pipeproof.sched.deadlock import deadlocks
from pipeproof.sched.program import Stored
from pipeproof.sched.row import Case, Row
from pipeproof.sched.streams import STREAM_MODELS, Buffering, StreamModel
from pipeproof.sim import Cluster, DeadlockError
from pipeproof.sim.engine import play
from pipeproof.sim.timing import Timing

models = st.sampled_from(STREAM_MODELS)
bufferings = st.sampled_from(["rendezvous", "eager", 1, 2])


def with_swaps(program: Program, times: int, dice: random.Random) -> Program:
    """Some instructions of one stream, mostly of communication, change places."""
    parts = parts_of(program)
    for _ in range(times):
        at = dice.choice([p for p in parts if p.message >= 0] or parts)
        same = [i for i, p in enumerate(parts) if p.stream == at.stream]
        one, two = dice.choice(same), dice.choice(same)
        parts[one], parts[two] = parts[two], parts[one]
    return assembled(program, parts)


def runs(program: Program, streams: StreamModel, buffering: Buffering) -> bool:
    timing = Timing.each(np.ones(len(program)), np.zeros(len(program.messages)), None)
    try:
        play(program, timing, Cluster(streams=streams, buffering=buffering))
    except DeadlockError:
        return False
    return True


@settings(max_examples=80)
@given(
    schedule=schedules(slices=1),
    policy=st.sampled_from(POLICIES),
    streams=models,
    buffering=bufferings,
    swaps=st.integers(0, 4),
    dice=st.randoms(use_true_random=False),
)
def test_without_deadlock_is_what_the_engine_gets_through(
    schedule: Schedule,
    policy: dict[str, Any],
    streams: StreamModel,
    buffering: Buffering,
    swaps: int,
    dice: random.Random,
) -> None:
    program = with_swaps(lower(schedule, **policy), swaps, dice)

    found = deadlocks(program, streams, buffering)
    assert (not found) == runs(program, streams, buffering)
    if not deadlocks(program, streams, "rendezvous"):
        assert not found


@each_row
@pytest.mark.parametrize("streams", STREAM_MODELS)
def test_what_is_lowered_does_not_deadlock(row: Row, streams: StreamModel) -> None:
    if not row.allows(Case(2, 4)):
        return
    for policy in POLICIES:
        program = lower(row.generator(2, 4), **policy)
        check(program, streams=streams).raise_if_bad()


def crossing() -> Program:
    """1F1B whose device 1 sends a gradient before it posts a receive."""
    program = lower(catalog.make("1f1b", devices=2, micro_batches=2))
    parts = parts_of(program)
    recv = next(p for p in parts if program.label(p.key) == "recv activation 0→1:1")
    parts.remove(recv)
    at = next(
        i
        for i, p in enumerate(parts)
        if p.action == Action.SEND and program.label(p.key) == "send gradient 1→0:0"
    )
    parts.insert(at + 1, recv)
    return assembled(program, parts)


def test_a_cycle_is_named() -> None:
    program = crossing()

    assert check(program).ok
    report = check(program, streams="one")
    assert [finding.rule for finding in report.findings] == ["deadlock"]
    assert report.findings[0].found == (
        "a cycle of waits, and 10 instructions that never end: "
        "recv activation 0→1:1 (8, device 1, receive from 0) waits for "
        "send gradient 1→0:0 (7, device 1, send to 0) waits for "
        "recv gradient 1→0:0 (9, device 0, receive from 1) waits for "
        "send activation 0→1:1 (4, device 0, send to 1) waits for "
        "recv activation 0→1:1 (8, device 1, receive from 0)"
    )
    assert check(program, streams="one", buffering="eager").ok


def waiting(program: Program, label: str, other: str) -> Program:
    """One instruction waits for another one too."""
    parts = parts_of(program)
    of = {program.label(part.key): part for part in parts}
    of[label].waits.append(of[other].key)
    return assembled(program, parts)


def test_a_cycle_may_go_through_the_first_instruction() -> None:
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))

    ring = waiting(program, "0F0", "recv gradient 1→0:0")
    (finding,) = deadlocks(ring)
    assert all(deadlocks(ring, buffering=buffers) for buffers in ("eager", 1))
    assert finding.device == 0
    assert finding.found == (
        "a cycle of waits, and 8 instructions that never end: "
        "0F0 (0, device 0, compute) waits for "
        "recv gradient 1→0:0 (6, device 0, receive from 1) waits for "
        "send gradient 1→0:0 (5, device 1, send to 0) waits for "
        "1B0 (4, device 1, compute) waits for "
        "1F0 (3, device 1, compute) waits for "
        "recv activation 0→1:0 (2, device 1, receive from 0) waits for "
        "send activation 0→1:0 (1, device 0, send to 1) waits for "
        "0F0 (0, device 0, compute)"
    )


def test_a_reduction_that_not_all_come_to_is_named() -> None:
    program = lower(catalog.make("chimera", devices=2, micro_batches=2))
    left = [
        part
        for part in parts_of(program)
        if (program.label(part.key), int(program.device[part.key])) != ("0REDUCE", 0)
    ]

    (finding,) = check(assembled(program, left)).findings
    assert (finding.rule, finding.device) == ("reduce", 1)
    assert finding.expected == "the REDUCE of stage 0 on each of devices 0, 1"
    assert finding.found == "it on 1"


def test_reductions_in_another_order_on_each_device_hang() -> None:
    program = lower(catalog.make("chimera", devices=2, micro_batches=2))
    parts = parts_of(program)
    one, two = (
        i
        for i, part in enumerate(parts)
        if part.action == Action.REDUCE and program.device[part.key] == 1
    )
    parts[one], parts[two] = parts[two], parts[one]

    (finding,) = check(assembled(program, parts)).findings
    assert finding.found == (
        "a cycle of waits, and 4 instructions that never end: "
        "1REDUCE (15, device 0, reduce) waits for "
        "1REDUCE (19, device 1, reduce) waits for "
        "0REDUCE (16, device 1, reduce) waits for "
        "0REDUCE (18, device 0, reduce) waits for "
        "1REDUCE (15, device 0, reduce)"
    )
    assert not runs(assembled(program, parts), "dir", "eager")


def test_what_waits_for_itself_is_a_cycle() -> None:
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))

    (finding,) = deadlocks(waiting(program, "1B0", "1B0"))
    assert finding.device == 1
    assert finding.found.endswith(
        "1B0 (4, device 1, compute) waits for 1B0 (4, device 1, compute)"
    )


def test_a_cycle_is_drawn() -> None:
    report = check(crossing(), streams="one")

    lines = str(report).splitlines()
    at = next(i for i, line in enumerate(lines) if "cycle of waits" in line)
    assert "\n".join(lines[at + 1 : at + 6]) == (
        "    device 0 | 4 send activation 0→1:1 <-- 9 recv gradient 1→0:0\n"
        "               `-> 8\n"
        "    device 1 | 7 send gradient 1→0:0 <-- 8 recv activation 0→1:1\n"
        "               `-> 9\n"
        "    expected: a program that runs through with streams 'one' and "
        "buffering 'rendezvous'"
    )


def test_what_is_not_drawn_of_a_long_cycle_is_counted() -> None:
    program = lower(catalog.make("gpipe", devices=4, micro_batches=8))
    ring = list(range(20, 5, -1))

    picture = drawn(program, ring)

    found = [re.findall(r"(?:\||<--|\.\.\.) +(\d+) ", line) for line in picture]
    assert (
        sorted(int(number) for line in found for number in line)
        == ring[DRAWN - 1 :: -1]
    )
    assert picture[-1] == (
        "… 7 more of the cycle's 15 instructions are not drawn: 12 waits, through "
        "them, for 20"
    )
    assert not any("not drawn" in line for line in drawn(program, ring[:DRAWN]))


def test_receives_in_another_order_than_sends_are_found() -> None:
    program = lower(catalog.make("gpipe", devices=2, micro_batches=3))
    parts = parts_of(program)
    one, two = (
        next(i for i, p in enumerate(parts) if program.label(p.key) == label)
        for label in ("recv activation 0→1:1", "recv activation 0→1:2")
    )
    parts[one], parts[two] = parts[two], parts[one]

    (finding,) = check(assembled(program, parts)).findings
    assert finding.rule == "fifo"
    assert str(finding) == (
        "device 0: activation 0→1:2 is received where activation 0→1:1 was sent; "
        "expected message 2 that device 1 receives from 0 is message 2 that was sent. "
        "Post receives in the order of the sends: a link has no labels."
    )


def test_each_link_out_of_order_is_named_once() -> None:
    program = lower(catalog.make("gpipe", devices=2, micro_batches=4))
    parts = parts_of(program)
    place = {program.label(part.key): i for i, part in enumerate(parts)}
    for one, two in (("0→1:0", "0→1:2"), ("0→1:1", "0→1:3")):
        i, j = place[f"recv activation {one}"], place[f"recv activation {two}"]
        parts[i], parts[j] = parts[j], parts[i]
    i, j = place["recv gradient 1→0:2"], place["recv gradient 1→0:0"]
    parts[i], parts[j] = parts[j], parts[i]

    found = check(assembled(program, parts)).findings
    assert [(f.rule, f.device, f.found) for f in found] == [
        ("fifo", 0, "activation 0→1:2 is received where activation 0→1:0 was sent"),
        ("fifo", 1, "gradient 1→0:0 is received where gradient 1→0:2 was sent"),
    ]
    assert [f.expected for f in found] == [
        "message 1 that device 1 receives from 0 is message 1 that was sent",
        "message 2 that device 0 receives from 1 is message 2 that was sent",
    ]


def test_a_message_on_another_link_is_found() -> None:
    program = lower(catalog.make("1f1b", devices=3, micro_batches=2))
    parts = parts_of(program)
    of = {program.label(part.key): part for part in parts}
    of["send gradient 1→0:0"].stream = of["send activation 1→2:0"].stream

    found = check(assembled(program, parts)).findings
    assert [(finding.rule, finding.device) for finding in found] == [
        ("message", 1),
        ("message", 1),
    ]
    assert "a send on the stream 'send to 2', is not that of" in found[0].found
    assert found[1].found == "0 of them"


def test_instructions_and_messages_name_each_other() -> None:
    program = lower(catalog.make("gpipe", devices=2, micro_batches=1))
    send = int(program.send_of[0])
    column, messages = program.message.copy(), program.messages.copy()
    column[send] = len(messages)
    messages[0, 8] = -1
    unknown = dataclasses.replace(program, message=column)
    touched = program.reads, program.writes, program.frees
    unnamed = dataclasses.replace(
        program, storage=Stored(messages, program.buffers, *touched)
    )

    for broken in (unknown, unnamed):
        first, second = check(broken).findings
        assert first.found == (
            f"instruction {send}, a send on the stream 'send to 1', is not that of the "
            "message it names"
        )
        assert second.found == "0 of them"


def test_a_message_that_nobody_receives_is_found() -> None:
    program = lower(catalog.make("gpipe", devices=2, micro_batches=1))
    for action, at in ((Action.RECV, [1, 0]), (Action.SEND, [0, 1])):
        parts = [p for p in parts_of(program) if p.action != action]

        found = check(assembled(program, parts)).findings
        assert [finding.found for finding in found] == ["0 of them"] * 2
        assert [finding.device for finding in found] == at


def test_as_many_buffers_as_messages_cross_save_two_that_send_first() -> None:
    """In one stream each device sends both of its messages, then receives two."""
    program = lower(catalog.make("gpipe", devices=2, micro_batches=2))
    parts = sorted(parts_of(program), key=lambda part: part.action != Action.SEND)
    for part in parts:
        part.waits = []
    exchange = assembled(program, parts)

    for buffering, ok in (
        ("rendezvous", False),
        (1, False),
        (2, True),
        ("eager", True),
    ):
        assert check(exchange, streams="one", buffering=buffering).ok == ok
        assert runs(exchange, "one", buffering) == ok


def test_refuses_models_that_there_are_not() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=1)

    with pytest.raises(ParameterError, match="streams must be one of dir, pair, one"):
        check(schedule, streams="two")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="of at least 1, got 0"):
        check(schedule, buffering=0)
    broken = Schedule.of([[B(0, 0), F(0, 0)]])
    with pytest.raises(ParameterError, match="streams must be one of dir, pair, one"):
        check(broken, streams="two")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="of at least 1, got True"):
        deadlocks(lower(schedule), buffering=True)
    with pytest.raises(ParameterError, match="check judges a Schedule or a Program"):
        check("1f1b")  # type: ignore[arg-type]
