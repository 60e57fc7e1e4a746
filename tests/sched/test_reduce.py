"""REDUCE behind each stage's last backward."""

from __future__ import annotations

import pytest

from pipeproof.sched import (
    CATALOG,
    Kind,
    ParameterError,
    Schedule,
    catalog,
    check,
    lower,
    prove,
    reduce_gradients,
)


def test_a_picture() -> None:
    schedule = reduce_gradients(catalog.make("interleaved", devices=2, micro_batches=2))

    assert schedule.format().splitlines()[-2:] == [
        "device 0 | 0F0 0F1 2F0 2F1 2B0 2B1 2REDUCE 0B0 0B1 0REDUCE",
        "device 1 | 1F0 1F1 3F0 3B0 3F1 3B1 3REDUCE 1B0 1B1 1REDUCE",
    ]


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_may_have_peers(name: str) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=8)

    reduced = reduce_gradients(schedule)

    assert check(reduced).ok
    prove(lower(reduced)).raise_if_bad()
    held = {(s, d) for pipe in schedule.placement.pipes for s, d in enumerate(pipe)}
    found = [
        (op.stage, device)
        for device in range(4)
        for op in reduced.row(device)
        if op.kind == Kind.REDUCE
    ]
    assert sorted(found) == sorted(held)
    assert reduce_gradients(reduced) == reduced


def test_several_steps_are_refused() -> None:
    schedule = Schedule.of([[]], steps=2)

    with pytest.raises(ParameterError, match="takes a schedule of one step, got 2"):
        reduce_gradients(schedule)
