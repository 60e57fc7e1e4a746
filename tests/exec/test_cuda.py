"""The same on a GPU: gradients, the allocator's peak, the trace by events.

What one device does, the host does too: so what is wrong with these tests themselves
shows where there is no GPU, and is slow there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from jobs import on_gpus
from live_bytes import LiveBytes
from models import EXECUTED, Keeps, grads, mlp, same, small
from torch.nn import functional

from pipeproof.exec import EXAMPLES, Pipeline, launch, reference
from pipeproof.sched import POLICIES, Kind, Schedule, catalog, lower, recompute
from pipeproof.sched.transforms import merge_backward
from pipeproof.sim import Cluster, Cost, simulate

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Attempting to run cuBLAS",  # the first product of a thread of autograd's
        "Synchronization debug mode is a prototype",
        "The AccumulateGrad node's stream does not match",
    )
]

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def planned(name: str, policy: str) -> Schedule:
    """A row with recomputation, if it can have both that and its copies."""
    schedule = small(name)
    if schedule.has(Kind.OFFLOAD) and policy != "never":
        pytest.skip("it is offloaded or recomputed")
    return recompute(schedule, policy)


@contextmanager
def peaking(device: str) -> Iterator[SimpleNamespace]:
    """The most bytes that there are at once, beyond those that there were."""
    found = SimpleNamespace(peak=0)
    if device == "cpu":
        with LiveBytes() as meter:
            yield found
        found.peak = meter.peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found.peak = torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXECUTED)
def test_gradients_are_the_reference_bit_by_bit(
    name: str, policy: str, device: str
) -> None:
    schedule = planned(name, policy)
    example = EXAMPLES["gpt"](stages=schedule.stages, batch=8, dtype=torch.float64)
    stages = [stage.to(device) for stage in example.stages]
    twin = copy.deepcopy(stages)
    inputs, targets = example.inputs.to(device), example.targets.to(device)

    torch.manual_seed(0)
    loss = Pipeline(stages, schedule, example.loss_fn, device).step(inputs, targets)
    torch.manual_seed(0)
    expected = reference(twin, schedule, example.loss_fn, inputs, targets)

    assert torch.equal(loss, expected)
    assert same(grads(stages), grads(twin))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXECUTED)
def test_memory_peaks_where_predicted(name: str, policy: str, device: str) -> None:
    """An I with its W behind it runs as a B."""
    size = 1 << 22
    schedule = merge_backward(planned(name, policy))
    if schedule.has(Kind.OFFLOAD):
        pytest.skip("the host's memory is no other than the device's here")
    if any(len(instruction.ops) > 1 for instruction in lower(schedule)):
        pytest.skip("ops of a group run one by one, and are predicted as one")
    stages = [Keeps(size // 8) for _ in range(schedule.stages)]
    pipeline = Pipeline(stages, schedule, lambda y, _: y.sum(), device)
    x = torch.zeros(8, schedule.slices, dtype=torch.float64, device=device)
    pipeline.step(x, x)

    with peaking(device) as found:
        pipeline.step(x, x)

    of_stages = [size * schedule.slices] * schedule.stages
    cost = Cost(activation_bytes=of_stages, weight_grad_memory=0)
    shared = Cluster(shared_processor=True)
    predicted = simulate(pipeline.program, cost, shared).memory().peak
    assert abs(found.peak - predicted) < size / 4


@pytest.mark.parametrize("policy", POLICIES)
def test_stages_on_the_host_and_on_the_device(policy: str, device: str) -> None:
    """A copy to the host that is not waited for reads garbage (fault 50)."""
    schedule = recompute(catalog.make("1f1b", devices=3, micro_batches=4), policy)
    stages = mlp(3, 512)
    twin = copy.deepcopy(stages)
    x = torch.randn(64, 512, dtype=torch.float64)
    pipeline = Pipeline(
        stages, schedule, functional.mse_loss, devices=[device, "cpu", device]
    )

    pipeline.step(x, x)
    reference(twin, schedule, functional.mse_loss, x, x)

    for ours, theirs in zip(grads(stages), grads(twin), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("away", ["cpu", "cuda"])
@pytest.mark.gpu
@no_gpu
def test_what_a_device_keeps_in_the_other_s_memory(away: str) -> None:
    """bpipe's device 0 keeps some of its activations in the memory of device 3."""
    schedule = catalog.make("bpipe", devices=4, micro_batches=8)
    stages = mlp(4, 512)
    twin = copy.deepcopy(stages)
    x = torch.randn(64, 512, dtype=torch.float64)
    devices = ["cuda", "cpu", "cuda", away]
    pipeline = Pipeline(stages, schedule, functional.mse_loss, devices=devices)

    pipeline.step(x, x)
    reference(twin, schedule, functional.mse_loss, x, x)

    for ours, theirs in zip(grads(stages), grads(twin), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-14)


def test_copies_to_the_host_and_back(device: str) -> None:
    """Much of it, and in steps that follow each other: no copy is read too early."""
    schedule = catalog.make("pipeoffload", devices=2, micro_batches=8)
    stages = [stage.to(device) for stage in mlp(schedule.stages, 256)]
    twin = copy.deepcopy(stages)
    x = torch.randn(8 * 512, 256, dtype=torch.float64, device=device)
    pipeline = Pipeline(stages, schedule, functional.mse_loss, device)

    for _ in range(3):
        pipeline.step(x, x)
        reference(twin, schedule, functional.mse_loss, x, x)

    assert same(grads(stages), grads(twin))


@pytest.mark.gpu
@no_gpu
def test_a_step_waits_for_nothing() -> None:
    """Not for the device: whatever would is refused meanwhile."""
    for name in ("1f1b", "zb-h1", "pipeoffload"):
        schedule = catalog.make(name, devices=2, micro_batches=4)
        stages = [stage.cuda() for stage in mlp(schedule.stages, 64)]
        x = torch.randn(8, 64, dtype=torch.float64, device="cuda")
        pipeline = Pipeline(stages, schedule, functional.mse_loss, "cuda")
        pipeline.step(x, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            pipeline.step(x, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@no_gpu
def test_a_step_on_a_stream_of_the_user_s() -> None:
    schedule = catalog.make("zb-h1", devices=2, micro_batches=4)
    stages = [stage.cuda() for stage in mlp(2, 512)]
    twin = copy.deepcopy(stages)
    x = torch.randn(512, 512, dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    with torch.cuda.stream(stream):
        Pipeline(stages, schedule, functional.mse_loss, "cuda").step(x, x)
    torch.cuda.current_stream().wait_stream(stream)
    reference(twin, schedule, functional.mse_loss, x, x)

    assert same(grads(stages), grads(twin))


def test_the_trace_has_times_of_the_device(device: str) -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    pipeline = Pipeline(mlp(2, 256), schedule, functional.mse_loss, device)
    x = torch.ones(64, 256, dtype=torch.float64, device=device)
    pipeline.step(x, x)
    pipeline.step(x, x, record=True)

    trace = pipeline.trace
    assert (trace.start <= trace.end).all()
    assert all(busy > 0 for busy in trace.busy)


def test_masks_do_not_depend_on_the_schedule(device: str) -> None:
    losses = []
    for name, policy in (("gpipe", "never"), ("1f1b", "always")):
        example = EXAMPLES["gpt"](stages=2, batch=4)
        schedule = recompute(catalog.make(name, devices=2, micro_batches=4), policy)
        pipeline = Pipeline(example.stages, schedule, example.loss_fn, device)
        torch.manual_seed(0)
        losses.append(pipeline.step(example.inputs, example.targets))

    assert torch.equal(*losses)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved", "chimera", "bpipe"])
def test_ranks_with_nccl_equal_one_process(name: str) -> None:
    expected = on_gpus(None, name, 1)

    for found in launch(on_gpus, 2, name, 1):
        for stage, digest in found.items():
            assert digest == expected[stage], f"stage {stage}"


@pytest.mark.gpu
@two_gpus
def test_replicas_with_nccl_end_alike() -> None:
    one, other = launch(on_gpus, 2, "gpipe", 2)

    assert one == other
