"""One timetable out of what each rank saw.

The threads that see transfers end may see it late, on a busy machine by
milliseconds. A receive was then reported to end before its send had begun.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from strategies import whole_language

from pipeproof.exec.timetable import Times, from_text, merged, to_text
from pipeproof.sched import Program, Schedule, catalog, lower
from pipeproof.sched.instructions import Action
from pipeproof.sim import Cluster, Cost, simulate

TRANSFERS = (Action.SEND, Action.RECV)


def seen_late(program: Program, schedule: Schedule, seed: int) -> tuple[Times, Times]:
    """What was, and what each rank saw of it: ends of transfers only later."""
    trace = simulate(schedule, Cost(2.0, 1.0, 1.0), Cluster(link_latency=0.5))
    draw = random.Random(seed)
    was, seen = [], []
    for index in range(len(program)):
        began, ended = float(trace.start[index]), float(trace.end[index])
        late = draw.choice([0.0, 0.0, 1.0, 7.0])
        late *= program.action[index] in TRANSFERS
        was.append((index, began, ended))
        seen.append((index, began, ended + late))
    return was, seen


@given(schedule=whole_language(), seed=st.integers(0, 99))
def test_late_eyes_move_nothing_out_of_order(schedule: Schedule, seed: int) -> None:
    program = lower(schedule)
    was, seen = seen_late(program, schedule, seed)

    start, end = merged(program, [seen])

    sent, received = program.send_of, program.recv_of
    assert (start[sent] <= end[sent]).all()
    assert (start[sent] <= end[received]).all()
    for (_, _, ended), (_, _, observed), found in zip(was, seen, end):
        assert ended <= found <= observed


def test_a_send_was_over_when_its_message_was_there() -> None:
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))
    send, recv = int(program.send_of[0]), int(program.recv_of[0])
    times = {index: (index, 0.0, 9.0) for index in range(len(program))}
    times[send] = send, 1.0, 5.0
    times[recv] = recv, 0.0, 2.0

    _, end = merged(program, [list(times.values())])

    assert end[[send, recv]].tolist() == [2.0, 2.0]


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e9), st.floats(0))))
def test_times_are_sent_to_the_last_bit(times: Times) -> None:
    assert from_text(to_text(times)) == times
