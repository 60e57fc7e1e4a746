"""Models that executors have got wrong: right here, or refused with a sentence."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from models import Counts, against_reference, batch_of, close, grads, mlp, same
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from pipeproof.exec import (
    BatchError,
    ModelError,
    Pipeline,
    StepError,
    reference,
    split_evenly,
)
from pipeproof.sched import (
    POLICIES,
    B,
    F,
    ParameterError,
    Schedule,
    ScheduleError,
    UnsupportedError,
    catalog,
    recompute,
)

mse = functional.mse_loss


def schedule(stages: int = 2, micro_batches: int = 3, name: str = "1f1b") -> Schedule:
    return catalog.make(name, devices=stages, micro_batches=micro_batches)


def rows(count: int, width: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, count, width, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_batch_norm_counts_each_micro_batch_once(name: str, policy: str) -> None:
    """torchgpipe issue 14: statistics counted again by recomputation."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double() for _ in range(3)
    ]
    plan = recompute(schedule(3, 4, name), policy)

    against_reference(stages, plan, *rows(11))

    assert [int(stage[1].num_batches_tracked) for stage in stages] == [4, 4, 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_autocast_with_recomputation(policy: str) -> None:
    """Casts cached without a graph cut weights off: no gradient, no error."""
    stages = mlp(3, dtype=torch.float32)
    twin = copy.deepcopy(stages)
    x, y = (t.float() for t in rows(6))
    plan = recompute(schedule(3, 3, "gpipe"), policy)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        Pipeline(stages, plan, mse).step(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        reference(twin, plan, mse, x, y)

    assert all(grad is not None for grad in grads(stages))
    assert same(grads(stages), grads(twin))


class Pair(nn.Module):
    """One tensor to two: an activation, and something that wants no gradient."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.extra = extra

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        extra = {
            "ids": torch.arange(len(x)),
            "mask": x[:, 0] > 0,
            "constant": y.detach() * 2,
            "tensor": torch.tanh(y),
        }
        return y, extra[self.extra]


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, extra = pair
        weight = extra.to(x.dtype)
        return self.linear(x) * (weight if weight.dim() > 1 else weight[:, None])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extra", ["ids", "mask", "constant", "tensor"])
def test_tuples_of_any_type_cross_a_boundary(extra: str, policy: str) -> None:
    stages = [Pair(extra), Join()]

    against_reference(stages, recompute(schedule(), policy), *rows(7))


@pytest.mark.parametrize("policy", POLICIES)
def test_integer_inputs_and_an_embedding(policy: str) -> None:
    torch.manual_seed(0)
    stages = [nn.Embedding(9, 4).double(), nn.Linear(4, 9).double()]
    ids = torch.randint(9, (7,))

    against_reference(
        stages, recompute(schedule(), policy), ids, ids, functional.cross_entropy
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,)])
@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_stages(frozen: tuple[int, ...], policy: str) -> None:
    stages = mlp(3)
    for number in frozen:
        stages[number].requires_grad_(False)

    against_reference(stages, recompute(schedule(3), policy), *rows(7))

    for number, stage in enumerate(stages):
        for parameter in stage.parameters():
            assert (parameter.grad is None) == (number in frozen)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_parameter_that_wants_a_gradient_gets_one(policy: str) -> None:
    """Reentrant checkpoints lose all when the first input wants none (fault 23)."""
    stages = mlp(3)
    x, y = rows(6)

    Pipeline(stages, recompute(schedule(3), policy), mse).step(x, y)

    assert not x.requires_grad
    assert all(grad is not None for grad in grads(stages))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_the_inputs(policy: str) -> None:
    stages = mlp(2)
    twin = copy.deepcopy(stages)
    x, y = rows(7)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))

    Pipeline(stages, recompute(schedule(), policy), mse).step(ours * 2, y)
    mse(twin[1](twin[0](theirs * 2)), y).backward()

    assert close([ours.grad], [theirs.grad])


TIED = {"gpipe": 4, "1f1b": 4, "zb-h1": 4, "interleaved": 2, "zb-v": 2, "hanayo": 2}
"""Schedules and devices that make four stages."""


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_on_one_device(name: str) -> None:
    """In two, three and four stages, twice in one, and one module in two."""
    stages = [*mlp(2), nn.Sequential(*mlp(2)), *mlp(1)]
    stages[2][0][0].weight = stages[2][1][0].weight = stages[0][0].weight
    stages[3][0].weight = stages[0][0].weight
    stages[1][0].bias = stages[2][0][0].bias = stages[0][0].bias
    stages[3].append(stages[1])
    twin = copy.deepcopy(stages)
    x, y = rows(7)

    against_reference(stages, schedule(TIED[name], 4, name), x, y)

    mse(nn.Sequential(*twin)(x), y).backward()
    assert close(grads(stages), grads(twin))


def test_tied_weights_keep_what_was_there_before() -> None:
    stages = mlp(2)
    stages[1][0].weight = stages[0][0].weight
    pipeline = Pipeline(stages, schedule(), mse)
    pipeline.step(*rows(7))
    once = [grad.clone() for grad in grads(stages) if grad is not None]

    pipeline.step(*rows(7))

    assert close(grads(stages), [2 * grad for grad in once])


def test_views_identities_and_unused_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 8, dtype=torch.float64)
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).view(-1, 4, 2).transpose(1, 2)[:, 0]

    stages = [nn.Identity(), Odd(), nn.Identity(), *mlp(1)]

    against_reference(stages, schedule(4), *rows(7))

    assert stages[1].unused.grad is None


def test_hooks_fire_once_per_micro_batch_on_every_step() -> None:
    """Persistent receive buffers made them fire 5, 8, 12, 16 times (fault 24)."""
    stages = mlp(2)
    counts = {"forward": 0, "gradient": 0}
    stages[1][0].register_forward_hook(
        lambda *_: counts.update(forward=counts["forward"] + 1)
    )
    stages[1][0].weight.register_post_accumulate_grad_hook(
        lambda _: counts.update(gradient=counts["gradient"] + 1)
    )
    pipeline = Pipeline(stages, schedule(), mse)
    for step in range(1, 4):
        pipeline.step(*rows(7))
        assert counts == {"forward": 3 * step, "gradient": 3 * step}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_what_depends_on_earlier_forwards_is_recomputed_from_what_it_found(
    name: str, policy: str
) -> None:
    """Recomputed from later power iterations, weights differed from F's: a gradient
    off by 1e-7, and no error."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            spectral_norm(nn.Linear(4, 4, dtype=torch.float64)),
            nn.BatchNorm1d(4, dtype=torch.float64),
            Counts(),
        )
        for _ in range(2)
    ]

    against_reference(stages, recompute(schedule(2, 4, name), policy), *rows(11))


def test_a_sequential_with_hooks_of_its_own_is_called_whole() -> None:
    stages = mlp(2)
    called = []
    stages[0].register_forward_hook(lambda *_: called.append(True))

    Pipeline(stages, schedule(), mse).step(*rows(7))

    assert len(called) == 3


def test_an_input_changed_in_place_is_refused() -> None:
    """Under recomputation it would be silently wrong."""

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x.add_(1.0)

    stages = [mlp(1)[0], nn.Sequential(InPlace(), mlp(1)[0])]
    pipeline = Pipeline(stages, recompute(schedule(), "always"), mse)
    with pytest.raises(ModelError, match="stage 1 changes its input in place"):
        pipeline.step(*rows(6))


def test_a_model_that_raises_is_named_and_leaves_nothing_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fail and float(x.detach()[0, 0]) == float(bad):
                raise ValueError("bad row")
            return x

    stages = [nn.Sequential(*mlp(1)), nn.Sequential(Fails(), *mlp(1))]
    pipeline = Pipeline(stages, schedule(), mse)
    x, y = rows(6)
    bad = stages[0](x).detach()[4, 0]
    fail = True
    torch.manual_seed(4)
    with pytest.raises(
        StepError, match=r"at 1F2 \(stage 1, micro-batch 2, device"
    ) as e:
        pipeline.step(x, y)
    assert isinstance(e.value.__cause__, ValueError)
    assert "zero them before the next step" in str(e.value)
    state = torch.random.get_rng_state()
    torch.manual_seed(4)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(state, torch.random.get_rng_state())

    fail = False
    for stage in stages:
        stage.zero_grad()
    twin = copy.deepcopy(stages)
    torch.manual_seed(4)
    pipeline.step(x, y)
    torch.manual_seed(4)
    reference(twin, schedule(), mse, x, y)
    assert same(grads(stages), grads(twin))


def test_it_works_when_the_caller_turned_gradients_off() -> None:
    stages = mlp(2)
    with torch.no_grad():
        Pipeline(stages, schedule(), mse).step(*rows(6))
        assert not torch.is_grad_enabled()

    assert all(grad is not None for grad in grads(stages))


def test_inference_mode_is_refused() -> None:
    pipeline = Pipeline(mlp(2), schedule(), mse)
    with (
        torch.inference_mode(),
        pytest.raises(ParameterError, match=r"torch\.inference_mode forbids them"),
    ):
        pipeline.step(*rows(6))


def test_one_device_needs_no_list() -> None:
    stages = mlp(2)
    Pipeline(stages, schedule(), mse, devices="cpu").step(*rows(6))

    assert all(grad is not None for grad in grads(stages))


def test_batch_sizes_may_change_from_step_to_step() -> None:
    stages = mlp(2)
    pipeline = Pipeline(stages, schedule(), mse)
    for count in (6, 3, 11, 4):
        for stage in stages:
            stage.zero_grad()
        twin = copy.deepcopy(stages)
        x, y = rows(count)
        torch.manual_seed(0)
        pipeline.step(x, y)
        torch.manual_seed(0)
        reference(twin, schedule(), mse, x, y)
        assert same(grads(stages), grads(twin))


def test_nothing_lives_on_after_a_step() -> None:
    born: list[weakref.ref] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            born.append(weakref.ref(y.untyped_storage()))
            return y

    stages = [nn.Sequential(*mlp(1), Watched()), nn.Sequential(Watched(), *mlp(1))]
    pipeline = Pipeline(stages, recompute(schedule(), "except-last"), mse)
    pipeline.step(*rows(6))

    assert len(born) > 6
    assert not any(ref() for ref in born)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(5):
        pipeline.step(*rows(6))
        born.clear()
    gc.collect()
    assert len(gc.get_objects()) <= before + 5


def test_several_inputs_and_targets() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
            return self.linear(both[0]) + both[1]

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return mse(output, target[0]) + mse(output, target[1])

    torch.manual_seed(0)
    stages = [Add(), *mlp(1)]
    x, y = rows(7)

    against_reference(stages, schedule(), (x, y), (y, x), loss)


def test_split_evenly_puts_longer_stages_first() -> None:
    parts = split_evenly([nn.Identity() for _ in range(7)], 3)

    assert [len(part) for part in parts] == [3, 2, 2]


def two() -> list[nn.Module]:
    return mlp(2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Pipeline(mlp(3), schedule(4), mse),
            ModelError,
            r"runs 4 stages, found a model of 3: use a schedule of fewer stages",
        ),
        (
            lambda: Pipeline(mlp(3), schedule(2), mse),
            ModelError,
            r"runs 2 stages, found a model of 3: join some",
        ),
        (
            lambda: split_evenly(mlp(3), 4),
            ModelError,
            "a model of 3 layers cannot fill 4 stages",
        ),
        (
            lambda: Pipeline([nn.Sequential(), nn.Identity()], schedule(), mse),
            ModelError,
            "stage 0 is empty",
        ),
        (
            lambda: Pipeline([abs, nn.Identity()], schedule(), mse),
            ModelError,
            "stage 0 must be a module or a sequence of modules",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse, devices=["cpu"] * 3),
            ParameterError,
            "devices must name one device for all or 2",
        ),
        (
            lambda: Pipeline(two(), Schedule.of([[F(0, 0)], [B(1, 0)]]), mse),
            ScheduleError,
            "0B0 is missing",
        ),
        (
            lambda: Pipeline(
                [nn.Identity()],
                Schedule.of([[F(0, range(2)), B(0, range(2))]], steps=2),
                mse,
            ),
            UnsupportedError,
            "a schedule of several steps can be written and checked, but not lowered",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse).step(*rows(2)),
            BatchError,
            "inputs has 2 rows for 3 micro-batches",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse).step(rows(6)[0], rows(5)[0]),
            BatchError,
            "targets have 5 rows and inputs 6",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse).step(torch.ones(()), rows(5)[0]),
            BatchError,
            "inputs must be made of tensors with rows, got a scalar",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse).step([1, 2, 3], rows(5)[0]),
            BatchError,
            "inputs must hold a tensor, which is cut into rows, got list without",
        ),
        (
            lambda: Pipeline(two(), schedule(), mse).trace,
            ParameterError,
            "no step was recorded",
        ),
    ],
)
def test_bad_input_is_refused(build: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_batches_are_left_as_they_were() -> None:
    stages = mlp(2)
    x, y = batch_of(stages, 7, torch.float64)
    copies = x.clone(), y.clone()

    Pipeline(stages, schedule(), mse).step(x, y)

    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert x.grad is None
