"""Two pipes: replicas of a stage, and the sum of their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from models import against_reference, batch_of, grads, mlp, same
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline, reference
from pipeproof.sched import Schedule, catalog

mse = functional.mse_loss


def two_pipes(devices: int = 2, micro_batches: int = 4) -> Schedule:
    return catalog.make("gems", devices=devices, micro_batches=micro_batches)


def batch(rows: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return batch_of(mlp(1), rows, torch.float64)


def test_each_device_sums_its_own_and_the_sums_are_added_once() -> None:
    """(.grad + ((B0 + B2) + (B1 + B3))), not a chain of all five."""
    stages = mlp(2, dtype=torch.float32)
    x, y = (tensor.float() for tensor in batch(8))
    before = [torch.randn_like(p) for stage in stages for p in stage.parameters()]
    by_micro_batch = []
    for rows, targets in zip(x.tensor_split(4), y.tensor_split(4)):
        twin = copy.deepcopy(stages)
        (mse(twin[1](twin[0](rows)), targets) * 0.25).backward()
        by_micro_batch.append(grads(twin))
    for parameter, grad in zip(nn.ModuleList(stages).parameters(), before):
        parameter.grad = grad.clone()

    Pipeline(stages, two_pipes(), mse).step(x, y)

    first, second, third, fourth = by_micro_batch
    even = [a + b for a, b in zip(first, third)]  # device 0 has stage 0 of pipe 0 …
    odd = [a + b for a, b in zip(second, fourth)]
    sums = [a + b for a, b in zip(even, odd)]  # … and addition commutes
    assert same(grads(stages), [a + b for a, b in zip(before, sums)])


@pytest.mark.parametrize("name", ["gems", "chimera", "dualpipe"])
def test_copies_on_another_torch_device_follow_the_optimizer(name: str) -> None:
    """torch takes cpu:0 for another device than cpu, so replicas are copied."""
    schedule = catalog.make(name, devices=4, micro_batches=8)
    stages = mlp(schedule.stages)
    twin = copy.deepcopy(stages)
    x, y = batch()
    devices = ["cpu", "cpu:0", "cpu", "cpu:0"]
    apart = Pipeline(stages, schedule, mse, devices=devices)
    together = Pipeline(twin, schedule, mse)

    for _ in range(3):
        for model, pipeline in ((stages, apart), (twin, together)):
            optimizer = torch.optim.SGD(nn.ModuleList(model).parameters(), lr=0.5)
            optimizer.zero_grad()
            pipeline.step(x, y)
            optimizer.step()
        assert same(grads(stages), grads(twin))
    assert same(
        list(nn.ModuleList(stages).parameters()), list(nn.ModuleList(twin).parameters())
    )


def test_copies_take_over_modes_flags_and_buffers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)
            self.register_buffer("scale", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale * (2 if self.training else 1)

    torch.manual_seed(0)
    stages = [Scaled(), Scaled()]
    twin = copy.deepcopy(stages)
    devices = ["cpu", "cpu:0"]
    pipelines = [
        (stages, Pipeline(stages, two_pipes(), mse, devices=devices)),
        (twin, Pipeline(twin, two_pipes(), mse)),
    ]
    for model, pipeline in pipelines:
        model[0].scale.fill_(3)
        model[1].eval()
        model[1].linear.bias.requires_grad_(False)
        pipeline.step(*batch())

    assert same(grads(stages), grads(twin))
    assert stages[1].linear.bias.grad is None


def test_nothing_of_a_step_that_broke_off_is_in_the_next() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if failing and len(calls) == 6:
                raise ValueError("on purpose")
            calls.append(True)
            return x

    calls: list[bool] = []
    stages = [nn.Sequential(part, Fails()) for part in mlp(2)]
    twin = copy.deepcopy(stages)
    pipeline = Pipeline(stages, two_pipes(), mse)
    failing = True
    with pytest.raises(RuntimeError, match="on purpose"):
        pipeline.step(*batch())
    assert all(grad is None for grad in grads(stages)), "no REDUCE came yet"

    failing = False
    pipeline.step(*batch())
    Pipeline(twin, two_pipes(), mse).step(*batch())
    assert same(grads(stages), grads(twin))


def test_one_pipe_with_reductions_adds_to_grad_as_without() -> None:
    rows = "device 0 | 0F0 0F1 0B0 0B1{}\ndevice 1 | 1F0 1F1 1B0 1B1{}\n"
    header = "devices: 2\nplacement: linear\nmicro-batches: 2\n\n"
    stages = mlp(2)
    twin = copy.deepcopy(stages)
    against_reference(stages, Schedule.parse(header + rows.format("", "")), *batch())

    with_reduce = Schedule.parse(header + rows.format(" 0REDUCE", " 1REDUCE"))
    against_reference(twin, with_reduce, *batch())

    assert same(grads(stages), grads(twin))


def test_a_norm_that_counts_micro_batches_is_refused() -> None:
    stages = [
        nn.Sequential(*mlp(1), nn.BatchNorm1d(4, dtype=torch.float64)) for _ in range(2)
    ]
    pipeline = Pipeline(stages, two_pipes(), mse)
    with pytest.raises(ModelError, match="replicas on several devices, and its BatchN"):
        pipeline.step(*batch())

    for stage in stages:
        stage.zero_grad()
        stage[1].eval()
    against_reference(stages, two_pipes(), *batch())


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu:0"]])
@pytest.mark.parametrize("before", [False, True])
def test_replicas_may_share_a_parameter(devices: list[str], before: bool) -> None:
    """REDUCE sums each stage's gradient, and one TIE these, once to `.grad`."""
    stages, (x, y) = mlp(2), batch()
    stages[1][0].weight = weight = stages[0][0].weight
    if before:
        weight.grad = torch.full_like(weight, 0.1)
    twins = copy.deepcopy(stages)
    if before:
        twins[0][0].weight.grad = torch.full_like(weight, 0.1)
    pipeline = Pipeline(stages, two_pipes(), mse, devices=devices)
    for _ in range(2):
        pipeline.step(x, y)
        reference(twins, two_pipes(), mse, x, y)

    assert pipeline.schedule.ties == ((0, 1),)
    assert same(grads(stages), grads(twins))


@pytest.mark.parametrize("name", ["chimera", "dualpipe", "gems"])
@pytest.mark.parametrize("pair", [(0, 3), (0, 1), (1, 2)])
def test_every_way_that_replicas_lie(name: str, pair: tuple[int, int]) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=8)
    stages = mlp(4)
    stages[pair[1]][0].weight = stages[pair[0]][0].weight

    against_reference(stages, schedule, *batch_of(stages, 11, torch.float64))
