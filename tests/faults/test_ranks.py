"""A fault on one rank ends all: each names it, and none steps on until a new start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_jobs import Wrong, growing, wronged
from pool import Do, pool


@pytest.fixture(scope="module")
def two() -> Iterator[Do]:
    with pool(2) as working:
        yield working


@pytest.mark.parametrize(
    ("wrong", "own", "other"),
    [
        (
            Wrong("system exit", 0),
            "SystemExit: 3",
            "rank 0 failed in the step: SystemExit",
        ),
        (
            Wrong("backward", 1),
            "the step broke off at 1B0 (stage 1, micro-batch 0, device cpu): "
            "ZeroDivisionError: in a backward of its own",
            "rank 1 failed in the step: StepError: the step broke off at 1B0",
        ),
        (
            Wrong("memory", 1),
            "OutOfMemoryError: no memory for 7 GiB",
            "rank 1 failed in the step: StepError: the step broke off at 1F0",
        ),
        (
            Wrong("not finite", 0),
            "StepError: the output is first not finite at 0F0, stage 0, micro-batch 0: "
            "0 NaN and 8 infinite of 8",
            "rank 0 failed in the step: StepError: the step broke off at 0F0",
        ),
        (
            Wrong("dtype", 1),
            "ranks differ; give all the same",
            "ranks differ; give all the same",
        ),
        (
            Wrong("skips", 1),
            "ranks 0: 1 units; gives 'coarse'",
            "ranks 1: 1 units; gives 'fine'",
        ),
        (
            Wrong("double", 0),
            "rank 1 failed in the step: StepError: the step broke off at 1F0",
            "StepError: the step broke off at 1F0",
        ),
        (
            Wrong("values", 0),
            "in the step before, for a batch of the same shapes: what crosses between",
            "rank 0 failed in the step: ModelError: the step broke off at send",
        ),
        (
            Wrong("targets", 1),
            "rank 1 got no targets, and one of its stages needs them",
            "rank 1 failed in the step: BatchError: rank 1 got no targets, and one",
        ),
        (
            Wrong("rows", 0),
            "8 rows, and the inputs 6",
            "8 rows, and the inputs 6",
        ),
    ],
)
def test_all_end_and_stay_ended(wrong: Wrong, own: str, other: str, two: Do) -> None:
    said = two(wronged, wrong, 2)

    for rank, words in enumerate(said):
        assert (own if rank == wrong.rank else other) in words.first
        assert words.then.startswith("RankError: rank"), "refused until a new start"
        assert "failed" in words.then or "differ" in words.then or "rows" in words.then
        assert words.anew


def test_batches_grow_and_shrink(two: Do) -> None:
    assert two(growing, (8, 12, 5, 4, 8), 2) == [True, True]
