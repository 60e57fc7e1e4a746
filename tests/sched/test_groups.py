"""Messages posted in groups: which they are, and that they cannot deadlock."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import assembled, parts_of
from strategies import schedules, whole_language
from test_contract import each_row

from pipeproof.sched import (
    Action,
    ParameterError,
    Program,
    Schedule,
    catalog,
    check,
    lower,
    prove,
)
from pipeproof.sched.groups import needs, turns_of_others
from pipeproof.sched.lists import Lists
from pipeproof.sched.matching import misgrouped
from pipeproof.sched.row import Case, Row
from pipeproof.sched.streams import (
    STREAM_MODELS,
    Buffering,
    StreamModel,
    in_turn,
    turn_of,
)

bufferings = st.sampled_from(["rendezvous", "eager", 1, 2])
policies = st.fixed_dictionaries(
    {
        "transfers": st.sampled_from(["overlapped", "blocking"]),
        "receives": st.sampled_from(["early", "late"]),
    }
)


def posted(program: Program) -> list[str]:
    """The groups, in words."""
    return [
        f"device {program.device[group[0]]}: {' & '.join(map(program.label, group))}"
        for group in program.groups.to_lists()
    ]


def test_the_steady_state_of_1f1b_is_exchanges() -> None:
    """As Megatron pairs a send forward with a receive backward, and the other way."""
    program = lower(
        catalog.make("1f1b", devices=3, micro_batches=4), messages="grouped"
    )

    assert posted(program) == [
        "device 1: send activation 1→2:1 & recv gradient 2→1:0",
        "device 2: recv activation 1→2:1 & send gradient 2→1:0",
        "device 0: send activation 0→1:2 & recv gradient 1→0:0",
        "device 1: recv activation 0→1:2 & send gradient 1→0:0",
        "device 1: send activation 1→2:2 & recv gradient 2→1:1",
        "device 2: recv activation 1→2:2 & send gradient 2→1:1",
        "device 0: send activation 0→1:3 & recv gradient 1→0:1",
        "device 1: recv activation 0→1:3 & send gradient 1→0:1",
        "device 1: send activation 1→2:3 & recv gradient 2→1:2",
        "device 2: recv activation 1→2:3 & send gradient 2→1:2",
    ]


def test_where_nothing_is_exchanged_there_are_no_groups() -> None:
    """GPipe sends all of one direction, then all of the other."""
    schedule = catalog.make("gpipe", devices=3, micro_batches=4)
    program = lower(schedule, messages="grouped")

    assert not len(program.groups)
    assert program.describe() == lower(schedule).describe()


def test_a_group_is_listed_side_by_side() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)

    assert lower(schedule, messages="grouped").describe().splitlines()[-12:-3] == [
        "device 0, send to 1:",
        "    1 send activation 0→1:0 after 0; reads output 0:0; frees output 0:0",
        "    6 send activation 0→1:1 with 9 after 3; reads output 0:1; frees output "
        "0:1",
        "device 1, receive from 0:",
        "    2 recv activation 0→1:0; writes input 1:0",
        "    7 recv activation 0→1:1 with 8 after 5; writes input 1:1",
        "device 1, send to 0:",
        "    8 send gradient 1→0:0 with 7 after 5; reads input_grad 1:0; frees "
        "input_grad 1:0",
        "   13 send gradient 1→0:1 after 12; reads input_grad 1:1; frees input_grad "
        "1:1",
    ]


@settings(max_examples=40)
@given(schedule=schedules() | whole_language(), policy=policies)
def test_a_group_is_what_two_ops_of_each_device_stand_around(
    schedule: Schedule, policy: dict[str, Any]
) -> None:
    """One send, one receive, one peer; and all such are grouped."""
    program = lower(schedule, messages="grouped", **policy)
    behind: dict[int, int] = {}  # of each COMPUTE the next one of its device
    for device in range(schedule.devices):
        mine = program.by_stream[device]
        mine = mine[program.action[mine] == Action.COMPUTE]
        behind.update(pairwise(mine.tolist()))
    writer = {b: i for i in program.computes.tolist() for b in program.writes[i]}
    reader: dict[int, int] = {}
    for i in program.computes.tolist():
        for buffer in program.reads[i]:
            reader.setdefault(buffer, i)
    ends = {}
    for number in range(len(program.messages)):
        send, recv = int(program.send_of[number]), int(program.recv_of[number])
        from_op, to_op = writer[program.reads[send][0]], reader[program.writes[recv][0]]
        ends[number] = from_op, to_op
    for group in program.groups.to_lists():
        (one, two) = (program[i] for i in group)
        assert one.stream.device == two.stream.device
        assert one.stream.peer == two.stream.peer
        assert {one.action, two.action} == {Action.SEND, Action.RECV}
        send, recv = (i.message for i in sorted((one, two), key=lambda i: i.action))
        assert send is not None
        assert recv is not None
        assert behind[ends[send.index][0]] == ends[recv.index][1]
        assert behind[ends[recv.index][0]] == ends[send.index][1]
    pairs = [
        (a, b)
        for a in ends
        for b in ends
        if behind.get(ends[a][0]) == ends[b][1] and behind.get(ends[b][0]) == ends[a][1]
    ]
    assert len(program.groups) == len(pairs)


@settings(max_examples=60)
@given(schedule=schedules() | whole_language(), policy=policies)
def test_what_is_lowered_runs_through_in_any_streams(
    schedule: Schedule, policy: dict[str, Any]
) -> None:
    program = lower(schedule, messages="grouped", **policy)

    for streams in STREAM_MODELS:
        check(program, streams=streams, buffering="rendezvous").raise_if_bad()


@each_row
def test_every_schedule_of_the_catalogue_runs_through(row: Row) -> None:
    for case in (Case(2, 4), Case(4, 8), Case(4, 12)):
        if row.allows(case):
            program = lower(row.make(case), messages="grouped", receives="late")
            for streams in STREAM_MODELS:
                check(program, streams=streams).raise_if_bad()


def runs_through(program: Program, streams: StreamModel, buffering: Buffering) -> bool:
    """Said once more, slowly: do whatever can be done until nothing can."""
    size = len(program)
    action, message = program.action.tolist(), program.message.tolist()
    mates = [{i, *program.posted_with(i)} for i in range(size)]
    rows: dict[Any, list[int]] = {}
    for i in range(size):
        key = turn_of(program, int(program.stream[i]), streams)
        rows.setdefault(key, []).append(i)
    needs: list[set[int]] = [set(program.waits_for[i]) for i in range(size)]
    for row in rows.values():
        for before, after in pairwise(row):
            if before not in mates[after]:
                needs[after].add(before)
    started: set[int] = set()
    ended: set[int] = set()
    link: dict[int, list[int]] = {}
    for i in range(size):
        if action[i] == Action.SEND:
            link.setdefault(int(program.stream[i]), []).append(i)
    reduces = {
        i: {
            j
            for j in range(size)
            if action[j] == Action.REDUCE
            and program[j].ops[0].stage == program[i].ops[0].stage
        }
        for i in range(size)
        if action[i] == Action.REDUCE
    }

    def may_start(i: int) -> bool:
        return all(
            other in ended
            for mate in mates[i]
            for need in needs[mate]
            for other in mates[need]
        )

    def may_end(i: int) -> bool:
        if action[i] == Action.REDUCE:
            return reduces[i] <= started
        if action[i] not in (Action.SEND, Action.RECV):
            return True
        send, recv = program.send_of[message[i]], program.recv_of[message[i]]
        if action[i] == Action.RECV:
            if buffering == "rendezvous":
                return send in started
            return send in ended
        if buffering == "rendezvous":
            return recv in started
        if buffering == "eager":
            return True
        row = link[int(program.stream[i])]
        place = row.index(i) - int(buffering)
        return place < 0 or program.recv_of[message[row[place]]] in ended

    while True:
        news = [i for i in range(size) if i not in started and may_start(i)]
        started.update(news)
        over = [i for i in started - ended if may_end(i)]
        ended.update(over)
        if not news and not over:
            return len(ended) == size


def with_groups(program: Program, times: int, dice: random.Random) -> Program:
    """Some messages of a device, side by side or not, in groups of two or three."""
    parts = parts_of(program)
    for number in range(times):
        speak = [p for p in parts if p.message >= 0]
        if not speak:
            break
        here = program.device[dice.choice(speak).key]
        mine = [p for p in speak if program.device[p.key] == here]
        for part in dice.sample(mine, min(len(mine), dice.choice((2, 2, 3)))):
            part.group = len(parts) + number
    return assembled(program, parts)


@settings(max_examples=80)
@given(
    schedule=schedules(slices=1),
    policy=policies,
    grouped=st.sampled_from(["single", "grouped"]),
    times=st.integers(0, 3),
    streams=st.sampled_from(STREAM_MODELS),
    buffering=bufferings,
    dice=st.randoms(use_true_random=False),
)
def test_deadlocks_are_those_of_a_search_by_hand(
    schedule: Schedule,
    policy: dict[str, Any],
    grouped: Any,
    times: int,
    streams: StreamModel,
    buffering: Buffering,
    dice: random.Random,
) -> None:
    lowered = lower(schedule, messages=grouped, **policy)
    program = with_groups(lowered, times, dice)

    verdict = check(program, streams=streams, buffering=buffering)
    assert verdict.ok == runs_through(program, streams, buffering)


@settings(max_examples=60)
@given(
    schedule=schedules(slices=1),
    times=st.integers(1, 3),
    streams=st.sampled_from(STREAM_MODELS),
    dice=st.randoms(use_true_random=False),
)
def test_whoever_waits_for_one_waits_for_all(
    schedule: Schedule, times: int, streams: StreamModel, dice: random.Random
) -> None:
    program = with_groups(lower(schedule, messages="grouped"), times, dice)
    if misgrouped(program):
        return
    mates = [{i, *program.posted_with(i)} for i in range(len(program))]
    own = [set(program.waits_for[i]) for i in range(len(program))]
    for row in in_turn(program, streams):
        for before, after in pairwise(row.tolist()):
            own[after] |= {before} - mates[after] if len(mates[after]) > 1 else {before}
    found = [set(some) for some in needs(program, streams).to_lists()]
    for before, after in zip(*turns_of_others(program, streams)):
        found[after].add(int(before))

    assert found == [
        {other for mate in mates[i] for need in own[mate] for other in mates[need]}
        for i in range(len(program))
    ]


def in_one_group(program: Program, *labels: str) -> Program:
    parts = parts_of(program)
    for part in parts:
        if program.label(part.key) in labels:
            part.group = 0
    return assembled(program, parts)


def test_a_group_that_waits_for_itself_is_named() -> None:
    """Device 1 can send the gradient only once it has received the activation."""
    program = in_one_group(
        lower(catalog.make("gpipe", devices=2, micro_batches=1)),
        "recv activation 0→1:0",
        "send gradient 1→0:0",
    )

    (finding,) = check(program, streams="dir").findings
    assert finding.rule == "deadlock"
    assert finding.found == (
        "a cycle of waits, and 7 instructions that never end: "
        "1B0 (4, device 1, compute) waits for 1F0 (3, device 1, compute) waits for "
        "send gradient 1→0:0 (5, device 1, send to 0, posted with 2) waits for "
        "1B0 (4, device 1, compute)"
    )
    assert not prove(program).ok


def test_what_follows_a_group_in_its_stream_waits_for_all_of_it() -> None:
    """The second activation comes behind a gradient that it is waited for with."""
    program = lower(catalog.make("1f1b", devices=2, micro_batches=2))
    labels = "send activation 0→1:0", "recv gradient 1→0:0"
    assert check(in_one_group(program, *labels), streams="dir").ok
    parts = parts_of(program)
    of = {program.label(part.key): part for part in parts}
    second = of["recv activation 0→1:1"].key
    of["send gradient 1→0:0"].waits.append(second)
    waiting = assembled(program, parts)

    assert check(waiting, streams="dir").ok
    (finding,) = check(in_one_group(waiting, *labels), streams="dir").findings
    assert "send activation 0→1:1 (" in finding.found


def test_a_group_is_not_behind_what_none_of_it_waits_for() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    program = in_one_group(lower(schedule), "recv gradient 1→0:0")
    prove(program).raise_if_bad()
    parts = parts_of(program)
    of = {program.label(part.key): part for part in parts}
    freed = of["send activation 0→1:0"].frees.pop()
    of["recv gradient 1→0:0"].frees.append(freed)

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.found == (
        "nothing orders recv gradient 1→0:0, which frees output 0:0, behind "
        "send activation 0→1:0, which reads output 0:0, in the same slot"
    )


def test_a_cycle_through_several_groups_is_named() -> None:
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))
    parts = parts_of(program)
    speak = [part for part in parts if part.message >= 0]
    for number, part in enumerate(speak):
        part.group = number
    parts[0].waits = [speak[-1].key]

    (finding,) = check(assembled(program, parts), streams="dir").findings
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


def test_one_group_saves_two_that_send_first() -> None:
    """In one stream, two sends that meet hang under rendezvous; grouped they do not."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    program = lower(schedule, messages="grouped")
    parts = parts_of(program)
    first = next(
        i for i, p in enumerate(parts) if program.label(p.key).startswith("send grad")
    )
    last = next(
        i
        for i, p in enumerate(parts)
        if program.label(p.key) == "recv activation 0→1:1"
    )
    parts[first], parts[last] = parts[last], parts[first]
    crossing = assembled(program, parts)
    for part in parts:
        part.group = -1
    single = assembled(program, parts)

    assert check(crossing, streams="pair").ok
    assert not check(single, streams="pair").ok
    assert check(single, streams="dir").ok


def test_only_messages_of_one_device_are_grouped() -> None:
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))
    for groups, wrong in (
        ([[0, 1]], 0),  # an op
        ([[1, 2]], 2),  # the other side of the link
        ([[1], [1]], 1),  # in two groups
        ([[1, len(program)]], len(program)),
        ([[-1]], -1),
    ):
        broken = assembled(program, parts_of(program))
        object.__setattr__(broken, "groups", Lists.of(groups))
        found = check(broken, streams="dir").findings

        assert {finding.rule for finding in found} == {"posted"}
        assert found[0].found.startswith(f"instruction {wrong} in group")
        assert not prove(broken).ok


def test_refuses_another_policy() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=1)

    with pytest.raises(
        ParameterError, match="messages must be 'single' or 'grouped', got 'batched'"
    ):
        lower(schedule, messages="batched")  # type: ignore[arg-type]


def test_a_certificate_tells_groups_apart() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    program = lower(schedule, messages="grouped")
    parts = parts_of(program)
    for part in parts:
        part.group = -1
    ungrouped = assembled(program, parts)
    one, other = prove(program), prove(ungrouped)

    assert one.ok
    assert other.ok
    assert one.to_dict()["program"] != other.to_dict()["program"]
    assert np.array_equal(program.stream, ungrouped.stream)
