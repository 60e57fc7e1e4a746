"""AmoebaNet-D as the experiment counts it."""

from __future__ import annotations

import amoebanet_model
import pytest
import torch
from amoebanet_count import TABLE, Row, count, counted
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline, split_evenly
from pipeproof.sched import ParameterError, catalog, recompute


def small() -> torch.nn.Sequential:
    return amoebanet_model.amoebanet(3, 16, amoebanet_model.Reading(classes=4))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_parameters_are_the_published_ones(row: Row) -> None:
    with torch.device("meta"):
        model = amoebanet_model.amoebanet(row.cells, row.filters)

    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == pytest.approx(row.parameters, rel=0.03)


def test_shapes_of_every_layer() -> None:
    with torch.device("meta"):
        value = torch.empty(2, 3, 224, 224)
        shapes = []
        for layer in amoebanet_model.amoebanet(3, 16):
            value = layer(value)
            shapes.append(tuple((value if torch.is_tensor(value) else value[0]).shape))

    assert shapes == [
        (2, 32, 112, 112),
        (2, 3 * 4, 56, 56),
        (2, 3 * 8, 28, 28),
        (2, 4 * 16, 28, 28),
        (2, 3 * 32, 14, 14),
        (2, 4 * 32, 14, 14),
        (2, 3 * 64, 7, 7),
        (2, 4 * 64, 7, 7),
        (2, 1000),
    ]


def test_cells_that_are_alike_are_counted_once() -> None:
    with torch.device("meta"):
        model = amoebanet_model.amoebanet(12, 16)

    assert count(12, 16) == counted(model)


@pytest.mark.parametrize("policy", ["never", "always"])
def test_the_executor_keeps_what_is_counted(policy: str) -> None:
    micro_batches, rows, pixels = 2, 2, 64
    torch.manual_seed(0)
    stages = split_evenly(small(), 3)
    schedule = catalog.make("gpipe", devices=3, micro_batches=micro_batches)
    pipeline = Pipeline(stages, recompute(schedule, policy), functional.cross_entropy)
    images = torch.randn(micro_batches * rows, 3, pixels, pixels)
    labels = torch.randint(4, (len(images),))

    with ActivationMeter(stages) as meter:
        meter.ignore(images, labels)
        pipeline.step(images, labels)

    with torch.device("meta"):
        layers = iter(counted(small(), pixels))
    # What has one dimension is not counted: statistics of batch norms, saved ones and
    # those that recomputation undoes. The loss keeps less than that.
    held = micro_batches if policy == "never" else 1
    for stage, measured in zip(stages, meter.peak_of):
        kept = held * rows * sum(next(layers).kept for _ in stage)
        channels = sum(
            2 * m.num_features * 4
            for m in stage.modules()
            if isinstance(m, torch.nn.BatchNorm2d)
        )
        assert kept <= measured <= kept + micro_batches * (channels + 256)


def test_refuses_stacks_of_unequal_length() -> None:
    with pytest.raises(
        ParameterError, match=r"cells must be a multiple of 3, .* got 4"
    ):
        amoebanet_model.amoebanet(4, 16)


def test_refuses_filters_that_cannot_be_quartered_twice() -> None:
    with pytest.raises(
        ParameterError, match=r"filters must be a multiple of 16, .* 24"
    ):
        amoebanet_model.amoebanet(3, 24)
