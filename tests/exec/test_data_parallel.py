"""Pipelines side by side: one gradient, summed over the replicas once."""

from __future__ import annotations

import pytest
from grids import Grid, Wrong, of_grid, of_references, plain, told, weigh
from jobs import digest, mixed
from pool import Do
from sharding import DEVICES, REPLICAS, STEPS, Training, trained, unsharded
from torch import nn
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline
from pipeproof.sched import ParameterError, catalog

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [
    Grid("1f1b", 2, 4, (11, 7), mesh=True),
    Grid("zb-h1", 2, 4, (8, 9)),
    Grid("gpipe", 1, 2, (3, 5, 2, 9)),
    Grid("1f1b", 2, 4, (8, 8), scale=weigh),
    Grid("interleaved", 2, 4, (11, 7), stage=mixed, mesh=True, sharded=True),
    Grid("1f1b", 2, 4, (11, 7), stage=plain, tied=True),
    Grid("interleaved", 2, 4, (5, 9), stage=plain, tied=True),
    Grid("zb-v", 2, 4, (5, 9), stage=plain, tied=True),
]
MORE = [
    Grid("gpipe", 2, 3, (5, 5), policy="except-last", scale="sum"),
    Grid("zb-v", 2, 4, (4, 6), steps=1),
    Grid("interleaved", 2, 4, (7, 8)),
    Grid("seq1f1b", 2, 4, (7, 5)),
    Grid("dualpipe-v", 2, 4, (5, 4)),
    Grid("1f1b", 2, 4, (9, 8), "always", plain, mesh=True, sharded=True),
]


def named(grid: Grid) -> str:
    kind = "mesh " * grid.mesh + "sharded " * grid.sharded
    return f"{kind}{'tied ' * grid.tied}{grid.name} {grid.rows}"


@pytest.mark.parametrize(
    "grid",
    [*GRIDS, *(pytest.param(grid, marks=pytest.mark.slow) for grid in MORE)],
    ids=named,
)
def test_replicas_equal_their_references_added_up(grid: Grid, do: Do) -> None:
    results = do(of_grid, grid)

    expected = of_references(grid)
    for result in results:
        assert result.losses == results[0].losses
        assert result.norm == pytest.approx(expected.norm, rel=1e-6)
        for stage, grads in result.grads.items():
            assert digest(*grads) == digest(*expected.grads[stage]), f"stage {stage}"
    assert results[0].losses == pytest.approx(expected.losses, rel=1e-12)


def test_sharded_replicas_train_as_whole_ones(do: Do) -> None:
    """FSDP2 ends each backward: its sums are there when the optimizer reads them."""
    expected = unsharded(Training())

    for rank, result in enumerate(do(trained, Training())):
        stages = [s for s in range(4) if s % DEVICES == rank % DEVICES]
        for step in range(STEPS):
            assert result.grads[step] == {s: expected.grads[step][s] for s in stages}
        assert result.weights == {s: expected.weights[s] for s in stages}
        assert result.finished >= STEPS * len(stages), "after each stage's last B"
        assert result.whole == 0, "no stage is left gathered"


@pytest.mark.parametrize("forgotten", ["callback", "reduction"])
def test_what_is_forgotten_of_sharding_shows(forgotten: str, do: Do) -> None:
    """Torch's own pipelining left the callback out, and read gradients too early."""
    right = unsharded(Training(forgotten)).grads[0]
    found: dict[int, set[str]] = {}
    for result in do(trained, Training(forgotten)):
        for stage, grads in result.grads[0].items():
            found.setdefault(stage, set()).add(grads)

    wrong = {stage for stage in found if found[stage] != {right[stage]}}
    # A stage whose input wants no gradient is reduced by the callback alone.
    assert wrong == ({0} if forgotten == "callback" else {0, 1, 2, 3})
    assert len(found) * REPLICAS == 8


def test_a_failure_in_one_replica_ends_all(do: Do) -> None:
    said = do(told, Wrong("raises"))

    for rank in (0, 1, 2):
        assert said[rank].startswith(
            f"RankError: rank {rank} ends: rank 3 failed in the step: StepError: the "
            "step broke off at 1F0 (stage 1, micro-batch 0, device cpu): ValueError"
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("three", "4 ranks cannot be 3 pipelines of the same size"),
        ("values", "  values of stage 0:\n    ranks 0: "),
        ("rows", "the targets of rank 3 have 3 rows, and the inputs 4 rows"),
    ],
)
def test_what_is_refused(wrong: str, message: str, do: Do) -> None:
    for said in do(told, Wrong(wrong)):
        assert message in said


def test_replicas_are_processes() -> None:
    schedule = catalog.make("gpipe", devices=1, micro_batches=1)

    with pytest.raises(ParameterError, match="data_parallel needs ranks: replicas are"):
        Pipeline([nn.Linear(1, 1)], schedule, functional.mse_loss, data_parallel=2)


class DistributedDataParallel(nn.Linear):
    """Torch's own needs processes to be made; its name is what is looked at."""


def test_wrapped_for_data_parallelism_is_refused() -> None:
    schedule = catalog.make("gpipe", devices=1, micro_batches=1)
    stage = nn.Sequential(DistributedDataParallel(1, 1))

    with pytest.raises(ModelError, match="would reduce gradients at every micro-batch"):
        Pipeline([stage], schedule, functional.mse_loss)
