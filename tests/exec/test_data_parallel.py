"""Pipelines side by side: one gradient, summed over the replicas once."""

from __future__ import annotations

import pytest
from grids import Grid, of_grid, of_references, weigh
from jobs import Do, digest

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [
    Grid("1f1b", 2, 4, (11, 7)),
    Grid("1f1b", 2, 4, (11, 7), mesh=True),
    Grid("gpipe", 2, 3, (5, 5), policy="except-last", scale="sum"),
    Grid("zb-h1", 2, 4, (8, 9)),
    Grid("zb-v", 2, 4, (4, 6), steps=1),
    Grid("interleaved", 2, 4, (7, 8)),
    Grid("gpipe", 1, 2, (3, 5, 2, 9)),
    Grid("1f1b", 2, 4, (8, 8), scale=weigh),
    Grid("seq1f1b", 2, 4, (7, 5)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name} {grid.rows}")
def test_replicas_equal_their_references_added_up(grid: Grid, do: Do) -> None:
    results = do(of_grid, grid)

    expected = of_references(grid)
    for result in results:
        assert result.losses == results[0].losses
        for stage, grads in result.grads.items():
            assert digest(*grads) == digest(*expected.grads[stage]), f"stage {stage}"
    assert results[0].losses == pytest.approx(expected.losses, rel=1e-12)
