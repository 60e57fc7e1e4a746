"""Units are slices of a micro-batch: backwards take them in reverse."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, sizes
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, ParameterError, catalog
from pipeproof.sched.gen import (
    eager_1f1b,
    gpipe,
    one_f_one_b,
    seq1f1b,
    slimpipe,
    terapipe,
)
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate

BARS = [
    (p, m) for p in range(2, 17) for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p})
]

each_of_them = pytest.mark.parametrize("name", ["terapipe", "seq1f1b", "slimpipe"])


def test_seq1f1b_takes_the_last_slice_back_first() -> None:
    assert simulate(seq1f1b(2, 2), Cost(1, 1, 0)).grid().splitlines() == [
        "device 0 | F0   F0.1 F1   .... B0.1 F1.1 B0   .... B1.1 B1",
        "device 1 | .... F0   F0.1 B0.1 F1   B0   F1.1 B1.1 B1   ....",
    ]


@each_of_them
@given(p=sizes, m=sizes, q=st.integers(1, 5), cost=costs)
def test_formulas(name: str, p: int, m: int, q: int, cost: Cost) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad

    keeps_its_formulas(CATALOG[name], Case(p, m, {"slices": q}, *times))


@given(p=sizes, m=sizes)
def test_one_slice_is_the_schedule_without(p: int, m: int) -> None:
    assert terapipe(p, m, slices=1) == gpipe(p, m)
    assert seq1f1b(p, m, slices=1) == one_f_one_b(p, m)
    assert slimpipe(p, m, slices=1) == eager_1f1b(p, m)


def test_published_peaks() -> None:
    """(q+p-1-d)/q for Seq1F1B, 1+2(p-1-d)/q for SlimPipe."""
    fine, eager = (
        simulate(generator(4, 8, slices=4)) for generator in (seq1f1b, slimpipe)
    )

    assert fine.peak_activations == [Fraction(7 - d, 4) for d in range(4)]
    assert eager.peak_activations == [1 + Fraction(3 - d, 2) for d in range(4)]


@each_of_them
def test_says_that_there_are_no_slices(name: str) -> None:
    with pytest.raises(ParameterError, match="slices must be at least 1, got 0"):
        catalog.make(name, devices=2, micro_batches=2, slices=0)


@pytest.mark.slow
@each_of_them
@pytest.mark.parametrize(("p", "m"), BARS)
def test_all_sizes(name: str, p: int, m: int) -> None:
    for slices in (1, 2, 3):
        for times in ((1, 1, 1), (3, 1, 0)):
            keeps_its_formulas(CATALOG[name], Case(p, m, {"slices": slices}, *times))
