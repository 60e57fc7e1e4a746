"""Recomputation stage by stage, and the least of it that fits."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeproof.sched import (
    POLICIES,
    Kind,
    Layer,
    ParameterError,
    catalog,
    check,
    fit_recompute,
    recompute,
)
from pipeproof.sched.partition import loads

LAYER = Layer(forward=1, backward=2, weights=10, activations=10, input=1)


def rows(schedule: object) -> list[str]:
    text = schedule.format().splitlines()
    return [line for line in text if line[:6] == "device"][1:]


def drawn(data: st.DataObject, numbers: st.SearchStrategy[int]) -> Layer:
    forward, backward, weights, inside, entry = (data.draw(numbers) for _ in range(5))
    return Layer(forward, backward, weights, inside + entry, entry)


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


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(("gpipe", "1f1b", "zb-v", "interleaved", "chimera")),
    memory=st.integers(20, 200),
    data=st.data(),
)
def test_no_choice_of_policies_that_fits_is_faster(
    name: str, memory: int, data: st.DataObject
) -> None:
    schedule = catalog.make(name, devices=2, micro_batches=4)
    numbers = st.integers(0, 9)
    layers = [drawn(data, numbers) for _ in range(schedule.stages)]
    sizes = [1] * schedule.stages
    possible = []
    for choice in product(POLICIES, repeat=schedule.stages):
        busy, taken = loads(layers, recompute(schedule, choice), sizes)
        if max(taken) <= memory:
            possible.append(max(busy))
    if not possible:
        with pytest.raises(ParameterError, match="no recomputation fits on device"):
            fit_recompute(schedule, layers, sizes, memory)
        return

    found = fit_recompute(schedule, layers, sizes, memory)

    busy, taken = loads(layers, found, sizes)
    assert check(found).ok
    assert max(taken) <= memory
    assert max(busy) == min(possible)


def test_refusals() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="it needs at least 20 bytes, and has 5"):
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
