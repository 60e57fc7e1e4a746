"""Weights that stages share, on one device or on several ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from models import against_reference, batch_of, close, mlp
from pool import Do
from programs import assembled, parts_of
from torch import Tensor, nn
from torch.nn import functional
from tying import Tied, tied

from pipeproof.exec import Pipeline, StepError
from pipeproof.exec.instructions import Surroundings
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.ties import shares_of
from pipeproof.sched import Action, catalog, prove

pytestmark = pytest.mark.usefixtures("one_thread")


def shared(stages: int, *, bias: bool = False) -> list[nn.Sequential]:
    """The first and the last stage share a weight, and the first two a bias."""
    found = mlp(stages)
    found[-1][0].weight = found[0][0].weight
    if bias:
        found[1][0].bias = found[0][0].bias
    return found


def test_a_pipeline_finds_what_its_stages_share() -> None:
    """Each tie in its program, and proved; gradients as the reference adds them up."""
    schedule = catalog.make("zb-h1", devices=4, micro_batches=4)
    pipeline = Pipeline(shared(4, bias=True), schedule, functional.mse_loss)

    assert pipeline.schedule.ties == ((0, 1), (0, 3))
    assert [it.label for it in pipeline.program if it.action == Action.TIE] == [
        "tie 0=1",
        "tie 0=1",
        "tie 0=3",
        "tie 0=3",
    ]
    assert prove(pipeline.program).ok
    stages = shared(4, bias=True)
    tied = schedule.with_ties([(0, 3), (0, 1)])
    against_reference(stages, tied, *batch_of(stages, 9, torch.float64))
    assert not Pipeline(mlp(4), schedule, functional.mse_loss).schedule.ties


def test_the_program_says_when_and_in_which_order() -> None:
    """Without its TIEs nothing comes to `.grad`; another order is another sum."""
    schedule = catalog.make("interleaved", devices=1, micro_batches=3, chunks=3)
    stages = shared(3)
    stages[1][0].weight = stages[0][0].weight
    x, y = batch_of(stages, 7, torch.float64)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    pipeline.step(x, y)
    parts = parts_of(pipeline.program)
    (tie,) = [part for part in parts if part.action == Action.TIE]
    found = [pipeline._runtime.stages[n].parameters[0].grad for n in range(3)]
    assert found[0] is found[1] is found[2]

    def run(edit: Callable[[], object]) -> Tensor | None:
        edit()
        twin = copy.deepcopy(stages)
        twin[1][0].weight = twin[2][0].weight = twin[0][0].weight
        twin[0].zero_grad()
        other = Pipeline(twin, schedule, functional.mse_loss)
        program = assembled(other.program, parts)
        homes = {(n, 0): stage for n, stage in enumerate(other._runtime.stages)}
        shares = shares_of(list(twin), None)
        cpu = [torch.device("cpu")]
        other._runtime = Runtime(
            program, homes, functional.mse_loss, cpu, Surroundings(shares=shares)
        )
        other.step(x, y)
        return twin[0][0].weight.grad

    backwards = run(tie.reads.reverse)
    assert close([backwards], [found[0]])
    assert not torch.equal(backwards, found[0])
    assert run(lambda: parts.remove(tie)) is None


@pytest.mark.parametrize("fails", [True, False])
def test_a_step_that_breaks_off_leaves_what_was_there(fails: bool) -> None:
    stages = shared(2)
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    x, y = batch_of(stages, 4, torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails and (target == y[-1]).all(1).any():
            raise ValueError("no such word: 7")
        return functional.mse_loss(output, target)

    pipeline = Pipeline(stages, schedule, loss)
    weight = stages[0][0].weight
    weight.grad = before = torch.ones_like(weight)
    with pytest.raises(StepError) if fails else nullcontext():
        pipeline.step(x, y)

    assert weight.grad is before
    assert fails == torch.equal(before, torch.ones_like(weight))


@pytest.mark.parametrize(
    "job",
    [
        Tied(),
        Tied("zb-h1", told=(0,)),
        Tied("interleaved", 2, told=(0, 1)),
        Tied("interleaved", 4, told=(2,)),
        Tied("zb-v", 2, told=()),
        Tied("1f1b", 2, sparse=True),
        Tied("chimera", 4),
        Tied("chimera", 4, told=(1,), pair=(0, 1)),
        Tied("dualpipe", 4, pair=(1, 3)),
    ],
    ids=str,
)
def test_tied_ranks_train_as_one_process(job: Tied, do: Do) -> None:
    """Copies drifted apart, and a tied weight counted twice (faults 17 and 18)."""
    found = do(tied, job, job.devices)

    expected = tied(False, job)
    pair = {n % len(expected.weights) for n in job.pair}
    copies = [x.weights[n] for x in found for n in pair if n in x.weights]
    assert len(copies) in (2, 4)
    assert all(torch.equal(copies[0], copy) for copy in copies)
    for of_rank in found:
        assert of_rank.norms == found[0].norms
        assert of_rank.norms == expected.norms
        for stage, weight in of_rank.weights.items():
            assert torch.equal(weight, expected.weights[stage])
