"""Live activations: counted from outside, held against the prediction."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from convnets import ROWS, images, peak_of_a_convnet, residual_stages
from hypothesis import assume, given, settings
from models import Keeps, schedules
from pool import Do
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline, split_evenly
from pipeproof.exec.examples import Block
from pipeproof.exec.split import Splitter
from pipeproof.sched import CATALOG, POLICIES, Kind, Schedule, catalog, recompute
from pipeproof.sched.transforms import Policy, merge_backward
from pipeproof.sim import Cluster, Cost, simulate

SAVED = 1000
REST = [policy for policy in POLICIES if policy not in ("never", "always")]


def plain(schedule: Schedule) -> bool:
    """One pipe of whole micro-batches, and nothing sent away."""
    one_pipe = len(schedule.placement.pipes) == 1 and schedule.slices == 1
    return one_pipe and not schedule.has(Kind.OFFLOAD)


PLAIN = [n for n in CATALOG if plain(catalog.make(n, devices=4, micro_batches=8))]


class Widens(nn.Module):
    """A stage that keeps `entries` float64 numbers, all for its weight's gradient."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.weight = nn.Parameter(torch.ones(entries, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, self.entries).contiguous() @ self.weight


def measured_peaks(
    schedule: Schedule, stage: Callable[[int], nn.Module] = Keeps
) -> list[int]:
    """Peak number of micro-batches whose activations each stage keeps."""
    stages = [stage(SAVED) for _ in range(schedule.stages)]
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
    """Whether W needs all that a stage keeps, or nothing.

    An I that its W follows at once is run as a B, which frees all where the
    simulator's I frees a part: each such pair is one B here.
    """
    assume(schedule.stages == schedule.devices and plain(schedule))
    schedule = merge_backward(schedule)
    whole, nothing = Cost(), Cost(weight_grad_memory=0)

    kept = measured_peaks(schedule, Widens)
    assert kept == simulate(schedule, whole).peak_activations
    kept = measured_peaks(schedule, Keeps)
    assert kept == simulate(schedule, nothing).peak_activations


@settings(max_examples=30, deadline=None)
@given(schedule=schedules())
def test_running_a_pair_as_one_needs_no_more(schedule: Schedule) -> None:
    """What is predicted for I and W apart is an upper bound for B in their place."""
    assume(schedule.stages == schedule.devices and plain(schedule))
    predicted = simulate(schedule).peak_activations

    assert all(m <= p for m, p in zip(measured_peaks(schedule, Widens), predicted))


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


def alone(
    stage: nn.Sequential, leaf: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None
) -> tuple[int, int, Tensor]:
    """Of one micro-batch: bytes after F, beside the leaf; after I; and the output."""
    with ActivationMeter([stage]) as meter:
        meter.ignore(leaf)
        output = root = stage(leaf)
        if loss is not None:
            root = loss(output, leaf.detach())
        output = output.detach().clone()  # the graph may keep the original
        kept = meter.live
        inputs = [leaf] if leaf.requires_grad else []
        found = Splitter().input_grads([root], [torch.ones_like(root)], inputs)
        del root
        left = meter.live
        del found
    return kept, left, output


def measured_cost(
    stages: list[nn.Sequential], x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Cost:
    """The bytes of each stage, each measured alone with one micro-batch."""
    kept, left, boundary = [], [], []
    for number, stage in enumerate(stages):
        leaf = x.detach().clone().requires_grad_(number > 0)
        after_f, after_i, x = alone(stage, leaf, loss if stage is stages[-1] else None)
        kept.append(after_f)
        left.append(after_i)
        boundary.append(x.nbytes)
    inputs = [0, *boundary[:-1]]  # the first stage's is the batch
    return Cost(
        activation_bytes=[k + i for k, i in zip(kept, inputs)],
        weight_grad_memory=[Fraction(w, k) for w, k in zip(left, kept)],
        input_bytes=inputs,
        boundary_bytes=boundary,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", PLAIN)
def test_bytes_of_a_transformer_are_the_predicted_ones(name: str, policy: str) -> None:
    """Activations, what I leaves of them, stage inputs and stored inputs.

    Over all stages together. Gradients that wait for W are not activations, and
    neither side counts them.
    """
    torch.manual_seed(0)
    layers = [Block(64, 4, dropout=0.0).double() for _ in range(6)]
    schedule = recompute(catalog.make(name, devices=3, micro_batches=6), policy)
    schedule = merge_backward(schedule)  # as it is run
    stages = split_evenly(layers, schedule.stages)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    x = torch.randn(12, 96, 64, dtype=torch.float64)
    cost = measured_cost(stages, x[:2], lambda y, leaf: functional.mse_loss(y, leaf))

    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        pipeline.step(x, x)

    trace = simulate(pipeline.program, cost, Cluster(shared_processor=True))
    by_class = trace.memory().by_class
    counted = sum(by_class[c] for c in ("activations", "weight_grad_stash"))
    assert meter.peak == max((counted + by_class["stored_inputs"]).tolist())


@pytest.mark.parametrize(
    "policy",
    ["never", "always", *(pytest.param(p, marks=pytest.mark.slow) for p in REST)],
)
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"])
def test_bytes_of_a_convnet_on_ranks_are_the_predicted_ones(
    name: str, policy: Policy, do: Do
) -> None:
    """Of each rank, within 2 %.

    In one process a block's output, which its ReLU keeps, would be the next stage's
    input as well, and count once; so it is at the turn of a V. And what batch norm
    keeps in R has the copies of its statistics that R runs on, beside it.
    """
    schedule = recompute(catalog.make(name, devices=2, micro_batches=4), policy)
    schedule = merge_backward(schedule)  # as it is run
    x, labels = images(ROWS)
    cost = measured_cost(
        residual_stages(schedule.stages),
        x,
        lambda output, _: functional.cross_entropy(output, labels),
    )

    found = do(peak_of_a_convnet, schedule, 2)

    trace = simulate(schedule, cost)
    for device, peak in enumerate(found):
        kept = trace.memory(device).by_class
        counted = kept["activations"] + kept["weight_grad_stash"]
        predicted = max((counted + kept["stored_inputs"]).tolist())
        assert 0.98 * predicted <= peak <= 1.02 * predicted
        if policy == "never" and name != "zb-v":
            assert 0.999 * predicted <= peak <= predicted


def test_w_keeps_less_of_a_transformer_than_b() -> None:
    """Of 16 tensors, W needs a norm's output, attention's, another norm's, gelu's."""
    stage = nn.Sequential(Block(64, 4, dropout=0.0).double())
    leaf = torch.randn(2, 96, 64, dtype=torch.float64, requires_grad=True)
    kept, left, output = alone(stage, leaf, None)

    assert left // output.nbytes == 1 + 1 + 1 + 4
    assert kept // output.nbytes == 15
