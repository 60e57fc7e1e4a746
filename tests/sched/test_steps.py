"""STEP: where it stands, what it waits for, and what it updates by."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costs, schedules
from test_contract import POLICIES, each_row

from pipeproof.sched import (
    Action,
    B,
    Certificate,
    F,
    I,
    Kind,
    ParameterError,
    Program,
    Refutation,
    Schedule,
    W,
    catalog,
    check,
    lower,
    op,
    overlap,
    prove,
    recompute,
    reduce_gradients,
    with_steps,
)
from pipeproof.sched.lists import Lists
from pipeproof.sched.program import Stored
from pipeproof.sched.row import Case, Row
from pipeproof.sim import Cost, fit, simulate

STEP = op(Kind.STEP, 0)


def stepping(devices: int = 2) -> Schedule:
    return with_steps(catalog.make("1f1b", devices=devices, micro_batches=3))


def said(program: Program) -> list[str]:
    result = prove(program)
    assert isinstance(result, Refutation)
    return [finding.found for finding in result.findings]


def test_a_device_updates_while_others_drain() -> None:
    cost = Cost(forward=1, backward=1, step=2)

    assert simulate(stepping(), cost).grid().splitlines() == [
        "device 0 | F0   F1   .... B0   F2   B1   .... B2   STEP ----",
        "device 1 | .... F0   B0   F1   B1   F2   B2   STEP ---- ....",
    ]


def test_a_step_stands_behind_its_gradient() -> None:
    plain = catalog.make("interleaved", devices=2, micro_batches=2)

    def ends(schedule: Schedule) -> list[str]:
        rows = [schedule.row(device) for device in range(2)]
        return [" ".join(map(str, list(row)[-7:])) for row in rows]

    assert ends(with_steps(plain)) == [
        "2F1 2B0 2B1 2STEP 0B0 0B1 0STEP",
        "3B0 3F1 3B1 3STEP 1B0 1B1 1STEP",
    ]
    # Summed first, while the next stage goes on.
    assert ends(with_steps(reduce_gradients(plain)))[0] == (
        "2B1 2REDUCE 0B0 0B1 0REDUCE 2STEP 0STEP"
    )


@each_row
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8)])
def test_every_schedule_of_the_catalogue_steps(row: Row, p: int, m: int) -> None:
    if not row.allows(Case(p, m)):
        return
    plain = row.generator(p, m)
    for schedule in (plain, reduce_gradients(plain)):
        stepped = with_steps(schedule)
        assert with_steps(stepped) == stepped
        assert Schedule.parse(stepped.format()) == stepped
        held = {(s, d) for pipe in schedule.placement.pipes for s, d in enumerate(pipe)}
        assert len(stepped) == len(schedule) + len(held)
        for policy in POLICIES:
            program = lower(stepped, **policy)
            certificate = prove(program)
            assert isinstance(certificate, Certificate), str(certificate)
            assert "each STEP updates by it" in str(certificate)
        # Where it takes no time, it changes none.
        without, timed = simulate(schedule), simulate(stepped)
        assert timed.makespan == without.makespan
        assert timed.peak_activations == without.peak_activations


@settings(max_examples=30)
@given(schedule=schedules(), cost=costs, time=st.integers(0, 9))
def test_engine_and_replay_agree(schedule: Schedule, cost: Cost, time: int) -> None:
    cost = dataclasses.replace(cost, step=time)
    program = lower(with_steps(schedule))

    engine, replay = (
        simulate(program, cost, engine=how) for how in ("events", "replay")
    )

    assert np.array_equal(engine.start, replay.start)
    assert np.array_equal(engine.end, replay.end)
    steps = np.flatnonzero(program.op_kind == Kind.STEP)
    taken = (engine.end - engine.start)[steps].tolist()
    shares = schedule.placement.shares()
    assert sum(taken) * max(map(max, shares)) >= time * len(set(shares[0]))


def test_a_cost_is_fitted_to_it() -> None:
    schedule = with_steps(catalog.make("seq1f1b", devices=2, micro_batches=4))
    trace = simulate(schedule, Cost(step=[3, 5]))

    found = fit(trace)

    assert found.cost.step == (3, 5)
    assert found.residual == 0


def test_one_that_is_missing_is_found() -> None:
    row = [F(0, 0), B(0, 0)]
    (finding,) = check(Schedule.of([[*row, STEP], [F(1, 0), B(1, 0)]])).findings
    assert str(finding) == (
        "device 1: 1STEP is missing, and the weights there stay as they were; expected "
        "a STEP of each stage on each device that holds it, as others have. Add 1STEP "
        "to device 1, after its last backward (or with_steps, which adds what is "
        "missing)."
    )
    chimera = with_steps(catalog.make("chimera", devices=2, micro_batches=2))
    rows = [list(chimera.row(device)) for device in range(2)]
    rows[1].remove(STEP)
    (finding,) = check(chimera.with_rows(rows)).findings
    assert "device 1: 0STEP is missing" in str(finding)


def test_refuses_to_stand_in_a_group_or_among_several_steps() -> None:
    row = [F(0, 0), I(0, 0), overlap(W(0, 0), STEP)]
    (finding, *_) = check(Schedule.of([row])).findings
    assert "needs" in finding.found or "group" in finding.rule
    with pytest.raises(ParameterError, match="with_steps takes a schedule of one step"):
        with_steps(Schedule.of([[F(0, range(2)), B(0, range(2))]], steps=2))


def index_of(program: Program, label: str) -> int:
    return next(i for i in range(len(program)) if program.label(i) == label)


def moved(program: Program, index: int, place: int) -> Program:
    """With an instruction at another place of the list."""
    order = np.delete(np.arange(len(program)), index)
    order = np.insert(order, place, index)
    became = np.argsort(order)
    lists = {
        name: Lists.of([getattr(program.storage, name)[i] for i in order.tolist()])
        for name in ("reads", "writes", "frees")
    }
    waits = [[int(became[j]) for j in program.waits_for[i]] for i in order.tolist()]
    messages = program.messages.copy()
    messages[:, 8:] = became[messages[:, 8:]]
    return dataclasses.replace(
        program,
        stream=program.stream[order],
        action=program.action[order],
        first_op=program.first_op[order],
        op_count=program.op_count[order],
        message=program.message[order],
        waits_for=Lists.of(waits),
        storage=Stored(messages, program.buffers, **lists),
    )


def test_refuted_where_it_comes_too_early() -> None:
    program = lower(stepping())
    early = moved(program, index_of(program, "0STEP"), index_of(program, "0B1"))

    assert said(early) == [
        "0STEP reads a gradient that is not whole: it lacks what 2 backwards add"
    ]


def test_refuted_where_it_does_not_wait_for_its_sum() -> None:
    program = lower(with_steps(catalog.make("chimera", devices=2, micro_batches=2)))
    step = index_of(program, "0STEP")
    assert program.action[program.waits_for[step][0]] == Action.REDUCE
    waits = program.waits_for.to_lists()
    waits[step] = []
    hasty = dataclasses.replace(program, waits_for=Lists.of(waits))

    assert any("0STEP" in found for found in said(hasty))


def test_refuted_where_one_is_made_twice_or_not_at_all() -> None:
    program = lower(stepping())
    ops = program.schedule.ops
    other = {str(each): n for n, each in enumerate(ops)}
    first = program.first_op.copy()
    first[index_of(program, "0STEP")] = other["0F0"]
    step = index_of(program, "0B2")
    twice = program.first_op.copy()
    twice[step] = other["0STEP"]

    assert any(
        "device 0 makes none of stage 0: its weights stay" in found
        for found in said(dataclasses.replace(program, first_op=first))
    )
    assert any(
        "0STEP updates the weights of stage 0 a second time" in found
        for found in said(dataclasses.replace(program, first_op=twice))
    )


def test_recomputation_and_splits_keep_it() -> None:
    schedule = recompute(stepping(), "always")
    assert schedule.has(Kind.STEP)
    prove(schedule).raise_if_bad()
