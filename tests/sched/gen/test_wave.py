from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, positive_times, times
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, ParameterError
from pipeproof.sched.gen import hanayo
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate


def test_one_wave_in_a_picture() -> None:
    assert simulate(hanayo(2, 2)).grid().splitlines() == [
        "device 0 | 0F0 0F1 ... 3F0 3B0 --- 3F1 3B1 --- ... 0B0 --- ... ... 0B1 ---",
        "device 1 | ... 1F0 2F0 1F1 2F1 ... 2B0 --- 1B0 --- 2B1 --- 1B1 --- ... ...",
    ]


def test_better_than_published_at_four_devices() -> None:
    run = simulate(hanayo(4, 4))

    assert run.bubble_fraction == Fraction(1, 3)  # (2p-2)/(3pw+p-1) is .4


@given(p=st.integers(1, 7), data=st.data(), f=positive_times, i=positive_times, w=times)
def test_one_wave_up_to_p_micro_batches(
    p: int, data: st.DataObject, f: Fraction, i: Fraction, w: Fraction
) -> None:
    m = data.draw(st.integers(1, p))
    run = simulate(hanayo(p, m), Cost(f, f + i, f + w))

    idle = (p - 1) * (3 * f + i + w) - (m - 1) * f
    assert run.makespan - run.ideal == idle
    assert run.peak_activations == [
        Fraction(m + min(m, 3 * d // 2 + 1), 2) for d in range(p)
    ]


@given(p=st.integers(1, 5), m=st.integers(1, 12), waves=st.integers(1, 3), cost=costs)
def test_any_number_of_waves(p: int, m: int, waves: int, cost: Cost) -> None:
    assert hanayo(p, m, waves=waves).stages == 2 * waves * p
    times = cost.forward, cost.input_grad, cost.weight_grad
    keeps_its_formulas(CATALOG["hanayo"], Case(p, m, {"waves": waves}, *times))


@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("waves", [1, 2, 3])
def test_never_above_the_published_fraction(p: int, waves: int) -> None:
    run = simulate(hanayo(p, p, waves=waves))

    assert run.bubble_fraction <= Fraction(2 * p - 2, 3 * p * waves + p - 1)


def test_a_little_above_the_published_fraction_with_more_waves() -> None:
    """Which is no whole number of slots: 108.8, of which this takes 109."""
    published = Fraction(6, 3 * 4 * 4 + 3)
    ideal = 4 * 3 * 2 * 4

    assert ideal / (1 - published) == Fraction("108.8")
    assert simulate(hanayo(4, 4, waves=4)).makespan * 2 * 4 == 109


@pytest.mark.slow
@pytest.mark.parametrize("p", range(9, 17))
@pytest.mark.parametrize("waves", [1, 2, 3, 4, 5])
def test_published_fraction_at_all_sizes(p: int, waves: int) -> None:
    run = simulate(hanayo(p, p, waves=waves))

    published = run.ideal / (1 - Fraction(2 * p - 2, 3 * p * waves + p - 1))
    longest = 1 if waves <= 3 else Fraction("1.006")
    assert run.makespan <= longest * published


def test_says_that_there_is_no_wave() -> None:
    with pytest.raises(ParameterError, match="waves must be at least 1, got 0"):
        hanayo(2, 2, waves=0)
