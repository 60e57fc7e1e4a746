"""Live activations: counted from outside, held against the prediction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from models import EXECUTED, Keeps, schedules
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline, split_evenly
from pipeproof.exec.examples import Block
from pipeproof.sched import POLICIES, Schedule, catalog, recompute
from pipeproof.sim import Cluster, Cost, simulate

SAVED = 1000


def measured_peaks(schedule: Schedule) -> list[int]:
    """Peak number of micro-batches whose activations each stage keeps."""
    stages = [Keeps(SAVED) for _ in range(schedule.stages)]
    pipeline = Pipeline(stages, schedule, lambda output, _: output.sum())
    x = torch.zeros(schedule.micro_batches, 1, dtype=torch.float64)
    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        pipeline.step(x, x)
    assert meter.live == 0
    assert sum(meter.live_of) == 0
    return [round(peak / (8 * SAVED), 2) for peak in meter.peak_of]


@settings(max_examples=60, deadline=None)
@given(schedule=schedules())
def test_peaks_are_the_predicted_ones(schedule: Schedule) -> None:
    assume(schedule.stages == schedule.devices)

    assert measured_peaks(schedule) == simulate(schedule).peak_activations


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("never", 8), ("always", 1), ("except-last", 1), ("adaptive", 1)],
)
def test_gpipe_with_eight_micro_batches(policy: str, expected: int) -> None:
    schedule = recompute(catalog.make("gpipe", devices=4, micro_batches=8), policy)

    assert measured_peaks(schedule) == [expected] * 4


def test_first_in_first_out_keeps_one_more_except_last() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=8, backward="fifo")

    assert measured_peaks(recompute(schedule, "except-last")) == [2, 2]
    assert measured_peaks(recompute(schedule, "adaptive")) == [1, 1]


def width_and_bytes(stages: list[nn.Sequential], x: Tensor) -> dict[str, list[int]]:
    """Bytes of each stage's activations and output, of one micro-batch."""
    kept, boundary = [], []
    value = x
    for stage in stages:
        with ActivationMeter([stage]) as meter:
            output = stage(value.detach().requires_grad_())
            kept.append(meter.peak)
        boundary.append(output.untyped_storage().nbytes())
        value = output
    return {"activation_bytes": kept, "boundary_bytes": boundary}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXECUTED)
def test_bytes_of_a_transformer_are_the_predicted_ones(name: str, policy: str) -> None:
    """Activations, stage inputs and stored inputs, over all stages together."""
    torch.manual_seed(0)
    layers = [Block(64, 4, dropout=0.0).double() for _ in range(6)]
    schedule = recompute(catalog.make(name, devices=3, micro_batches=6), policy)
    stages = split_evenly(layers, schedule.stages)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    x = torch.randn(12, 96, 64, dtype=torch.float64)
    bytes_of = width_and_bytes(stages, x[:2].clone())
    # The loss keeps the last stage's output and the targets, views of the batch.
    bytes_of["activation_bytes"][-1] += bytes_of["boundary_bytes"][-1]

    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        pipeline.step(x, x)

    bytes_of["input_bytes"] = [0, *bytes_of["boundary_bytes"][:-1]]
    bytes_of["activation_bytes"][0] -= bytes_of["boundary_bytes"][0]  # the batch
    cost = Cost(**bytes_of)
    trace = simulate(pipeline.program, cost, Cluster(shared_processor=True))
    by_class = trace.memory().by_class
    counted = by_class["activations"] + by_class["stored_inputs"]
    assert meter.peak == max(counted.tolist())
