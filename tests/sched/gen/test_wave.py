from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import positive_times, times

from pipeproof.sched import ParameterError, check
from pipeproof.sched.gen import hanayo
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


@given(p=st.integers(1, 5), m=st.integers(1, 12), waves=st.integers(1, 3))
def test_any_number_of_waves(p: int, m: int, waves: int) -> None:
    schedule = hanayo(p, m, waves=waves)

    assert check(schedule).ok
    assert schedule.stages == 2 * waves * p
    assert simulate(schedule).bubble_fraction <= Fraction(p - 1, p)


@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("waves", [1, 2, 3])
def test_never_above_the_published_fraction(p: int, waves: int) -> None:
    run = simulate(hanayo(p, p, waves=waves))

    assert run.bubble_fraction <= Fraction(2 * p - 2, 3 * p * waves + p - 1)


def test_says_that_there_is_no_wave() -> None:
    with pytest.raises(ParameterError, match="waves must be at least 1, got 0"):
        hanayo(2, 2, waves=0)
