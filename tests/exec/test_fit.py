"""A measured trace as a cost."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.sched import catalog, recompute
from pipeproof.sim import Cluster, Cost, fit, simulate


def test_a_measured_step_predicts_another() -> None:
    """What was fitted, simulated and fitted again is the same cost."""
    schedule = recompute(catalog.make("1f1b", devices=2, micro_batches=4), "always")
    stages = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    x = torch.randn(8, 8)
    pipeline.step(x, x, record=True)
    trace = pipeline.trace
    assert trace is not None
    found = fit(trace)

    assert found.cost == Cost.from_trace(trace)
    assert set(found.residuals) == {
        (name, stage)
        for name in ("forward", "backward", "recompute")
        for stage in range(2)
    }
    assert found.residual > 0
    predicted = simulate(pipeline.program, found.cost, Cluster(shared_processor=True))
    again = fit(predicted)
    assert again.residual == pytest.approx(0, abs=1e-9)
    for name in ("forward", "backward", "recompute"):
        assert getattr(again.cost, name) == pytest.approx(getattr(found.cost, name))
