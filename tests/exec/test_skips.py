"""Skip connections: straight to the stages that use them, and the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from evaluating import Evaluated, evaluated
from jobs import WIDTH, Job, alone, part, same_values
from models import grads, same, small
from pool import Do
from skipping import Gives, Takes, sent, skipping
from test_ranks import assert_equal, unpipelined
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.cli.profiling import bytes_of
from pipeproof.exec import (
    ActivationMeter,
    Pipeline,
    profile,
    profile_layers,
    reference,
    split_at,
)
from pipeproof.sched import (
    CATALOG,
    POLICIES,
    Kind,
    Schedule,
    catalog,
    lower,
    partition,
    recompute,
)
from pipeproof.sim import Cluster, Cost, simulate

pytestmark = pytest.mark.usefixtures("one_thread")


def model(schedule: Schedule) -> list[nn.Module]:
    torch.manual_seed(3)
    return [skipping(n).double() for n in range(schedule.stages)]


def batch(schedule: Schedule) -> tuple[Tensor, Tensor]:
    positions = (3 * schedule.slices,) if schedule.slices > 1 else ()
    rows = 2 * schedule.micro_batches + 1
    inputs, targets = torch.randn(2, rows, *positions, WIDTH, dtype=torch.float64)
    return inputs, targets


def steps(run: Any, *data: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    return run(*data, **options)


def equals_the_reference(schedule: Schedule) -> None:
    stages = model(schedule)
    others, data = copy.deepcopy(stages), batch(schedule)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)

    loss = steps(pipeline.step, *data)
    expected = steps(reference, others, schedule, functional.mse_loss, *data)

    far = tuple((0, target) for target in range(3, schedule.stages))
    assert pipeline.schedule.skips == far
    assert torch.equal(loss, expected)
    assert same(grads(stages), grads(others))


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_equals_the_reference(name: str) -> None:
    equals_the_reference(small(name))


@pytest.mark.parametrize("name", ["gpipe", "zb-h1", "zb-v"])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_recomputation_equals_the_reference(name: str, policy: Any) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=6)

    equals_the_reference(recompute(schedule, policy))


def test_offloaded_skips_come_back() -> None:
    text = catalog.make("gpipe", devices=4, micro_batches=2).format()
    for m in range(2):
        text = text.replace(f"3F{m}", f"3F{m} 3OFFLOAD{m} 3RELOAD{m}")

    equals_the_reference(Schedule.parse(text))


def test_it_does_not_matter_where_the_model_is_cut() -> None:
    """Within a stage, to the next one, and further on: one gradient."""
    torch.manual_seed(0)
    layers = [Gives(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), Takes()]
    layers += [nn.Linear(WIDTH, WIDTH)]
    found = []
    for sizes in ([5], [2, 3], [1, 2, 2], [1, 1, 1, 1, 1]):
        own = copy.deepcopy(layers)
        schedule = catalog.make("gpipe", devices=len(sizes), micro_batches=3)
        pipeline = Pipeline(split_at(own, sizes), schedule, functional.mse_loss)
        torch.manual_seed(1)
        steps(pipeline.step, *torch.randn(2, 7, WIDTH))
        found.append(grads(own))

    assert all(same(found[0], other) for other in found[1:])


def test_every_row_of_a_few_on_ranks(do: Do) -> None:
    for name in ("1f1b", "zb-v", "interleaved", "seq1f1b"):
        job = Job(name, 4, 8, stage=skipping, own_only=True)
        results = do(part, job)

        assert_equal(results, alone(job))
        assert_equal(results, unpipelined(job))


def test_grouped_messages_and_recomputation_on_ranks(do: Do) -> None:
    job = Job("1f1b", 4, 8, "always", stage=skipping, messages="grouped")

    assert_equal(do(part, job), alone(job))


def test_evaluation_on_ranks(do: Do) -> None:
    job = Job("1f1b", 4, 4, stage=skipping)
    expected = evaluated(False, job)

    assert do(evaluated, job)[3] == expected
    assert isinstance(expected, Evaluated)


def test_what_is_simulated_is_what_is_sent(do: Do) -> None:
    """Every message, by name, and every byte."""
    job = Job("1f1b", 4, 4, stage=skipping, shapes=((8,),))
    tensor = 2 * WIDTH * 8  # of a micro-batch
    schedule = job.schedule.with_skips([(0, 3)])
    program = lower(schedule)
    # The second stage takes what the first one made beside its input.
    boundary = [2 * tensor, tensor, tensor, 0]
    cost = Cost(activation_bytes=10**6, boundary_bytes=boundary, skip_bytes=tensor)
    sizes = cost.sizes(program).known_bytes()
    predicted = [
        (str(message), int(sizes[program.reads[message.send][0]]))
        for message in map(program.message_at, range(len(program.messages)))
    ]

    found = [pair for of_rank in do(sent, job) for pair in of_rank]

    assert sorted(found) == sorted(predicted)
    assert sum("0→3" in name for name, _ in found) == 4


class Keeps(nn.Module):
    """Keeps a tensor of its own for its backward; its output is another."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * 1


class KeepsAndGives(Keeps):
    """What it gives is a tensor of its own, and nothing that it keeps."""

    gives_skips = ("first",)

    def forward(self, x: Tensor) -> Any:
        y = x.exp()
        return y * 1, {"first": y * 2}


class Multiplies(nn.Module):
    """Keeps both of its inputs."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return x * first


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bytes_are_the_predicted_ones(name: str, policy: Any) -> None:
    """Over all stages together; and those between keep what they kept without."""
    schedule = catalog.make(name, devices=4, micro_batches=4)
    schedule = recompute(schedule, policy)
    stages = [KeepsAndGives(), Keeps(), Keeps(), Multiplies()]
    x = torch.randn(8, 1000, dtype=torch.float64, requires_grad=True)
    pipeline = Pipeline(stages, schedule, lambda y, _: y.sum())
    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        pipeline.step(x, x.detach())
    tensor = 2 * 1000 * 8
    # Beside its input, each keeps exp's output, but for the last, which keeps what
    # it is given; the first one's input is the batch.
    cost = Cost(
        activation_bytes=[tensor, 2 * tensor, 2 * tensor, 2 * tensor],
        input_bytes=[0, tensor, tensor, tensor],
        boundary_bytes=tensor,
        skip_bytes=tensor,
    )
    trace = simulate(pipeline.program, cost, Cluster(shared_processor=True))
    of = trace.memory().by_class

    assert meter.peak == max((of["activations"] + of["stored_inputs"]).tolist())
    between = simulate(schedule).peak_activations[1:3]
    assert meter.peak_of[1:3] == [peak * tensor for peak in between]


def test_a_profile_weighs_what_goes_over_a_skip() -> None:
    """Where it arrives it is part of what is kept; beside the input, to the next."""
    schedule = catalog.make("1f1b", devices=4, micro_batches=2)
    x = torch.randn(4, 1000, dtype=torch.float64, requires_grad=True)
    tensor = 2 * 1000 * 8
    for stages, skips, inputs in (
        ([KeepsAndGives(), Keeps(), Keeps(), Multiplies()], ((3, tensor),), tensor),
        ([Keeps(), Keeps(), KeepsAndGives(), Multiplies()], (), 2 * tensor),
    ):
        found = profile(stages, schedule, lambda y, _: y.sum(), x, x, rounds=1)

        assert [stage.skips for stage in found.stages if stage.skips] == [skips][
            : len(skips)
        ]
        last, second = found.stages[3], found.stages[1]
        assert (last.input, last.activations) == (inputs, 2 * tensor)
        assert (second.input, second.output) == (tensor, tensor)
        assert second.activations == 2 * tensor
    cost = bytes_of(found.stages)
    assert cost["boundary_bytes"] == [tensor, tensor, 2 * tensor, 0]


def test_autocast_frozen_stages_and_what_is_no_tensor() -> None:
    schedule = catalog.make("1f1b", devices=4, micro_batches=4)
    stages = [skipping(n) for n in range(4)]
    stages[0].requires_grad_(False)
    others = copy.deepcopy(stages)
    x = torch.randn(8, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(Pipeline(stages, schedule, same_values).step, x, x)
        steps(reference, others, schedule, same_values, x, x)

    assert same(grads(stages), grads(others))
    assert all(p.grad is None for p in stages[0].parameters())
    assert all(p.grad is not None for p in stages[3].parameters())


def test_predictions_are_the_models() -> None:
    schedule = catalog.make("gpipe", devices=4, micro_batches=2)
    stages = [nn.Sequential(Gives()), *(nn.Sequential(nn.Tanh()) for _ in range(2))]
    stages.append(nn.Sequential(Takes()))
    x = torch.randn(4, WIDTH)
    y, given = stages[0][0](x)
    expected = stages[3][0](y.tanh().tanh(), **given)

    found = Pipeline(stages, schedule, same_values).predict(x)

    assert torch.allclose(found, expected.detach())


def test_a_schedule_that_says_the_same_is_taken() -> None:
    schedule = catalog.make("gpipe", devices=4, micro_batches=2)
    stages = model(schedule)
    pipeline = Pipeline(stages, schedule.with_skips([(0, 3)]), functional.mse_loss)

    assert pipeline.schedule.skips == ((0, 3),)
    assert not pipeline.schedule.has(Kind.R)


def test_layers_with_skips_are_measured_and_cut() -> None:
    """The product keeps both of its factors: its input, and the skip."""
    layers = [KeepsAndGives(), Keeps(), Keeps(), Multiplies()]
    x = torch.randn(2, 1000, dtype=torch.float64, requires_grad=True)

    found = profile_layers(layers, x, repeats=1)

    assert [layer.input for layer in found] == [x.nbytes] * 4
    assert [layer.activations for layer in found] == [*[x.nbytes] * 3, 2 * x.nbytes]
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    assert sum(partition(found, schedule).sizes) == 4
