"""The same on a GPU: gradients, the allocator's peak, the trace by events."""

from __future__ import annotations

import copy

import pytest
import torch
from jobs import on_gpus
from models import EXECUTED, Keeps, grads, mlp, same
from torch.nn import functional

from pipeproof.exec import EXAMPLES, Pipeline, launch, reference
from pipeproof.sched import POLICIES, catalog, recompute
from pipeproof.sim import Cluster, Cost, simulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXECUTED)
def test_gradients_are_the_reference_bit_by_bit(name: str, policy: str) -> None:
    schedule = recompute(catalog.make(name, devices=3, micro_batches=4), policy)
    example = EXAMPLES["gpt"](stages=schedule.stages, batch=6, dtype=torch.float64)
    stages = [stage.cuda() for stage in example.stages]
    twin = copy.deepcopy(stages)
    inputs, targets = example.inputs.cuda(), example.targets.cuda()

    torch.manual_seed(0)
    loss = Pipeline(stages, schedule, example.loss_fn, devices=["cuda"]).step(
        inputs, targets
    )
    torch.manual_seed(0)
    expected = reference(twin, schedule, example.loss_fn, inputs, targets)

    assert torch.equal(loss, expected)
    assert same(grads(stages), grads(twin))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXECUTED)
def test_the_allocator_peaks_where_predicted(name: str, policy: str) -> None:
    size = 1 << 22
    schedule = recompute(catalog.make(name, devices=4, micro_batches=8), policy)
    stages = [Keeps(size // 8) for _ in range(schedule.stages)]
    pipeline = Pipeline(stages, schedule, lambda y, _: y.sum(), devices=["cuda"])
    x = torch.zeros(8, 1, dtype=torch.float64, device="cuda")
    pipeline.step(x, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    pipeline.step(x, x)

    peak = torch.cuda.max_memory_allocated() - before
    cost, shared = Cost(activation_bytes=size), Cluster(shared_processor=True)
    predicted = simulate(pipeline.program, cost, shared).memory().peak
    assert abs(peak - predicted) < size / 4


@pytest.mark.parametrize("policy", POLICIES)
def test_stages_on_the_host_and_on_the_gpu(policy: str) -> None:
    """A copy to the host that is not waited for reads garbage (fault 50)."""
    schedule = recompute(catalog.make("1f1b", devices=3, micro_batches=4), policy)
    stages = mlp(3, 512)
    twin = copy.deepcopy(stages)
    x = torch.randn(64, 512, dtype=torch.float64)
    pipeline = Pipeline(
        stages, schedule, functional.mse_loss, devices=["cuda", "cpu", "cuda"]
    )

    pipeline.step(x, x)
    reference(twin, schedule, functional.mse_loss, x, x)

    for ours, theirs in zip(grads(stages), grads(twin), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-14)


def test_the_trace_comes_from_events_on_the_stream() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    pipeline = Pipeline(mlp(2, 256), schedule, functional.mse_loss, devices=["cuda"])
    x = torch.ones(64, 256, dtype=torch.float64, device="cuda")
    pipeline.step(x, x)
    pipeline.step(x, x, record=True)

    trace = pipeline.trace
    assert (trace.start <= trace.end).all()
    assert all(busy > 0 for busy in trace.busy)


def test_masks_do_not_depend_on_the_schedule() -> None:
    losses = []
    for name, policy in (("gpipe", "never"), ("1f1b", "always")):
        example = EXAMPLES["gpt"](stages=2, batch=4)
        schedule = recompute(catalog.make(name, devices=2, micro_batches=4), policy)
        pipeline = Pipeline(example.stages, schedule, example.loss_fn, devices=["cuda"])
        torch.manual_seed(0)
        losses.append(pipeline.step(example.inputs, example.targets))

    assert torch.equal(*losses)


two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


@two_gpus
@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved", "chimera", "bpipe"])
def test_ranks_with_nccl_equal_one_process(name: str) -> None:
    expected = on_gpus(None, name, 1)

    for found in launch(on_gpus, 2, name, 1):
        for stage, digest in found.items():
            assert digest == expected[stage], f"stage {stage}"


@two_gpus
def test_replicas_with_nccl_end_alike() -> None:
    one, other = launch(on_gpus, 2, "gpipe", 2)

    assert one == other
