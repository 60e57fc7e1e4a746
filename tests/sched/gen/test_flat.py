"""Stage d on device d: eager 1F1B, and zero bubble with W set apart."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, Schedule
from pipeproof.sched.gen import eager_1f1b, one_f_one_b, zb_h1, zb_h2
from pipeproof.sched.row import Case
from pipeproof.sim import Cluster, Cost, simulate

FLAT = ("eager-1f1b", "zb-h1", "zb-h2")
BARS = [
    (p, m) for p in range(2, 17) for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p})
]

each_of_them = pytest.mark.parametrize("name", FLAT)


def test_zb_h1_fills_the_drain_with_waiting_w() -> None:
    assert simulate(zb_h1(3, 4)).grid().splitlines() == [
        "device 0 | F0 F1 F2 .. .. I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "device 1 | .. F0 F1 .. I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "device 2 | .. .. F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_zb_h2_has_no_gap_on_any_device() -> None:
    assert simulate(zb_h2(3, 5)).grid().splitlines() == [
        "device 0 | F0 F1 F2 F3 F4 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4 .. ..",
        "device 1 | .. F0 F1 F2 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4 ..",
        "device 2 | .. .. F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4",
    ]


@pytest.mark.parametrize(
    ("p", "m", "f", "i", "w", "link", "published"),
    [
        (8, 24, 18.522, 18.086, 9.337, 0.601, (0.2431, 0.1585, 0.1083)),
        (8, 32, 18.513, 18.086, 9.331, 0.626, (0.1985, 0.1242, 0.0837)),
        (8, 64, 18.546, 18.097, 9.321, 0.762, (0.1240, 0.0674, 0.0444)),
        (8, 24, 29.718, 29.444, 19.927, 0.527, (0.2347, 0.1323, 0.0698)),
        (8, 32, 29.802, 29.428, 19.530, 0.577, (0.1898, 0.1045, 0.0559)),
        (8, 64, 29.935, 29.621, 19.388, 0.535, (0.1091, 0.0554, 0.0294)),
        (16, 48, 11.347, 11.248, 8.132, 0.377, (0.2552, 0.1397, 0.0672)),
        (16, 64, 11.307, 11.254, 8.101, 0.379, (0.2082, 0.1088, 0.0516)),
        (16, 128, 11.325, 11.308, 8.109, 0.378, (0.1251, 0.0576, 0.0266)),
        (32, 96, 10.419, 10.207, 7.715, 0.408, (0.2646, 0.1421, 0.0641)),
        (32, 128, 10.408, 10.204, 7.703, 0.408, (0.2168, 0.1106, 0.0490)),
        (32, 256, 10.402, 10.248, 7.698, 0.460, (0.1352, 0.0594, 0.0257)),
    ],
)
def test_published_zero_bubble_tables(
    p: int, m: int, f: float, i: float, w: float, link: float, published: Any
) -> None:
    """Tables 5 and 9 of arXiv:2401.10241, four models, to the last digit."""
    cost = Cost(forward=f, input_grad=i, weight_grad=w)
    runs = [
        simulate(generator(p, m), cost, Cluster(link_latency=link))
        for generator in (one_f_one_b, zb_h1, zb_h2)
    ]

    assert tuple(round(run.span_bubble, 4) for run in runs) == published
    steps = tuple(round(1 - run.ideal / run.makespan, 4) for run in runs[:2])
    assert steps == published[:2]


def test_eager_hides_the_latency_of_links() -> None:
    slow = Cluster(link_latency=Fraction(1, 10))

    def makespan(schedule: Schedule) -> Fraction:
        return Fraction(simulate(schedule, Cost(1, 1, 1), slow).makespan)

    assert makespan(eager_1f1b(8, 32)) == Fraction("118.4")
    assert makespan(one_f_one_b(8, 32)) == Fraction("123.8")


@each_of_them
@given(p=st.integers(1, 7), m=st.integers(1, 20), cost=costs)
def test_formulas(name: str, p: int, m: int, cost: Cost) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad

    keeps_its_formulas(CATALOG[name], Case(p, m, {}, *times))


@given(p=st.integers(1, 6), more=st.integers(0, 12), cost=costs)
def test_zero_bubble_formulas_in_their_domain(p: int, more: int, cost: Cost) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad
    for name in ("zb-h1", "zb-h2"):
        case = Case(p, 2 * p - 1 + more, {}, *times)
        assert CATALOG[name].holds(case)
        keeps_its_formulas(CATALOG[name], case)


@given(p=st.integers(1, 8), data=st.data())
def test_fewer_micro_batches_idle_a_tick_each_more(p: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 2 * p - 1))

    h1, h2 = simulate(zb_h1(p, m)), simulate(zb_h2(p, m))

    assert h1.makespan - h1.ideal == p - 1 + max(p - m, 0)
    assert h2.span - h2.ideal == 2 * p - 1 - m


@pytest.mark.slow
@each_of_them
@pytest.mark.parametrize(("p", "m"), BARS)
def test_all_sizes(name: str, p: int, m: int) -> None:
    for times in ((1, 1, 1), (2, 3, 1), (3, 1, 2), (1, 1, 3)):
        keeps_its_formulas(CATALOG[name], Case(p, m, {}, *times))
