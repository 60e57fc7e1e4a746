from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import positive_times, times
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, Kind, ParameterError
from pipeproof.sched.gen import dualpipe_v, zb_v
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate

ALL = ("zb-v", "v-half", "v-min", "dualpipe-v")


def test_zb_v_has_no_bubble_inside_a_span() -> None:
    run = simulate(zb_v(2, 3))

    assert run.grid().splitlines() == [
        "device 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 "
        "0I2 0W2 ...",
        "device 1 | ... 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 "
        "1W1 2W2 1W2",
    ]
    assert run.span_bubble == 0


@given(
    p=st.integers(1, 6),
    more=st.integers(0, 8),
    forward=positive_times,
    longer=times,
    part=st.integers(0, 6),
)
def test_zb_v_idles_for_its_shorter_weight_gradient(
    p: int, more: int, forward: Fraction, longer: Fraction, part: int
) -> None:
    input_grad = forward + longer
    weight_grad = (forward + input_grad) * Fraction(part, 12)
    run = simulate(zb_v(p, 2 * p - 1 + more), Cost(forward, input_grad, weight_grad))

    assert run.span - run.ideal == (p - 1) * (input_grad - weight_grad)
    assert run.peak_activations == [p] * p


def test_zb_v_where_w_is_shorter_than_i_and_i_than_f() -> None:
    cost = Cost(Fraction("18.5"), Fraction("18.1"), Fraction("9.3"))
    run = simulate(zb_v(4, 12), cost)

    assert float(run.span - run.ideal) == 27.4  # not 3(F - W) = 27.6


@given(
    p=st.integers(1, 6),
    more=st.integers(0, 8),
    forward=positive_times,
    w=st.integers(0, 6),
    at=st.integers(0, 6),
)
def test_dualpipe_v_at_any_overlap_time(
    p: int, more: int, forward: Fraction, w: int, at: int
) -> None:
    weight_grad = forward * Fraction(w, 6)
    backward = forward + weight_grad
    joint = backward + forward * Fraction(at, 6)
    run = simulate(
        dualpipe_v(p, 2 * p + more), Cost(forward, forward, weight_grad, overlap=joint)
    )

    wanted = (p - 1) * (joint + backward - 3 * weight_grad) / 2
    assert run.makespan - min(run.busy) == wanted
    assert run.peak_activations == [p + Fraction(1, 2)] * p


@pytest.mark.parametrize("p", [2, 5, 8])
def test_dualpipe_v_overlaps_all_but_the_first_pair_of_the_last_device(p: int) -> None:
    schedule = dualpipe_v(p, 2 * p + 1)
    pairs = [int(schedule.row(d).joined.sum()) for d in range(p)]

    m = 2 * p + 1
    assert pairs == [2 * m - 3 * p + d + 1 - (d == p - 1) for d in range(p)]
    assert not schedule.has(Kind.R)


def test_says_how_many_micro_batches_are_missing() -> None:
    with pytest.raises(ParameterError, match="two micro-batches for each device, 8 "):
        dualpipe_v(4, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", range(2, 17))
def test_bars(name: str, p: int) -> None:
    for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p}):
        for three in ((1, 1, 1), (2, 3, 1), (3, 2, 1)):
            keeps_its_formulas(CATALOG[name], Case(p, m, {}, *three))
