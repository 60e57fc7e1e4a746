from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import positive_times
from test_contract import keeps_its_formulas

from pipeproof.sched import CATALOG, ParameterError, Schedule, check
from pipeproof.sched.gen import v_half, v_min
from pipeproof.sched.row import Case
from pipeproof.sim import Cost, simulate

Generator = Callable[..., Schedule]
Times = tuple[Fraction, Fraction, Fraction]

three_times = st.tuples(positive_times, positive_times, positive_times)
generators = st.sampled_from([v_half, v_min])


def idle(schedule: Schedule, times: tuple[float | Fraction, ...]) -> Fraction:
    """Of a device in the step."""
    run = simulate(schedule, Cost(*times))
    return run.makespan - run.ideal  # type: ignore[no-any-return]


def chunks(schedule: Schedule) -> list[int]:
    """The most alive on each device."""
    return [int(2 * peak) for peak in simulate(schedule).peak_activations]


@pytest.mark.parametrize("p", range(3, 13))
@pytest.mark.parametrize("more", [0, 3])
def test_v_half_in_chunks(p: int, more: int) -> None:
    run = simulate(v_half(p, 2 * p + more), Cost(2, 2, 2))

    assert run.makespan - run.ideal == 3 * p - (4 if p % 2 else 7)
    assert [2 * peak for peak in run.peak_activations] == [2 * (p // 2) + 2] * p


@pytest.mark.parametrize("p", range(2, 13))
@pytest.mark.parametrize("more", [0, 3])
def test_v_min_in_chunks(p: int, more: int) -> None:
    run = simulate(v_min(p, 2 * p + more), Cost(2, 2, 2))

    assert run.makespan - run.ideal == 4 * p - (5 if p % 3 else 7)
    assert 2 * max(run.peak_activations) == 2 * ((p + 4) // 3)


@settings(max_examples=15)
@given(p=st.integers(3, 8), times=three_times)
def test_published_v_min_grows_where_w_is_shorter(p: int, times: Times) -> None:
    f, i, w = times
    less, more = (idle(v_min(p, m), times) for m in (4 * p, 5 * p))

    assert more - less == p * max(0, 2 * max(f, i) - min(f, i) - w)


@settings(max_examples=15)
@given(p=st.integers(2, 8), times=three_times)
def test_published_v_half_grows_where_f_and_i_differ(p: int, times: Times) -> None:
    f, i, w = times
    less, more = (idle(v_half(p, m), times) for m in (4 * p, 5 * p))

    assert more - less == p * max(0, abs(f - i) - Fraction(w) / 2)


@settings(max_examples=20)
@given(p=st.integers(1, 7), more=st.integers(0, 24), times=three_times)
def test_v_half_for_its_times_idles_for_no_more_than_its_block(
    p: int, more: int, times: Times
) -> None:
    f, i, w = times
    m = p + more
    missing = max(0, abs(f - i) - w)

    assert idle(v_half(p, m, times=times), times) <= (
        p * (f + i + w + missing) + m * missing
    )


@pytest.mark.parametrize("times", [(2, 3, 1), (2, 1, 1), (10, 15, 7), (3, 4, 5)])
@pytest.mark.parametrize("p", [4, 5, 8])
def test_v_half_for_its_times_does_not_grow(p: int, times: tuple[int, ...]) -> None:
    runs = [idle(v_half(p, m, times=times), times) for m in (4 * p, 8 * p)]

    assert runs[0] == runs[1]


@settings(max_examples=20)
@given(
    generate=generators, p=st.integers(1, 7), m=st.integers(1, 16), times=three_times
)
def test_built_for_its_times_it_is_never_worse(
    generate: Generator, p: int, m: int, times: Times
) -> None:
    published, built = generate(p, m), generate(p, m, times=times)

    assert check(built).ok
    assert built.name == published.name
    assert max(chunks(built)) <= max(chunks(published))
    assert idle(built, times) <= idle(published, times)


@settings(max_examples=15)
@given(
    name=st.sampled_from(["v-half", "v-min"]),
    p=st.integers(1, 6),
    m=st.integers(1, 14),
    built=st.none() | three_times,
    cost=st.just((1, 1, 1)) | three_times,
)
def test_formulas_are_those_of_the_published_order(
    name: str, p: int, m: int, built: Times | None, cost: Times
) -> None:
    """V-Half built for (2, 3, 1) idles 3.5 at F = I = W, p=4; the formula says 2.5."""
    keeps_its_formulas(CATALOG[name], Case(p, m, {"times": built}, *cost))


@settings(max_examples=15)
@given(generate=generators, p=st.integers(2, 7), times=three_times)
def test_no_step_is_shorter_than_its_activations_live(
    generate: Generator, p: int, times: Times
) -> None:
    f, i, w = times
    m = 4 * p
    run = simulate(generate(p, m, times=times), Cost(*times))

    most = 2 * max(run.peak_activations)
    assert run.makespan >= m * ((2 * p + 1) * (f + i) + 2 * w) / (2 * most)


@pytest.mark.parametrize("p", [2, 3, 5])
def test_v_min_has_room_for_the_other_block(p: int) -> None:
    times = (2, 3, 1)
    runs = [idle(v_min(p, m, times=times), times) for m in (4 * p, 8 * p)]

    assert runs[0] == runs[1]


def test_v_half_where_the_input_gradient_takes_longer() -> None:
    run = simulate(v_half(2, 3, times=(1, 2, 1)), Cost(2, 4, 2))

    assert run.grid().splitlines() == [
        "device 0 | 0F0 0F1 0F2 3F0 3I0 --- 3W0 3F1 3I1 --- 3W1 ... 0I0 --- 0W0 ... "
        "3F2 3I2 --- 0I1 --- 3W2 0W1 0I2 --- 0W2",
        "device 1 | ... 1F0 2F0 1F1 2F1 ... 2I0 --- 2W0 1F2 1I0 --- 2I1 --- 1W0 2F2 "
        "1I1 --- 2W1 2I2 --- 1I2 --- 1W1 2W2 1W2",
    ]
    assert run.makespan == 26


@settings(max_examples=15)
@given(times=three_times, by=positive_times)
def test_only_the_ratio_of_the_times_matters(times: Times, by: Fraction) -> None:
    scaled = [time * by for time in times]

    assert v_half(4, 6, times=times) == v_half(4, 6, times=scaled)


@pytest.mark.parametrize(
    "times", [(1, 1), (1, 0, 1), (1, 1, float("inf")), (1, "1", 1), (1, True, 1)]
)
def test_says_what_times_it_takes(times: tuple[object, ...]) -> None:
    with pytest.raises(
        ParameterError, match="times must be three finite numbers above 0, of F, I and "
    ):
        v_min(2, 3, times=times)  # type: ignore[arg-type]
