"""What stages take: bytes as a meter counts them, and gradients untouched."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pool import Do
from profiling import profiled, profiled_with_steps, small_stages
from torch import nn
from torch.nn import functional

from pipeproof.cli.profiling import bytes_of
from pipeproof.cli.together import peak_of_process
from pipeproof.exec import ActivationMeter, Pipeline, profile
from pipeproof.exec.variants import variants
from pipeproof.sched import (
    CATALOG,
    POLICIES,
    Kind,
    ParameterError,
    catalog,
    check,
    recompute,
    with_steps,
)
from pipeproof.sched.transforms import Policy
from pipeproof.sim import Cost, cost_of


@pytest.mark.parametrize("name", CATALOG)
def test_variants_of_every_row(name: str) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=8)

    found = variants(schedule, steps=True)

    assert found["whole"].has(Kind.STEP)
    assert variants(schedule)["whole"] != found["whole"]
    assert with_steps(variants(schedule)["whole"]) == found["whole"]
    assert all(check(variant).ok for variant in found.values())
    assert all(v.placement == schedule.placement for v in found.values())
    assert found["whole"].has(Kind.B)
    assert not found["whole"].has(Kind.W)
    assert found["halves"].has(Kind.W)
    assert not found["halves"].has(Kind.B)
    assert found["recomputed"].has(Kind.R)
    for device in range(4):
        row = list(found["halves"].row(device))
        for i, w in pairwise(row):
            assert (i.kind, w.kind) != (Kind.I, Kind.W) or i[1:] != w[1:]


def test_bytes_are_those_of_the_tensors(do: Do) -> None:
    alone = profiled(None, "1f1b")
    across = do(profiled, "1f1b", 2)

    tensor, weights = 3 * 8 * 4, 2 * (64 + 8) * 4
    first, last = alone.stages
    # Tanh's output, and for W also the batch, which is no activation.
    assert (first.activations, first.input, first.output) == (tensor, 0, tensor)
    # Beside its input, tanh's output; the loss keeps the difference's two sides.
    assert last.input == tensor
    assert last.activations == 3 * tensor
    assert last.output == 0
    assert first.weights == first.gradients == weights
    assert alone.link_rates == {}
    for found in across:
        assert found.link_rates.keys() == {(0, 1), (1, 0)}
        assert found.link_rates == across[0].link_rates
        assert min(found.link_rates.values()) > 0
        assert found.stages == alone.stages
        assert len(found.traces) == 3


def test_steps_are_measured_with_their_optimizers(do: Do) -> None:
    """And weights, moments and gradients are then what they were."""
    across = do(profiled_with_steps, "zb-v", 2)
    for found in (profiled_with_steps(None, "zb-v"), *across):
        whole, *others = (trace.program for trace in found.traces)
        assert whole.schedule.has(Kind.STEP)
        assert not any(program.schedule.has(Kind.STEP) for program in others)
        cost = cost_of(found.traces)
        assert len(cost.step) == 4
        assert min(cost.step) > 0
        assert cost_of(found.traces[1:]).step == 0


def test_refusals() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    x = torch.ones(2, 8)

    with pytest.raises(ParameterError, match="rounds must be at least 1, got 0"):
        profile(small_stages(2), schedule, functional.mse_loss, x, x, rounds=0)
    with pytest.raises(ParameterError, match="micro_batches=2\\) has none: add them"):
        profile(small_stages(2), schedule, None, x, None, optimizers=[None, None])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved", "chimera"]
)
def test_peak_of_one_process_is_the_predicted_one(name: str, policy: Policy) -> None:
    """Where a ReLU's output, which it keeps, is the next stage's input; and others.

    An I whose W follows at once lets go of all that both need. Tensors are large
    enough for other I to let go of what their W do not need, too.
    """
    plan = recompute(catalog.make(name, devices=2, micro_batches=4), policy)
    torch.manual_seed(0)
    endings = [nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid(), nn.GELU()]
    stages = [
        nn.Sequential(nn.Linear(16, 16), endings[number % 4])
        for number in range(plan.stages)
    ]
    x = torch.randn(4 * 512, 16)

    taken = profile(stages, plan, functional.mse_loss, x, x, rounds=1)

    pipeline = Pipeline(stages, plan, functional.mse_loss)
    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        pipeline.step(x, x)
    cost = Cost(**bytes_of(taken.stages))
    returned = [stage.returned for stage in taken.stages]
    assert meter.peak == peak_of_process(pipeline.program, cost, returned)
