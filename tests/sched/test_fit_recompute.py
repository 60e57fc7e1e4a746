"""Recomputation stage by stage, and the least of it that fits."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import each_row

from pipeproof.sched import (
    POLICIES,
    Kind,
    Layer,
    ParameterError,
    Schedule,
    catalog,
    check,
    fit_recompute,
    recompute,
)
from pipeproof.sched.fit_recompute import selective_loads
from pipeproof.sched.partition import loads
from pipeproof.sched.row import Row
from pipeproof.sched.transforms import Policy
from pipeproof.sim import cost_of_layers, simulate

LAYER = Layer(forward=1, backward=2, weights=10, activations=10, input=1)


def rows(schedule: object) -> list[str]:
    text = schedule.format().splitlines()
    return [line for line in text if line[:6] == "device"][1:]


def drawn(data: st.DataObject, numbers: st.SearchStrategy[int]) -> Layer:
    forward, backward, weights, inside, entry, output = (
        data.draw(numbers) for _ in range(6)
    )
    return Layer(forward, backward, weights, inside + entry, entry, True, output)


def test_a_policy_for_each_stage() -> None:
    gpipe = catalog.make("gpipe", devices=2, micro_batches=3)

    assert rows(recompute(gpipe, ["always", "never"])) == [
        "device 0 | 0F0 0F1 0F2 0R2 0B2 0R1 0B1 0R0 0B0",
        "device 1 | 1F0 1F1 1F2 1B2 1B1 1B0",
    ]


def test_only_the_devices_that_are_full_recompute() -> None:
    """Of 1F1B device 0 holds four micro-batches, 40 bytes, and 10 of weights."""
    schedule = catalog.make("1f1b", devices=4, micro_batches=8)

    found = fit_recompute(schedule, [LAYER] * 4, [1] * 4, memory=45)

    again = {op.stage for op in found.ops if op.kind == Kind.R}
    assert again == {0}
    assert max(loads([LAYER] * 4, found, [1] * 4)[1]) <= 45
    assert fit_recompute(found, [LAYER] * 4, [1] * 4, memory=50) == schedule


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(("gpipe", "1f1b", "zb-h1", "zb-v", "interleaved", "chimera")),
    share=st.floats(0, 1),
    skip=st.integers(0, 9),
    data=st.data(),
)
def test_no_choice_of_policies_that_fits_is_faster(
    name: str, share: float, skip: int, data: st.DataObject
) -> None:
    """Whether one fits says a simulation, of what waits at cuts too.

    With four stages, where only device 0 is short of memory.
    """
    schedule = catalog.make(name, devices=2, micro_batches=4)
    layers = [drawn(data, st.integers(0, 9)) for _ in range(schedule.stages)]
    sizes = [1] * schedule.stages
    if skip and schedule.stages == 4:
        layers[3] = replace(layers[3], takes=((1, skip),))
        schedule = schedule.with_skips([(1, 3)])
    cost = cost_of_layers(layers, sizes)
    found = []
    last = 3 if name == "zb-v" else 2
    free = [s for s in range(schedule.stages) if schedule.stages == 2 or s in (0, last)]
    for choice in product(POLICIES, repeat=2):
        policies: list[Policy] = ["never"] * schedule.stages
        for stage, policy in zip(free, choice):
            policies[stage] = policy
        plan = recompute(schedule, policies)
        taken = list(simulate(plan, cost).peak_bytes)[
            : 1 if schedule.stages == 4 else 2
        ]
        found.append((max(taken), busiest(plan, layers)))
    least, most = min(found)[0], max(found)[0]
    room = max(1, least - 1 + share * (most - least + 1))
    memory = [room, room if schedule.stages == 2 else 1000]
    possible = [busy for taken, busy in found if taken <= room]
    if not possible:
        with pytest.raises(ParameterError, match="no recomputation fits"):
            fit_recompute(schedule, layers, sizes, memory)
        return

    plan = fit_recompute(schedule, layers, sizes, memory)

    assert check(plan).ok
    peaks = simulate(plan, cost).peak_bytes
    assert all(taken <= limit for taken, limit in zip(peaks, memory))
    assert busiest(plan, layers) == min(possible)


def busiest(schedule: Schedule, layers: list[Layer]) -> float:
    """Time of the device that computes longest, op by op; a layer is a stage."""
    busy = [0.0] * schedule.devices
    for device in range(schedule.devices):
        for op in schedule.row(device):
            if op.kind in (Kind.F, Kind.R):
                busy[device] += layers[op.stage].forward
            elif op.kind in (Kind.B, Kind.W):
                busy[device] += layers[op.stage].backward
    return max(busy)


@each_row
def test_bytes_are_those_that_are_predicted(row: Row) -> None:
    draw = random.Random(row.name)
    schedule = row.generator(4, 8)
    layers = [
        Layer(
            *(draw.randint(1, 9) for _ in range(3)),
            activations=draw.randint(4, 9),
            input=draw.randint(1, 4),
            output=draw.randint(1, 4),
            takes=((at - 5, draw.randint(1, 4)),) if at % 5 == 0 and at else (),
        )
        for at in range(2 * schedule.stages)
    ]
    sizes = [2] * schedule.stages
    pairs = {(at // 2 - 3, at // 2) for at in range(5, len(layers), 5) if at % 2 == 0}
    pairs |= {(at // 2 - 2, at // 2) for at in range(5, len(layers), 5) if at % 2}
    plan = schedule.with_skips(pairs)
    if not schedule.has(Kind.OFFLOAD):
        plan = recompute(plan, draw.choice(POLICIES))
    every = [range(2)] * schedule.stages

    assert selective_loads(layers, plan, sizes, every)[1] == pytest.approx(
        simulate(plan, cost_of_layers(layers, sizes)).peak_bytes, rel=1e-9
    )


def test_refusals() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="it needs at least 21 bytes, and has 5"):
        fit_recompute(schedule, [LAYER] * 2, [1, 1], memory=[100, 5])
    with pytest.raises(ParameterError, match="sizes must be 2 numbers of at least 1"):
        fit_recompute(schedule, [LAYER] * 2, [2], memory=100)
    with pytest.raises(ParameterError, match="memory must be one number for each of 2"):
        fit_recompute(schedule, [LAYER] * 2, [1, 1], memory=[100])
    with pytest.raises(ParameterError, match="runs 2 stages, got 1 recompute policies"):
        recompute(schedule, ["always"])
    with pytest.raises(ParameterError, match="recompute policy must be one of never"):
        recompute(schedule, ["always", "often"])
    looped = catalog.make("interleaved", devices=2, micro_batches=2, chunks=6)
    with pytest.raises(ParameterError, match="hold 6 stages, and policies are tried"):
        fit_recompute(looped, [LAYER] * 12, [1] * 12, memory=1000)
