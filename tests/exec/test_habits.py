"""What users do around models: checkpoint, hook, copy, schedule rates, evaluate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import against_reference, close, grads, mlp
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint

from pipeproof.exec import ModelError, Pipeline, reference, split_evenly
from pipeproof.sched import catalog, recompute, with_steps

mse = functional.mse_loss
NAMES = ["1f1b", "zb-h1", "chimera"]
pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, count, 4, dtype=torch.float64)
    return x, y


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*mlp(1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=True)
        return found


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_equals_its_reference(name: str) -> None:
    plan = catalog.make(name, devices=2, micro_batches=4)
    stages = [nn.Sequential(*mlp(1), Checkpointed()) for _ in range(plan.stages)]
    x, y = rows()
    against_reference(stages, plan, (x * 2).requires_grad_(), y)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_of_what_is_tied_to_a_dense_layer(name: str) -> None:
    """They add up in either order, and over steps."""

    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight)

    def model() -> list[nn.Module]:
        table = nn.Embedding(7, 4, sparse=True, dtype=torch.float64)
        return [table, *mlp(2), Head(table.weight)]

    torch.manual_seed(0)
    layers = model()
    twin = copy.deepcopy(layers)
    plan = catalog.make(name, devices=2, micro_batches=4)
    ids, labels = torch.randint(7, (2, 9))
    loss_fn = functional.cross_entropy
    pipeline = Pipeline(split_evenly(layers, 2), plan, loss_fn)
    for _ in range(2):
        pipeline.step(ids, labels)
        reference(split_evenly(twin, 2), pipeline.schedule, loss_fn, ids, labels)

    assert all(map(torch.equal, grads(layers), grads(twin)))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_what_is_tied_see_each_stage_s_gradient(name: str) -> None:
    plan = catalog.make(name, devices=2, micro_batches=4)
    found = []
    for pipelined in (True, False):
        stages = mlp(2)
        stages[1][0].weight = shared = stages[0][0].weight
        shared.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        if pipelined:
            Pipeline(stages, plan, mse).step(*rows())
        else:
            reference(stages, plan.with_ties([(0, 1)]), mse, *rows())
        found.append(shared.grad)

    assert torch.equal(*found)
    assert found[0].abs().max() <= 0.08


def test_hooks_that_come_later_and_put_hooks_on_tensors() -> None:
    """In I and in W they would run twice."""
    stages, twin = mlp(4), mlp(4)
    plan = catalog.make("zb-h1", devices=4, micro_batches=4)
    pipeline = Pipeline(stages, plan, mse)
    x, y = rows()
    found = []
    for layers in (stages, twin):
        calls: list[int] = []
        for later in (False, True):
            if later:
                layers[1][0].register_forward_hook(
                    lambda module, inputs, output, calls=calls: (
                        output.register_hook(
                            lambda grad: calls.append(1) or grad.clamp(-0.01, 0.01)
                        )
                        and None
                    )
                )
            if layers is stages:
                pipeline.step(x, y)
            else:
                reference(layers, plan, mse, x, y)
        found.append(len(calls))

    assert found == [4, 4]
    assert all(map(torch.equal, grads(stages), grads(twin)))


def test_a_learning_rate_that_has_a_scheduler() -> None:
    """It hides the optimizer's `step` behind a function of its own."""
    stages, twin = mlp(2), mlp(2)
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    own = [torch.optim.Adam(stage.parameters(), lr=0.1) for stage in stages]
    rates = [StepLR(optimizer, 1, 0.5) for optimizer in own]
    pipeline = Pipeline(stages, with_steps(plan), mse, optimizers=own)
    whole = nn.Sequential(*twin)
    theirs = torch.optim.Adam(whole.parameters(), lr=0.1)
    rate = StepLR(theirs, 1, 0.5)
    x, y = rows()
    for _ in range(3):
        pipeline.step(x, y)
        mse(whole(x), y).backward()
        theirs.step()
        theirs.zero_grad()
        for each in (*rates, rate):
            each.step()

    ours = [p.detach() for stage in stages for p in stage.parameters()]
    assert close(ours, [p.detach() for p in whole.parameters()])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return mse(self.drop(output), targets)


def test_evaluation_has_a_loss_of_modules_in_eval_mode() -> None:
    stages, loss_fn = mlp(2), Noisy()
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    x, y = rows()
    found = Pipeline(stages, plan, loss_fn).evaluate(x, y)

    assert loss_fn.training
    assert loss_fn.drop.training
    with torch.no_grad():
        assert close([found], [mse(nn.Sequential(*stages)(x), y)])


def test_predictions_in_inference_mode() -> None:
    stages = mlp(2)
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    x, y = rows()
    pipeline = Pipeline(stages, plan, mse)
    with torch.inference_mode():
        found = pipeline.predict(x)
        loss = pipeline.evaluate(x, y)
    pipeline.step(x, y)

    expected = nn.Sequential(*stages)(x).detach()
    assert close([found, loss], [expected, mse(expected, y)])


def test_a_leaf_changed_in_place_is_named() -> None:
    """Autograd refuses it before it can be seen."""
    stages = [mlp(1)[0], nn.Sequential(nn.ReLU(inplace=True), *mlp(1))]
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    with pytest.raises(ModelError, match="stage 1 changes its input in place, which"):
        Pipeline(stages, plan, mse).step(*rows())


def test_what_autograd_finds_changed_is_named() -> None:
    """Weights that hooks update while other micro-batches are under way."""
    stages = mlp(2)

    def update(parameter: Tensor) -> None:
        parameter.data.sub_(0.1)
        with torch.no_grad():
            parameter.mul_(0.9)

    stages[0][0].weight.register_post_accumulate_grad_hook(update)
    plan = catalog.make("gpipe", devices=2, micro_batches=4)
    x, y = rows()
    with pytest.raises(ModelError, match=r"shape \(4, 4\) was changed in place after"):
        Pipeline(stages, plan, mse).step(x.requires_grad_(), y)


def test_the_default_device_does_not_matter() -> None:
    """The seed of a step comes from the default generator wherever tensors go."""
    torch.manual_seed(0)
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    x, y = rows()
    pipeline = Pipeline(mlp(2), plan, mse)
    with torch.device("meta"):
        pipeline.step(x, y)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pipeline_is_not_copied_by_halves(twin: Callable[[Pipeline], object]) -> None:
    plan = recompute(catalog.make("1f1b", devices=2, micro_batches=4), "always")
    pipeline = Pipeline(mlp(2), plan, mse)
    with pytest.raises(ModelError, match="neither copied nor pickled: copy its stages"):
        twin(pipeline)


def test_a_sequence_that_changes_behind_the_pipeline_s_back_is_refused() -> None:
    stages = mlp(2)
    plan = catalog.make("1f1b", devices=2, micro_batches=4)
    pipeline = Pipeline(stages, plan, mse)
    pipeline.step(*rows())
    hook = stages[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="stage 1 has other modules in its sequence"):
        pipeline.step(*rows())
    hook.remove()
    pipeline.step(*rows())
    del stages[0][1]
    with pytest.raises(ModelError, match="stage 0 has other modules in its sequence"):
        pipeline.evaluate(*rows())


def test_what_a_sequential_holds_itself_is_part_of_its_stage() -> None:
    stages = mlp(2)
    stages[1].register_parameter("own", nn.Parameter(torch.ones(3)))
    plan = with_steps(catalog.make("1f1b", devices=2, micro_batches=4))
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.1) for s in stages]

    pipeline = Pipeline(stages, plan, mse, optimizers=optimizers)
    assert set(pipeline.state_dict(nn.Sequential(*stages))) >= {"1.own"}
