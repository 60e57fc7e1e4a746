import dataclasses
import resource
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from strategies import writable

from pipeproof.sched import (
    B,
    F,
    I,
    Kind,
    Op,
    Ops,
    ParameterError,
    Placement,
    R,
    Schedule,
    W,
    alternate,
    catalog,
    op,
    overlap,
)


def test_a_schedule_is_rows_of_ops() -> None:
    schedule = Schedule.of([[F(0, 0), B(0, 0)], [F(1, range(1)), B(1, [0])]])

    assert (schedule.devices, schedule.stages, schedule.micro_batches) == (2, 2, 1)
    assert list(schedule.ops) == [F(0, 0), B(0, 0), F(1, 0), B(1, 0)]
    assert list(schedule.row(1)) == [Op(Kind.F, 1, 0), Op(Kind.B, 1, 0)]
    assert schedule.locate(3) == (1, 1)
    assert repr(schedule) == "<Schedule schedule(devices=2, micro_batches=1), 4 ops>"


def test_builders_take_numbers_ranges_and_arrays() -> None:
    assert list(F(2, range(3, 0, -1))) == [F(2, 3), F(2, 2), F(2, 1)]
    assert list(I(np.arange(2), 5)) == [I(0, 5), I(1, 5)]
    assert list(W(0, 1, range(2))) == [W(0, 1, 0), W(0, 1, 1)]
    assert list(R([0, 1], [2, 3])) == [R(0, 2), R(1, 3)]
    assert F(np.int64(1), np.int32(2)) == F(1, 2)
    assert len(B(0, range(0))) == 0
    assert list(F(0, range(1)) + B(0, range(1))) == [F(0, 0), B(0, 0)]
    assert str(F(2, 0, 1)) == "2F0.1"
    assert str(op(Kind.STEP, 3)) == "3STEP"


def test_alternate_and_overlap() -> None:
    both = alternate(F(0, range(2)), B(0, range(2)))
    groups = overlap(F(0, range(2)), I(1, range(2)), W(1, range(2)))

    assert list(both) == [F(0, 0), B(0, 0), F(0, 1), B(0, 1)]
    assert not both.joined.any()
    assert list(groups) == [F(0, 0), I(1, 0), W(1, 0), F(0, 1), I(1, 1), W(1, 1)]
    assert groups.joined.tolist() == [False, True, True] * 2
    assert list(alternate(F(0, 0), B(0, 0))) == [F(0, 0), B(0, 0)]


def test_a_row_of_columns_keeps_its_groups() -> None:
    """Iterating over the columns gave single ops, and lost who shares the device."""
    row = overlap(F(0, range(2)), B(1, range(2)))
    schedule = Schedule.of([row], placement=Placement.looped(1, 2))

    assert schedule.row(0).joined.tolist() == [False, True] * 2
    assert schedule.node_of_op.tolist() == [0, 0, 1, 1]


OUT_OF_RANGE = "stages, micro-batches and slices lie in 0 … 2147483647, got"


@pytest.mark.parametrize("number", [-1, 2**31, 10**30])
def test_refuses_a_number_out_of_range(number: int) -> None:
    for build in (
        lambda: F(0, number),
        lambda: F(number, 0),
        lambda: F(0, [1, number]),
        lambda: Schedule.of([[Op(Kind.F, 0, number)]]),
    ):
        with pytest.raises(ParameterError, match=f"{OUT_OF_RANGE} {number}"):
            build()


@pytest.mark.parametrize("number", [0.5, 1.0, True, "1", None])
def test_refuses_a_number_that_is_not_whole(number: object) -> None:
    with pytest.raises(ParameterError, match=f"are integers, got {number!r}"):
        F(0, [number])  # type: ignore[list-item]


def test_refuses_parts_that_do_not_pair_up() -> None:
    with pytest.raises(ParameterError, match=r"different lengths \(2, 3, 1\) do not"):
        F(range(2), range(3))
    with pytest.raises(ParameterError, match=r"got lengths \[2, 3\]"):
        alternate(F(0, range(2)), B(0, range(3)))
    with pytest.raises(ParameterError, match="at least two ops, got 1"):
        overlap(F(0, 0))
    with pytest.raises(ParameterError, match="single ops, not overlap groups"):
        alternate(overlap(F(0, 0), B(1, 0)), F(0, range(2)))
    with pytest.raises(ParameterError, match="F: give numbers, or one row of them"):
        F(0, np.zeros((2, 2), dtype=int))


TORN = overlap(F(0, 0), B(1, 0))[1:]


@pytest.mark.parametrize(
    ("message", "rows", "options"),
    [
        ("needs at least one device, got no rows", [], {}),
        ("a row holds ops, found 3: build them with F", [[3]], {}),
        ("name must be printable and on one line: 'a\\\\nb'", [[]], {"name": "a\nb"}),
        ("micro_batches must be at least 1, got 0", [[]], {"micro_batches": 0}),
        ("slices must be at least 1, got 0", [[]], {"slices": 0}),
        ("steps must be at least 1, got 0", [[]], {"steps": 0}),
        ("micro_batches must be an integer", [[]], {"micro_batches": 1.5}),
        (
            "the placement uses 2 devices, found 1 rows",
            [[]],
            {"placement": Placement.linear(2)},
        ),
        ("has 2 pipes: say with", [[]], {"placement": Placement.bidirectional(1)}),
        ("names the pipe of 3 micro-batches, expected 1", [[]], {"pipe_of": [0, 0, 0]}),
        ("pipes are numbers from 0 to 0", [[]], {"pipe_of": [70000]}),
        ("pipes are numbers from 0 to 0", [[]], {"pipe_of": [-1]}),
        ("has no slice other than 0", [[op(Kind.STEP, 0, 0, 1)]], {}),
        (
            "opens inside an overlap group, with 1B0",
            [[overlap(F(0, 0), B(1, 0))[1:]]],
            {},
        ),
    ],
)
def test_refuses_what_cannot_be_stored(
    message: str, rows: list[list[Op]], options: dict[str, object]
) -> None:
    with pytest.raises(ParameterError, match=message):
        Schedule.of(rows, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "pipes"),
    [
        ("at least one pipe of one stage", ()),
        ("at least one pipe of one stage", ((),)),
        ("pipe 1 places 1 stages, pipe 0 places 2", ((0, 1), (0,))),
        ("pipe 0 places a stage on device -1: devices count from 0", ((0, -1),)),
        ("at most 32,768 pipes, got 40,000", ((0,),) * 40_000),
    ],
)
def test_refuses_a_placement(message: str, pipes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ParameterError, match=message):
        Placement(pipes)


def test_placements_are_drawn_as_papers_do() -> None:
    assert Placement.linear(3).pipes == ((0, 1, 2),)
    assert Placement.looped(2, 3).pipes == ((0, 1, 0, 1, 0, 1),)
    assert Placement.v(3).pipes == ((0, 1, 2, 2, 1, 0),)
    assert Placement.wave(2, 2).pipes == ((0, 1, 1, 0, 0, 1, 1, 0),)
    assert Placement.bidirectional(3).pipes == ((0, 1, 2), (2, 1, 0))
    assert Placement.of([[2, 0], [1, 1]]).shares() == ((1, 1), (2, 2))
    assert str(Placement.of([[2, 0], [1, 1]])) == "[2 0 | 1 1]"


def base() -> Schedule:
    return Schedule.of(
        [[F(0, 0), F(0, 1), B(0, 0), B(0, 1)], [F(1, 0), B(1, 0), F(1, 1), B(1, 1)]],
        pipe_of=[0, 1],
        placement=Placement(((0, 1), (0, 1))),
    )


LAST = [F(1, 0), B(1, 0), F(1, 1), B(1, 1)]


@pytest.mark.parametrize(
    "rows",
    [
        [[B(0, 0), F(0, 1), B(0, 0), B(0, 1)], LAST],
        [[F(0, 0), F(1, 1), B(0, 0), B(0, 1)], LAST],
        [[F(0, 0), F(0, 0), B(0, 0), B(0, 1)], LAST],
        [[F(0, 0), F(0, 1), B(0, 0), B(0, 1, 1)], LAST],
        [[overlap(F(0, 0), F(0, 1)), B(0, 0), B(0, 1)], LAST],
        [[F(0, 0), F(0, 1), B(0, 0)], [B(0, 1), *LAST]],
    ],
)
def test_digest_sees_every_column(rows: list[list[Op]]) -> None:
    assert base().with_rows(rows).digest != base().digest
    assert base().with_rows(rows) != base()


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batches": 3},
        {"slices": 2},
        {"steps": 2},
        {"placement": Placement(((0, 1), (1, 0)))},
        {"pipe_of": np.array([1, 1], dtype=np.int16)},
    ],
)
def test_digest_sees_every_size(change: dict[str, object]) -> None:
    assert dataclasses.replace(base(), **change) != base()


@given(schedule=writable())
def test_digest_does_not_see_the_name(schedule: Schedule) -> None:
    renamed = schedule.renamed("another")

    assert renamed == schedule
    assert hash(renamed) == hash(schedule)
    assert renamed.name == "another"
    with pytest.raises(ParameterError, match="name must be printable"):
        schedule.renamed("")


def test_digest_stays_the_same_across_versions() -> None:
    """Ranks of different installations compare it."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)

    assert schedule.digest.startswith("91592ac02be32992")


def test_cannot_be_changed() -> None:
    schedule = base()
    columns = [*schedule.ops.columns(), schedule.pipe_of, schedule.row_starts]
    for column in columns:
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.slices = 2  # type: ignore[misc]


def test_ten_million_ops_are_columns() -> None:
    bytes_per_op = sum(column.itemsize for column in F(0, range(1)).columns())

    assert bytes_per_op == 14


@pytest.mark.slow
def test_ten_million_ops_take_less_than_a_gibibyte() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    schedule = catalog.make("gpipe", devices=1000, micro_batches=5000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = sum(column.nbytes for column in schedule.ops.columns())

    assert len(schedule) == 10_000_000
    assert held == 140_000_000
    assert (after - before) << 10 < 1 << 30
    assert isinstance(schedule.ops, Ops)


def test_where_offloads_go_is_part_of_what_a_schedule_is() -> None:
    rows = [[F(0, 0), B(0, 0)], [F(1, 0), B(1, 0)]]
    host, other = Schedule.of(rows), Schedule.of(rows, offload_to=[1, None])

    assert host.offload_to == (None, None)
    assert host == Schedule.of(rows, offload_to=[None, None])
    assert other not in (host, Schedule.of(rows, offload_to=[None, 0]))
    assert other.with_rows([other.row(0), other.row(1)]) == other
    assert other.renamed("another") == other


@pytest.mark.parametrize(
    ("offload_to", "message"),
    [
        ([1], "offload_to says where the OFFLOADs of 1 devices go, expected 2"),
        ([1, -1], "device 1 names -1, expected the number of a device, or None"),
        ([True, None], "device 0 names True, expected the number of a device"),
        ([None, 2**31], "device 1 names 2147483648, expected the number of a device"),
    ],
)
def test_refuses_where_offloads_cannot_go(offload_to: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Schedule.of([[F(0, 0)], [B(0, 0)]], offload_to=offload_to)
