"""STEP in the executor: as reference gradients, and then the same optimizers."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DTYPES, EXECUTED, as_said, batch_of, mlp, models, schedules, small
from pool import Do
from stepping import Stepping, of_references, spoiled, stepped_on_ranks
from strategies import stepping
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from pipeproof.exec import Pipeline, StepError, reference, split_at
from pipeproof.exec.examples import gpt_layers, token_loss
from pipeproof.sched import (
    Kind,
    Schedule,
    catalog,
    reduce_gradients,
    with_steps,
)

mse = functional.mse_loss
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")


def adam(stages: Sequence[nn.Module]) -> list[Optimizer | None]:
    return [Adam(stage.parameters(), lr=0.05, weight_decay=0.1) for stage in stages]


def weights(stages: Sequence[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for stage in stages for p in stage.parameters()]


def stepped(
    stages: Sequence[nn.Module], schedule: Schedule, batches: Any
) -> list[Tensor]:
    """Weights after plain loops, each followed by the optimizers."""
    optimizers = adam(stages)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        reference(stages, schedule, mse, *batch)
        for optimizer in optimizers:
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()
    return weights(stages)


def trained(
    stages: Sequence[nn.Module], schedule: Schedule, batches: Any, **options: Any
) -> list[Tensor]:
    pipeline = Pipeline(list(stages), schedule, mse, optimizers=adam(stages), **options)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        pipeline.step(*batch)
        assert all(p.grad is None for stage in stages for p in stage.parameters())
    return weights(stages)


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("name", EXECUTED)
def test_every_row_trains_as_its_reference(name: str) -> None:
    schedule = with_steps(small(name))
    stages = mlp(schedule.stages)
    twins = copy.deepcopy(stages)
    shape = (16, 6, 4) if schedule.slices > 1 else (16, 4)
    batches = [torch.randn(2, *shape, dtype=torch.float64) for _ in range(3)]
    expected = stepped(twins, schedule, batches)

    assert equal(trained(stages, schedule, batches), expected)
    assert not equal(weights(mlp(schedule.stages)), expected)


@settings(max_examples=15)
@given(data=st.data(), schedule=schedules(), dtype=st.sampled_from(DTYPES))
def test_any_model_and_schedule(
    data: st.DataObject, schedule: Schedule, dtype: torch.dtype
) -> None:
    if data.draw(st.booleans()):
        schedule = reduce_gradients(schedule)
    schedule = with_steps(schedule)
    sequence = schedule.slices > 1
    stages = data.draw(models(schedule.stages, dtype, sequence=sequence))
    rows = 2 * schedule.micro_batches + 1
    positions = schedule.slices + 1 if sequence else 0
    batches = [batch_of(stages, rows, dtype, positions) for _ in range(2)]

    expected = stepped(copy.deepcopy(stages), schedule, batches)

    assert equal(trained(stages, schedule, batches), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), schedule=stepping(), dtype=st.sampled_from(DTYPES))
def test_whatever_can_be_said_trains_as_its_reference(
    data: st.DataObject, schedule: Schedule, dtype: torch.dtype
) -> None:
    """Ties and replicas, together and alone, too."""
    stages = data.draw(models(schedule.stages, dtype, sequence=True))
    stages = as_said(stages, schedule)
    rows = 2 * schedule.micro_batches + 1
    batches = [batch_of(stages, rows, dtype, 5) for _ in range(2)]

    expected = stepped(copy.deepcopy(stages), schedule, batches)

    assert equal(trained(stages, schedule, batches), expected)


def plan(devices: int = 2, micro_batches: int = 3) -> Schedule:
    return with_steps(
        catalog.make("1f1b", devices=devices, micro_batches=micro_batches)
    )


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    x, y = torch.randn(2, rows, 4, dtype=torch.float64)
    return x, y


def test_a_stage_is_updated_while_others_go_backward() -> None:
    seen: list[str] = []

    class Told(SGD):
        def step(self, closure: Any = None) -> None:
            seen.append("step")
            super().step()

    stages = mlp(3)
    stages[0][0].weight.register_hook(lambda _: seen.append("backward of 0"))
    optimizers = [Told(stage.parameters(), lr=0.1) for stage in stages]
    Pipeline(stages, plan(3, 1), mse, optimizers=optimizers).step(*batch())

    assert seen == ["step", "backward of 0", "step", "step"]


def test_gradients_of_several_steps_add_up() -> None:
    schedule, (x, y) = plan(), batch()
    stages = mlp(2)
    twins = copy.deepcopy(stages)
    pipeline = Pipeline(stages, schedule, mse, optimizers=adam(stages))
    pipeline.step(x, y, accumulate=True)
    assert equal(weights(stages), weights(twins))
    pipeline.step(y, x)

    for pair in ((x, y), (y, x)):
        reference(twins, schedule, mse, *pair)
    for optimizer in adam(twins):
        assert optimizer is not None
        optimizer.step()
    assert equal(weights(stages), weights(twins))


def test_a_stage_that_learns_nothing_needs_no_optimizer() -> None:
    stages = mlp(3)
    stages[0].requires_grad_(False)
    stages[1] = nn.Tanh()
    twins = copy.deepcopy(stages)
    optimizers = [None, None, SGD(stages[2].parameters(), lr=0.1)]
    Pipeline(stages, plan(3), mse, optimizers=optimizers).step(*batch())

    reference(twins, plan(3), mse, *batch())
    SGD(twins[2].parameters(), lr=0.1).step()
    assert equal(weights(stages), weights(twins))


def tied(stages: int) -> list:
    """The first and the last stage share a weight."""
    found = mlp(stages)
    found[-1][0].weight = found[0][0].weight
    return found


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v", "chimera", "dualpipe"])
def test_tied_stages_train_as_their_reference(name: str) -> None:
    """Also where gradients of a step before are in `.grad` already."""
    schedule = with_steps(catalog.make(name, devices=4, micro_batches=8))
    stages = tied(schedule.stages)
    twins = copy.deepcopy(stages)
    optimizers = adam(stages)
    pipeline = Pipeline(stages, schedule, mse, optimizers=optimizers)
    assert pipeline.schedule.ties == ((0, schedule.stages - 1),)
    own = adam(twins)
    for number in range(3):
        for accumulate in (True, False):
            x, y = batch(9 + number)
            pipeline.step(x, y + accumulate, accumulate=accumulate)
            reference(twins, schedule, mse, x, y + accumulate)
        for optimizer in own:
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()

    assert equal(weights(stages), weights(twins))
    assert stages[-1][0].weight is stages[0][0].weight


def test_a_gpt_whose_head_is_its_embedding() -> None:
    torch.manual_seed(0)
    layers = gpt_layers(vocabulary=32, tokens=8, width=16, layers=2)
    layers[-1][1].weight = layers[0].token.weight
    schedule = with_steps(catalog.make("1f1b", devices=4, micro_batches=4))
    stages = split_at(layers, [1] * 4)
    twins = list(copy.deepcopy(nn.ModuleList(stages)))
    pipeline = Pipeline(stages, schedule, token_loss, optimizers=adam(stages))
    own, losses = adam(twins), []
    for number in range(3):
        ids = torch.randint(32, (8, 8))
        torch.manual_seed(number)
        losses.append(pipeline.step(ids, ids))
        torch.manual_seed(number)
        reference(twins, schedule, token_loss, ids, ids)
        for optimizer in own:
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()

    assert equal(weights(stages), weights(twins))
    assert losses[2] < losses[0]


def test_one_optimizer_updates_what_is_shared_and_all_have_its_state() -> None:
    """The first stage's, though the last one's STEP comes first here."""
    schedule = catalog.make("interleaved", devices=1, micro_batches=2)
    ties = with_steps(schedule.with_ties([(0, schedule.stages - 1)]))
    row = list(ties.row(0))
    backwards = ties.with_rows([[*row[:-2], row[-1], row[-2]]])
    stages = tied(schedule.stages)
    weight, twins = stages[0][0].weight, copy.deepcopy(stages)
    optimizers = adam(stages)
    Pipeline(stages, backwards, mse, optimizers=optimizers).step(*batch())

    first, last = optimizers[0], optimizers[-1]
    assert first is not None
    assert last is not None
    assert first.state[weight]["step"] == 1
    assert last.state[weight] is first.state[weight]
    assert weight.grad is None
    assert equal(weights(stages), stepped(twins, backwards, [batch()]))


def test_each_step_is_in_the_trace() -> None:
    stages = mlp(2)
    pipeline = Pipeline(stages, plan(), mse, optimizers=adam(stages))
    pipeline.step(*batch(), record=True)

    trace = pipeline.trace
    steps = [i for i in range(len(trace.program)) if "STEP" in trace.program.label(i)]
    assert len(steps) == 2
    assert all(trace.end[i] > trace.start[i] for i in steps)


def test_an_optimizer_that_raises_says_which() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no memory for moments")

    stages = mlp(2)
    optimizers = [SGD(stages[0].parameters()), Broken(stages[1].parameters())]
    pipeline = Pipeline(stages, plan(), mse, optimizers=optimizers)

    with pytest.raises(StepError) as found:
        pipeline.step(*batch())

    assert str(found.value) == (
        "the step broke off at 1STEP (stage 1, device cpu): RuntimeError: no memory "
        "for moments\nSome stages may be updated and others not, and gradients be half "
        "added up: load a checkpoint before the next step."
    )
    assert "in step" in "".join(traceback.format_exception(found.value))


def test_replicas_on_several_torch_devices_follow_the_users_own() -> None:
    """A copy takes over the values that the STEP of the original left."""
    schedule = with_steps(catalog.make("chimera", devices=2, micro_batches=2))
    assert schedule.has(Kind.REDUCE)
    stages = mlp(2)
    twins = copy.deepcopy(stages)
    batches = [batch(), batch()[::-1], batch()]

    found = trained(stages, schedule, batches, devices=["cpu", "cpu:0"])

    assert equal(found, stepped(twins, schedule, batches))


@pytest.mark.parametrize(
    "job",
    [
        Stepping("1f1b", 4),
        Stepping("interleaved", 4),
        Stepping("chimera", 4),
        Stepping("zb-v", 2, replicas=2),
        Stepping("1f1b", 4, tied=True),
        Stepping("chimera", 4, tied=True),
        Stepping("interleaved", 2, replicas=2, tied=True),
        pytest.param(Stepping("zb-v", 2, replicas=2, tied=True), marks=slow),
        Stepping("interleaved", 2, replicas=2, sharded=True),
        pytest.param(Stepping("bpipe", 4), marks=slow),
    ],
    ids=str,
)
def test_ranks_train_as_their_references(job: Stepping, do: Do) -> None:
    """Also copies of one stage on several ranks, which each rank steps."""
    expected = of_references(job)
    found = do(stepped_on_ranks, job)

    assert set().union(*found) == set(expected)
    for of_rank in found:
        assert of_rank == {stage: expected[stage] for stage in of_rank}


def test_copies_in_replicas_of_replicas_stay_alike(do: Do) -> None:
    """Each stage on all four ranks, the sum of which has an order of its own."""
    first, *others = do(stepped_on_ranks, Stepping("chimera", 2, 2, tied=True))

    assert set(first) == {0, 1}
    assert all(of_rank == first for of_rank in others)


def test_an_optimizer_that_raises_ends_all_ranks(do: Do) -> None:
    found = do(spoiled, "raises")

    assert all("rank 1 failed in the step" in found[rank] for rank in (0, 2, 3))
    for words in found:
        assert "the step broke off at 1STEP (stage 1, device cpu)" in words
        assert "no memory for moments" in words
        assert "load a checkpoint" in words


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other", "optimizer of stage 0:"),
        ("accumulates", "rank 1 was called with accumulate=True, and rank 0 with"),
        ("none", "has STEPs, and nothing to step with"),
        ("tied", "stages 0 and 3 share a parameter, and their optimizers would"),
    ],
)
def test_ranks_refuse_what_differs(kind: str, words: str, do: Do) -> None:
    assert all(words in said for said in do(spoiled, kind))
