import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import costs, runs_through, schedules, sizes

from pipeproof.sched import (
    POLICIES,
    B,
    F,
    Kind,
    ParameterError,
    R,
    Schedule,
    ScheduleError,
    catalog,
    check,
    overlap,
    recompute,
)
from pipeproof.sim import Cost, simulate


def rows(schedule: Schedule) -> list[str]:
    return [line for line in schedule.format().splitlines() if line[:6] == "device"][1:]


def test_gpipe_in_pictures() -> None:
    gpipe = catalog.make("gpipe", devices=2, micro_batches=3)

    assert rows(recompute(gpipe, "never")) == [
        "device 0 | 0F0 0F1 0F2 0B2 0B1 0B0",
        "device 1 | 1F0 1F1 1F2 1B2 1B1 1B0",
    ]
    assert rows(recompute(gpipe, "always")) == [
        "device 0 | 0F0 0F1 0F2 0R2 0B2 0R1 0B1 0R0 0B0",
        "device 1 | 1F0 1F1 1F2 1R2 1B2 1R1 1B1 1R0 1B0",
    ]
    for policy in ("except-last", "adaptive"):
        assert rows(recompute(gpipe, policy)) == [
            "device 0 | 0F0 0F1 0F2 0B2 0R1 0B1 0R0 0B0",
            "device 1 | 1F0 1F1 1F2 1B2 1R1 1B1 1R0 1B0",
        ]


def test_one_f_one_b_in_pictures() -> None:
    plain = catalog.make("1f1b", devices=2, micro_batches=3)

    assert rows(recompute(plain, "always")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0R2 0B2",
        "device 1 | 1F0 1R0 1B0 1F1 1R1 1B1 1F2 1R2 1B2",
    ]
    assert rows(recompute(plain, "except-last")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0B2",
        "device 1 | 1F0 1R0 1B0 1F1 1R1 1B1 1F2 1B2",
    ]
    assert rows(recompute(plain, "adaptive")) == [
        "device 0 | 0F0 0F1 0R0 0B0 0F2 0R1 0B1 0R2 0B2",
        "device 1 | 1F0 1B0 1F1 1B1 1F2 1B2",
    ]


def test_goes_ahead_of_an_overlap_group() -> None:
    row = [F(0, 0), overlap(F(0, 1), B(0, 0)), B(0, 1)]

    assert rows(recompute(Schedule.of([row]), "always")) == [
        "device 0 | 0F0 0R0 (0F1&0B0) 0R1 0B1"
    ]


@given(p=sizes, m=sizes, cost=costs)
def test_peaks_are_those_of_the_docstring(p: int, m: int, cost: Cost) -> None:
    lifo = catalog.make("gpipe", devices=p, micro_batches=m)
    fifo = catalog.make("gpipe", devices=p, micro_batches=m, backward="fifo")
    peaks = {
        (name, policy): set(
            simulate(recompute(schedule, policy), cost).peak_activations
        )
        for name, schedule in {"lifo": lifo, "fifo": fifo}.items()
        for policy in POLICIES
    }

    assert peaks == {
        ("lifo", "never"): {m},
        ("lifo", "always"): {1},
        ("lifo", "except-last"): {1},
        ("lifo", "adaptive"): {1},
        ("fifo", "never"): {m},
        ("fifo", "always"): {1},
        ("fifo", "except-last"): {min(m, 2)},
        ("fifo", "adaptive"): {1},
    }


@given(p=sizes, m=sizes)
def test_adaptive_spares_the_last_stage_of_one_f_one_b(p: int, m: int) -> None:
    plain = catalog.make("1f1b", devices=p, micro_batches=m)
    again = recompute(plain, "adaptive")

    assert not (again.row(p - 1).kind == Kind.R).any()
    if m > 1:
        assert all((again.row(d).kind == Kind.R).sum() == m for d in range(p - 1))


@given(schedule=schedules(), first=st.sampled_from(POLICIES))
def test_any_schedule_stays_valid_and_the_last_policy_counts(
    schedule: Schedule, first: str
) -> None:
    for policy in POLICIES:
        again = recompute(schedule, policy)
        check(again).raise_if_bad()
        assert runs_through(again)
        assert again == recompute(again, policy)
        assert again == recompute(recompute(schedule, first), policy)  # type: ignore[arg-type]
    never = recompute(schedule, "never")
    always = recompute(schedule, "always")
    backwards = sum(op.kind in (Kind.B, Kind.I) for op in schedule.ops)

    assert not never.has(Kind.R)
    assert sum(op.kind == Kind.R for op in always.ops) == backwards


def test_says_what_it_refuses() -> None:
    plain = catalog.make("gpipe", devices=1, micro_batches=2)
    with pytest.raises(
        ParameterError,
        match="one of never, always, except-last, adaptive, got 'sometimes'",
    ):
        recompute(plain, "sometimes")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="0B0 is missing"):
        recompute(Schedule.of([[F(0, 0)]]), "always")
    for group in (overlap(R(0, 0), F(0, 1)), overlap(F(0, 1), R(0, 0))):
        inside = Schedule.of([[F(0, 0), group, B(0, 0), B(0, 1)]])
        with pytest.raises(ParameterError, match="an R inside an overlap group cannot"):
            recompute(inside, "always")
