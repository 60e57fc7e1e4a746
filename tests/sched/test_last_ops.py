"""What is over before an instruction starts: against a table of all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import policies, schedules, whole_language
from test_contract import each_row

from pipeproof.sched import Action, Program, Schedule, catalog, kernels, lower
from pipeproof.sched.instructions import MessageKind
from pipeproof.sched.last_ops import LastOps
from pipeproof.sched.row import Case, Row


def table(program: Program, in_order: bool) -> tuple[list[list[int]], list[list[int]]]:
    """[instruction, device], before it starts and ends: a clock of all devices."""
    started: list[list[int]] = []
    ended: list[list[int]] = []
    count = [0] * program.schedule.devices
    last: dict[int, int] = {}
    sends = dict(zip(program.recv_of.tolist(), program.send_of.tolist()))
    for index, stream in enumerate(program.stream.tolist()):
        behind = program.waits_for[index]
        if stream in last and (in_order or index not in sends):
            behind.append(last[stream])
        last[stream] = index
        clocks = [[0] * len(count), *(ended[n] for n in behind)]
        started.append([max(column) for column in zip(*clocks)])
        sent = [ended[sends[index]]] if in_order and index in sends else []
        ended.append([max(column) for column in zip(started[-1], *sent)])
        if program.action[index] == Action.COMPUTE:
            device = program.device_of(index)
            ended[-1][device] = 2 * count[device] + 1
            count[device] += 1
    return started, ended


def found(program: Program, in_order: bool) -> tuple[list[list[int]], list[list[int]]]:
    size = len(program), program.schedule.devices
    instructions, devices = (part.ravel() for part in np.indices(size))
    last = LastOps(program, in_order)
    return (
        last.before(instructions, devices).reshape(size).tolist(),
        last.at_end(instructions, devices).reshape(size).tolist(),
    )


each_order = pytest.mark.parametrize("in_order", [True, False])


@each_order
@given(schedule=schedules(micro_batches=8) | whole_language(), policy=policies)
def test_is_the_newest_of_all_that_is_over(
    in_order: bool, schedule: Schedule, policy: Any
) -> None:
    program = lower(schedule, **policy)

    assert found(program, in_order) == table(program, in_order)


@each_order
@each_row
@pytest.mark.parametrize(("p", "m"), [(4, 8), (6, 12)])
def test_of_published_schedules_too(row: Row, p: int, m: int, in_order: bool) -> None:
    if not row.allows(Case(p, m)):
        return
    program = lower(row.generator(p, m))

    assert found(program, in_order) == table(program, in_order)


@settings(max_examples=20)
@given(schedule=schedules(linear=True) | whole_language(), in_order=st.booleans())
def test_compiled_and_plain_agree(schedule: Schedule, in_order: bool) -> None:
    program = lower(schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILE_FROM", 0)
        compiled = found(program, in_order)

    assert compiled == found(program, in_order)


def test_a_receive_is_behind_what_led_to_the_send_of_the_one_before() -> None:
    """Inputs of stage 2 have slots of their own, and share a stream::

        device 0 | 0F0 0F1 0F2 2F0 2F1 2F2
        device 1 | ... 1F0 1F1 1F2 3F0 3F1

    So each is received when the one before is sent: behind what 1F0 and 1F1 read.
    """
    program = lower(catalog.make("looped-bfs", devices=2, micro_batches=3))
    kind, target = program.messages[:, 0], program.messages[:, 2]
    receives = program.recv_of[(kind == MessageKind.ACTIVATION) & (target == 2)]
    last = LastOps(program, in_order=True)

    for device in (0, 1):
        devices = np.full(len(receives), device)
        assert last.before(receives, devices).tolist() == [0, 1, 3]
