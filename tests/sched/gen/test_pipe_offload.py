"""Grouped interleaving, with chunks on the host."""

import inspect
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, sizes
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, Kind, ParameterError, check
from pipeproof.sched.gen import pipeoffload
from pipeproof.sched.row import Case
from pipeproof.sim import Cluster, Cost, simulate

ROW = CATALOG["pipeoffload"]
BARS = [
    (p, m) for p in range(2, 17) for m in sorted({1, p - 1, p, 2 * p, 3 * p + 1, 8 * p})
]


@st.composite
def options(draw: st.DrawFn, p: int) -> dict[str, Any]:
    chunks = draw(st.integers(1, 4))
    return {
        "chunks": chunks,
        "group": draw(st.none() | st.integers((p + 1) // 2, p)),
        "offload": draw(st.none() | st.integers(0, chunks)),
    }


def test_half_of_the_chunks_go_to_the_host() -> None:
    text = pipeoffload(2, 4).format()

    assert text.splitlines()[-2:] == [
        "device 0 | 0F0 0OFFLOAD0 0F1 0OFFLOAD1 2F0 2F1 2I0 2W0 0F2 0OFFLOAD2 0RELOAD0"
        " 2I1 2W1 0F3 0OFFLOAD3 0RELOAD1 0I0 0W0 2F2 0I1 0W1 2F3 2I2 2W2 0RELOAD2 2I3"
        " 2W3 0RELOAD3 0I2 0W2 0I3 0W3",
        "device 1 | 1F0 1OFFLOAD0 1F1 1OFFLOAD1 3F0 3I0 3W0 3F1 1RELOAD0 3I1 3W1 1F2"
        " 1OFFLOAD2 1RELOAD1 1I0 1W0 1F3 1OFFLOAD3 1I1 1W1 3F2 3I2 3W2 3F3 1RELOAD2 3I3"
        " 3W3 1RELOAD3 1I2 1W2 1I3 1W3",
    ]


def test_the_docstring_writes_out_a_row() -> None:
    row = " ".join(map(str, pipeoffload(2, 2).row(0)))
    documented = " ".join((inspect.getdoc(pipeoffload) or "").split())

    assert f"the row of device 0 is:: {row} A RELOAD" in documented


def test_what_would_return_at_once_stays() -> None:
    """The last device turns round: its last chunk's backward follows the forward."""
    schedule = pipeoffload(4, 8, offload=2)

    assert [
        {op.stage for op in schedule.row(d) if op.kind == Kind.OFFLOAD}
        for d in range(4)
    ] == [{0, 4}, {1, 5}, {2}, {3}]


@given(p=sizes, m=st.integers(1, 20), cost=costs, data=st.data())
def test_formulas(p: int, m: int, cost: Cost, data: st.DataObject) -> None:
    times = cost.forward, cost.input_grad, cost.weight_grad

    keeps_its_formulas(ROW, Case(p, m, data.draw(options(p)), *times))


def test_published_idle_times_and_peaks() -> None:
    """GIS, then GIS-H, which halves the groups, with 8 devices and 4 chunks."""
    f, i, w = 2, 3, 1
    whole = simulate(pipeoffload(8, 32, chunks=4, offload=0), Cost(f, i, w))
    half = simulate(pipeoffload(8, 32, chunks=4, group=4, offload=0), Cost(f, i, w))

    assert whole.makespan - whole.ideal == Fraction(7 * (f + i), 4)
    assert half.makespan - whole.makespan == Fraction(3 * 4 * (f + i - w), 4)
    assert max(whole.peak_activations) == 8
    assert max(half.peak_activations) == Fraction(4 * 3 + 8, 4)


@given(p=sizes, v=st.integers(2, 5), groups=st.integers(1, 3), data=st.data())
def test_more_chunks_away_are_fewer_on_the_device(
    p: int, v: int, groups: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, v - 1))
    run = simulate(pipeoffload(p, groups * p, chunks=v, offload=k))
    full = simulate(pipeoffload(p, groups * p, chunks=v, offload=v))

    assert [peak * v for peak in run.peak_activations] == [
        max((v - k) * p - d, 2) for d in range(p)
    ]
    assert [peak * v for peak in full.peak_activations] == [2] * p
    assert full.makespan == run.makespan


@given(p=sizes, m=st.integers(1, 20), data=st.data())
def test_a_last_group_that_is_not_whole_holds_and_lasts_no_longer(
    p: int, m: int, data: st.DataObject
) -> None:
    given_ = data.draw(options(p))
    n = given_["group"] or p
    run = simulate(pipeoffload(p, m, **given_))
    whole = simulate(pipeoffload(p, -(-m // n) * n, **given_))

    assert run.makespan <= whole.makespan
    for peak, most in zip(run.peak_activations, whole.peak_activations):
        assert peak <= most


@given(
    p=sizes, m=st.integers(1, 20), cost=costs, part=st.integers(1, 4), data=st.data()
)
def test_copies_that_fit_delay_nothing(
    p: int, m: int, cost: Cost, part: int, data: st.DataObject
) -> None:
    """Each takes at most a forward and at most a backward."""
    given_ = data.draw(options(p))
    schedule = pipeoffload(p, m, **given_)
    times = Cost(cost.forward, cost.input_grad, cost.weight_grad, activation_bytes=1)
    longest = min(cost.forward, cost.input_grad + cost.weight_grad)  # type: ignore
    free = simulate(schedule, times)
    copied = simulate(
        schedule, times, Cluster(host_bandwidth=Fraction(part) / Fraction(longest))
    )

    assert copied.makespan == free.makespan
    for peak, least in zip(copied.peak_activations, free.peak_activations):
        assert 0 <= (peak - least) * given_["chunks"] <= 1


def test_copies_that_do_not_fit_delay() -> None:
    """Each takes two forwards and two backwards; some wait for the one before."""
    schedule = pipeoffload(4, 8, offload=2)
    cost = Cost(2, 1, 1, activation_bytes=1)

    free = simulate(schedule, cost)
    copied = simulate(schedule, cost, Cluster(host_bandwidth=Fraction(1, 4)))
    assert copied.makespan > free.makespan


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"chunks": 0}, "chunks must be at least 1, got 0"),
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"group": 2}, "with 5 devices, group must lie in 3 … 5, got 2"),
        ({"group": 6}, "with 5 devices, group must lie in 3 … 5, got 6"),
        ({"offload": -1}, "2 chunks on a device, offload must .* 0 … 2, got -1"),
        ({"offload": 3}, "2 chunks on a device, offload must .* 0 … 2, got 3"),
        ({"offload": 1.0}, "offload must be an integer .* got 1.0"),
        ({"offload": True}, "offload must be an integer .* got True"),
    ],
)
def test_says_which_option_is_wrong(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        pipeoffload(5, 5, **given_)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "m"), BARS)
def test_all_sizes(p: int, m: int) -> None:
    for v in (1, 2, 3, 4):
        for group in sorted({(p + 1) // 2, 3 * p // 4 or 1, p}):
            for k in {0, v // 2, v} if group == p else {v // 2}:
                case = {"chunks": v, "group": group, "offload": k}
                if ROW.allows(Case(p, m, case)):
                    keeps_its_formulas(ROW, Case(p, m, case, 2, 3, 1))
    assert check(pipeoffload(p, m)).ok
