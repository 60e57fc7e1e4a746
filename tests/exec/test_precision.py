"""Autocast, scaled losses, gradients summed in another type, and compiled stages."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import close, grads, mlp, same, schedules
from overflowing import Scaled, scaled
from pool import Do
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline, reference
from pipeproof.sched import POLICIES, Schedule, catalog, recompute

mse = functional.mse_loss
WIDTH = 4


class Sees(nn.Module):
    """Notes the type that a linear layer computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.seen.append(y.dtype)
        return y.tanh()


@settings(max_examples=20, deadline=None)
@given(schedule=schedules().filter(lambda s: s.slices == 1), seed=st.integers(0, 99))
def test_autocast_equals_the_reference(schedule: Schedule, seed: int) -> None:
    """It was lost in recomputation and in threads (fault 36)."""
    torch.manual_seed(seed)
    stages = [Sees() for _ in range(schedule.stages)]
    twin = copy.deepcopy(stages)
    x, y = torch.randn(2, schedule.micro_batches + 1, WIDTH)

    with torch.autocast("cpu", torch.bfloat16):
        loss = Pipeline(stages, schedule, mse).step(x, y)
        expected = reference(twin, schedule, mse, x, y)

    assert torch.equal(loss, expected)
    assert same(grads(stages), grads(twin))
    assert {dtype for stage in stages for dtype in stage.seen} == {torch.bfloat16}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "chimera"])
def test_gradients_of_halves_summed_in_float32(name: str, policy: str) -> None:
    """torch's `grad_dtype` says so; `deepcopy` does not copy it."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    schedule = recompute(catalog.make(name, devices=4, micro_batches=8), policy)
    stages = mlp(4, dtype=torch.bfloat16)
    twin = copy.deepcopy(stages)
    for stage in (*stages, *twin):
        for parameter in stage.parameters():
            parameter.grad_dtype = torch.float32
    x, y = torch.randn(2, 9, WIDTH, dtype=torch.bfloat16)

    Pipeline(stages, schedule, mse).step(x, y)
    reference(twin, schedule, mse, x, y)

    assert {grad.dtype for grad in grads(stages)} == {torch.float32}
    assert same(grads(stages), grads(twin))


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_scaled_losses_scale_gradients_and_nothing_else() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    stages = mlp(2)
    twin = copy.deepcopy(stages)
    x, y = torch.randn(2, 7, WIDTH, dtype=torch.float64)

    loss = Pipeline(stages, schedule, mse).step(x, y, scaler=scaler())

    assert torch.equal(loss, Pipeline(twin, schedule, mse).step(x, y))
    assert same(grads(stages), [1024 * grad for grad in grads(twin)])


@pytest.mark.parametrize("broken", [0, 1, None])
def test_an_overflow_in_one_stage_skips_all_optimizers(broken: int | None) -> None:
    """It was found in one stage only, and the others went on (fault 37)."""
    done = scaled(False, Scaled(broken))

    assert done.moved == ([broken is None] * 2)
    assert done.scales == [1024.0 if broken is None else 512.0] * 2


@pytest.mark.parametrize("broken", [0, 1, None])
def test_an_overflow_on_one_rank_skips_all_ranks(broken: int | None, do: Do) -> None:
    for done in do(scaled, Scaled(broken), 2):
        assert done.moved == [broken is None]
        assert done.scales == [1024.0 if broken is None else 512.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_compiled_stages(name: str) -> None:
    """Of a split backward I does all the work: a compiled graph is one node."""
    schedule = catalog.make(name, devices=2, micro_batches=3)
    stages = mlp(2)
    compiled = [torch.compile(s, backend="aot_eager") for s in copy.deepcopy(stages)]
    x, y = torch.randn(2, 6, WIDTH, dtype=torch.float64)

    Pipeline(stages, schedule, mse).step(x, y)
    Pipeline(compiled, schedule, mse).step(x, y)

    assert close(grads(compiled), grads(stages))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, in tracing
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_a_compiled_part_of_a_stage(name: str) -> None:
    """In halves, torch refused: a compiled graph lends its buffers to one backward."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.GELU()).double()
    compiled = torch.compile(inner, backend="aot_eager")
    first, last = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
    x = torch.randn(8, 4, dtype=torch.float64)
    found = []
    for middle, recomputed in ((inner, None), (compiled, None), (compiled, [{1}])):
        plan = catalog.make(name, devices=1, micro_batches=4)
        stages = [nn.Sequential(first, middle, last)]
        if recomputed is not None:
            plan = recompute(plan, "always")
        Pipeline(stages, plan, mse, recomputed=recomputed).step(x, x)
        found.append([p.grad for p in stages[0].parameters()])
        stages[0].zero_grad()

    assert all(close(ours, found[0]) for ours in found[1:])
