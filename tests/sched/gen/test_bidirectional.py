from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import positive_times, sizes, times
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, Kind, ParameterError, Schedule
from pipeproof.sched.gen import chimera, dualpipe, gems
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate

EQUAL = Cost(forward=2, input_grad=1, weight_grad=1)


def test_chimera_as_the_paper_draws_it() -> None:
    assert simulate(chimera(4, 4), EQUAL).grid(2).splitlines() == [
        "device 0 | 0F0 0F2 ... 3F1 3B1 3F3 3B3 0B0 ... 0B2",
        "device 1 | ... 1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2 ...",
        "device 2 | ... 1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3 ...",
        "device 3 | 0F1 0F3 ... 3F0 3B0 3F2 3B2 0B1 ... 0B3",
    ]


@given(half=st.integers(1, 5), units=st.integers(1, 4))
def test_chimera_is_the_published_one(half: int, units: int) -> None:
    p = 2 * half
    m = units * p
    run = simulate(chimera(p, m), EQUAL)
    twice = simulate(chimera(p, m), Cost(1, 1, 1))

    row = CATALOG["chimera"]
    assert run.makespan - run.ideal == row.idle(Case(p, m, {}, 2, 1, 1))
    assert twice.makespan - twice.ideal == row.idle(Case(p, m))
    assert run.bubble_fraction == Fraction(p - 2, 2 * m + p - 2)
    assert twice.makespan - twice.ideal == (p - 2) * (1 + units)
    up = list(range(half + 1, p + 1))
    assert run.peak_activations == twice.peak_activations == up + up[::-1]


@given(p=sizes, m=sizes, f=positive_times, i=positive_times, w=times)
def test_gems_waits_for_the_other_direction(
    p: int, m: int, f: Fraction, i: Fraction, w: Fraction
) -> None:
    run = simulate(gems(p, m), Cost(f, i, w))

    b = i + w
    assert run.makespan - run.ideal == (p - 1) * (f + b + (m - 1) * max(f, b))
    assert run.peak_activations == [1] * p


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("joint", [Fraction(3), Fraction(5, 2), Fraction(2)])
@pytest.mark.parametrize("more", [0, 2, 10])
def test_dualpipe_at_several_overlap_times(p: int, joint: Fraction, more: int) -> None:
    run = simulate(dualpipe(p, 2 * p + more), Cost(1, 1, 1, overlap=joint))

    assert run.makespan - min(run.busy) == (p // 2 - 1) * (joint + 2 - 3)
    assert run.peak_activations == [p + 1] * p


def test_dualpipe_outside_its_domain() -> None:
    run = simulate(dualpipe(8, 26), Cost(1, 1, 1, overlap=Fraction(7, 2)))

    assert max(s - b for s, b in zip(run.spans, run.busy)) == Fraction(17, 2)  # not 7.5


@pytest.mark.parametrize("make", [gems, chimera, dualpipe])
def test_each_stage_is_summed_behind_its_last_backward(
    make: Callable[[int, int], Schedule],
) -> None:
    schedule = make(4, 8)
    for d in range(4):
        row = schedule.row(d)
        for stage in (d, 3 - d):
            (reduce,) = np.flatnonzero((row.kind == Kind.REDUCE) & (row.stage == stage))
            rest = np.flatnonzero((row.stage == stage) & (row.kind != Kind.REDUCE))
            assert rest.max() < reduce


@pytest.mark.parametrize(
    ("make", "p", "m", "message"),
    [
        (chimera, 3, 3, "chimera needs an even number of devices, .* got 3"),
        (dualpipe, 5, 10, "dualpipe needs an even number of devices, .* got 5"),
        (dualpipe, 4, 9, "dualpipe needs an even number of micro_batches, .* got 9"),
        (dualpipe, 4, 6, "two micro-batches for each device, 8 for 4 devices, got 6"),
    ],
)
def test_says_what_is_wrong(
    make: Callable[[int, int], Schedule], p: int, m: int, message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        make(p, m)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gems", "chimera", "dualpipe"])
@pytest.mark.parametrize("p", range(2, 17))
def test_bars(name: str, p: int) -> None:
    for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p}):
        for three in ((1, 1, 1), (2, 3, 1), (3, 2, 1)):
            keeps_its_formulas(CATALOG[name], Case(p, m, {}, *three))
