"""An R of some units of a stage: nothing but memory and time tells the difference."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from held import MODELS, Held, peak_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jobs import Job, part
from models import (
    DTYPES,
    EXECUTED,
    Counts,
    against_reference,
    as_said,
    batch_of,
    grads,
    mlp,
    models,
    same,
    schedules,
    small,
)
from pool import Do
from test_ranks import assert_equal, unpipelined
from test_skips import Gives, Takes
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from pipeproof.cli.profiling import peaks_of
from pipeproof.exec import (
    ActivationMeter,
    ModelError,
    Pipeline,
    profile_layers,
    split_evenly,
)
from pipeproof.exec.examples import Block
from pipeproof.sched import (
    POLICIES,
    Kind,
    ParameterError,
    Schedule,
    catalog,
    fit_selective,
    merge_backward,
    recompute,
)
from pipeproof.sched.fit_recompute import selective_loads
from pipeproof.sim import cost_of_layers, simulate

mse = functional.mse_loss


def schedule(
    name: str = "1f1b", policy: str = "always", stages: int = 2, micro_batches: int = 4
) -> Schedule:
    return recompute(
        catalog.make(name, devices=stages, micro_batches=micro_batches), policy
    )


def rows(count: int, width: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    inputs, targets = torch.randn(2, count, width, dtype=torch.float64)
    return inputs, targets


@settings(max_examples=40, deadline=None)
@given(data=st.data(), plan=schedules(), dtype=st.sampled_from(DTYPES))
def test_any_layers_of_any_schedule_give_the_gradients_of_the_reference(
    data: st.DataObject, plan: Schedule, dtype: torch.dtype
) -> None:
    assume(plan.has(Kind.R))
    stages = data.draw(models(plan.stages, dtype, sequence=plan.slices > 1))
    stages = as_said(stages, plan)
    again = {op.stage for op in plan.ops if op.kind == Kind.R}
    chosen = [
        data.draw(st.sets(st.integers(0, len(stage) - 1))) if number in again else ()
        for number, stage in enumerate(stages)
    ]
    positions = 5 if plan.slices > 1 else 0
    batch = batch_of(stages, 2 * plan.micro_batches + 1, dtype, positions)

    against_reference(stages, plan, *batch, recomputed=chosen)


@pytest.mark.parametrize("name", [n for n in EXECUTED if n != "pipeoffload"])
def test_every_row_with_layers_chosen_by_what_they_are(name: str) -> None:
    plan = recompute(small(name), "always")
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh()
        ).double()
        for _ in range(plan.stages)
    ]
    batch = batch_of(stages, plan.micro_batches + 3, torch.float64, 5)

    against_reference(
        stages, plan, *batch, recomputed=lambda m: isinstance(m, (nn.GELU, nn.Dropout))
    )


class Counted(nn.Module):
    """Counts its forwards; not in an attribute, which is as if none ran again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.runs: list[None] = []

    @property
    def ran(self) -> int:
        return len(self.runs)

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(None)
        return self.inner(x)


class Named(nn.Sequential):
    """A sequence with a name of its own."""


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v"])
def test_a_layer_runs_again_once_for_each_micro_batch_split_backward_or_not(
    name: str,
) -> None:
    """torch.distributed.pipelining runs checkpointed layers three to six times."""
    plan = schedule(name)
    torch.manual_seed(0)
    stages = [
        nn.Sequential(*(Counted(Block(8, 2, dropout=0.2)) for _ in range(3))).double()
        for _ in range(plan.stages)
    ]
    x = torch.randn(8, 5, 8, dtype=torch.float64)

    against_reference(stages, plan, x, x, recomputed=[{0, 2}] * plan.stages)

    for stage in stages:
        assert [layer.ran for layer in stage] == [8, 4, 8]


@pytest.mark.parametrize("policy", ["except-last", "adaptive"])
def test_the_schedule_says_which_micro_batches(policy: str) -> None:
    plan = schedule("gpipe", policy)
    stages = [nn.Sequential(Counted(mlp(1)[0]), mlp(1)[0]) for _ in range(2)]

    against_reference(stages, plan, *rows(9), recomputed=[{0}, {0}])

    assert [stage[0].ran for stage in stages] == [4 + 3, 4 + 3]


def test_only_what_was_not_chosen_is_kept() -> None:
    """Of four micro-batches what the other layers keep, and of one the rest."""
    plan = schedule("gpipe", stages=1)
    wide = nn.Sequential(*(nn.Tanh() for _ in range(5)))
    x = torch.zeros(4, 1000, dtype=torch.float64)

    def peak(recomputed: Any) -> float:
        stages = [nn.Sequential(nn.Linear(1000, 1000, dtype=torch.float64), *wide)]
        pipeline = Pipeline(stages, plan, lambda y, _: y.sum(), recomputed=recomputed)
        with ActivationMeter(stages) as meter:
            meter.ignore(x)
            pipeline.step(x, x)
        assert meter.live == 0
        return meter.peak / 8000

    assert peak([range(6)]) == peak(None) == 5
    assert peak([()]) == 4 * 5
    assert peak([{2, 3}]) == 4 * 3 + 2
    # And the input of the first, which nobody else keeps.
    assert peak([{1, 2, 3, 4, 5}]) == 4 + 5


@pytest.mark.parametrize("places", [{0, 1}, {1, 2, 3}, {2, 4}])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_buffers_randomness_and_keys_are_as_without(
    name: str, places: set[int]
) -> None:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            spectral_norm(nn.Linear(4, 4, dtype=torch.float64)),
            nn.BatchNorm1d(4, dtype=torch.float64),
            nn.Dropout(0.4),
            Counts(),
            nn.Linear(4, 4, dtype=torch.float64),
        )
        for _ in range(2)
    ]
    keys = [list(stage.state_dict()) for stage in stages]
    modules = [list(map(id, stage.modules())) for stage in stages]

    against_reference(stages, schedule(name), *rows(11), recomputed=[places] * 2)

    assert [list(stage.state_dict()) for stage in stages] == keys
    assert [list(map(id, stage.modules())) for stage in stages] == modules


@pytest.mark.parametrize("places", [{0}, {2}, {0, 2}, {0, 1}])
def test_what_one_use_left_in_a_buffer_the_next_finds(places: set[int]) -> None:
    """A module in two places: its second forward starts from what the first left."""
    torch.manual_seed(0)
    norm = spectral_norm(nn.Linear(4, 4, dtype=torch.float64))
    stages = [nn.Sequential(norm, nn.Tanh(), norm)]

    against_reference(stages, schedule(stages=1), *rows(9), recomputed=[places])


def test_tied_weights_are_added_up_in_the_same_order() -> None:
    torch.manual_seed(1)
    first, second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
    second.weight = first.weight
    stages = [nn.Sequential(first, nn.Tanh(), second), nn.Sequential(nn.Tanh(), first)]

    for name in ("gpipe", "zb-h1"):
        against_reference(
            copy.deepcopy(stages), schedule(name), *rows(9), recomputed=[{0}, {0}]
        )


def test_skips_within_and_between_stages() -> None:
    torch.manual_seed(0)
    plan = schedule("1f1b", stages=3)
    for chosen in ([{0}, {0}, {0}], [{1}, {1}, {0, 1}], [{0, 1}, (), {1}]):
        stages = [
            nn.Sequential(Gives(), nn.Linear(4, 4)).double(),
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)).double(),
            nn.Sequential(nn.Tanh(), Takes()).double(),
        ]
        batch = batch_of([stages[1]], 9, torch.float64)
        against_reference(stages, plan, *batch, recomputed=chosen)


def test_autocast() -> None:
    stages = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in "ab"]
    twin = copy.deepcopy(stages)
    x = torch.randn(8, 8)
    for mine, recomputed in ((stages, [{0, 1}, {1, 2}]), (twin, [(), ()])):
        pipeline = Pipeline(mine, schedule(), mse, recomputed=recomputed)
        with torch.autocast("cpu", torch.bfloat16):
            pipeline.step(x, x)

    assert same(grads(stages), grads(twin))


def test_evaluation_runs_each_layer_once() -> None:
    stages = [nn.Sequential(Counted(mlp(1)[0]), mlp(1)[0]) for _ in range(2)]
    pipeline = Pipeline(stages, schedule(), mse, recomputed=[{0}, {0}])
    x, y = rows(8)

    pipeline.evaluate(x, y)
    pipeline.predict(x)

    assert [stage[0].ran for stage in stages] == [8, 8]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["1f1b", "zb-v", "terapipe"])
def test_ranks(name: str, do: Do) -> None:
    job = Job(name, 2, 4, policy="always", recomputed=(1, 2))

    assert_equal(do(part, job, 2), unpipelined(job))


@pytest.mark.parametrize(
    "recomputed", [lambda module: isinstance(module, Named), [{1}]]
)
def test_a_sequence_is_chosen_whole(recomputed: Any) -> None:
    inner = Named(Counted(nn.Tanh()), nn.Linear(4, 4, dtype=torch.float64))
    stages = [nn.Sequential(mlp(1)[0], inner, Counted(nn.Tanh()))]

    against_reference(stages, schedule(stages=1), *rows(8), recomputed=recomputed)

    assert (inner[0].ran, stages[0][2].ran) == (8, 4)


def test_a_module_that_a_sequence_calls_twice_is_two_units() -> None:
    """Taken apart, a Sequential lost its second call: `children()` has each once."""
    layer = mlp(1)[0]
    twice, x, y = nn.Sequential(layer, nn.Tanh(), layer), *rows(8)
    expected = mse(twice(x), y)

    loss = Pipeline([twice], schedule(stages=1), mse).step(x, y)

    assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"])
@pytest.mark.parametrize("model", MODELS)
def test_peak_bytes_of_chosen_layers_are_the_predicted_ones(
    model: str, name: str, do: Do
) -> None:
    """From a profile of the layers one by one, within 2 %, on each of two ranks."""
    layers, batch, loss = MODELS[model]
    inputs, targets = batch(1)
    profile = profile_layers(layers(), inputs, loss_fn=loss, targets=targets, repeats=1)
    # One choice, whatever the clock said.
    profile = [replace(one, forward=1, backward=2) for one in profile]
    bare = catalog.make(name, devices=2, micro_batches=4)
    sizes = [len(stage) for stage in split_evenly(layers(), bare.stages)]
    every = [tuple(range(size)) for size in sizes]
    least, most = (
        selective_loads(profile, recompute(bare, policy), sizes, every)[1]
        for policy in ("always", "never")
    )
    memory = [(low + high) / 2 for low, high in zip(least, most)]
    found = fit_selective(bare, profile, sizes, memory)
    assert any(0 < len(of) < size for of, size in zip(found.layers, sizes))
    plan = Held(model, found.schedule, tuple(sizes), found.layers)

    measured = do(peak_of, plan, 2)

    cost = cost_of_layers(profile, sizes, found.layers)
    trace = simulate(merge_backward(found.schedule), cost)
    predicted = peaks_of(trace, shared=False)
    assert measured == pytest.approx(predicted, rel=0.02)


class Fickle(nn.Module):
    """Saves something else when it runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = count()

    def forward(self, x: Tensor) -> Tensor:
        return x * x * x if next(self.calls) % 2 else x.tanh()


class AddsOne(nn.Module):
    """In place, where autograd would allow it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


class Spoils(nn.Module):
    """Writes to what tanh has saved."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        with torch.no_grad():
            y.add_(1.0)
        return y * 2


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (Fickle(), "Fickle saves 4 tensors for its backward when it is recomputed"),
        (AddsOne(), "stage 0 changes the input of its AddsOne in place"),
        (Spoils(), "was changed in place after autograd had saved it"),
    ],
)
def test_what_cannot_run_again_is_refused(middle: nn.Module, message: str) -> None:
    first, last = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
    stages = [nn.Sequential(first, middle, last)]
    pipeline = Pipeline(stages, schedule(stages=1), mse, recomputed=[{1}])

    with pytest.raises(ModelError, match=message):
        pipeline.step(*rows(8))


@pytest.mark.parametrize(
    ("policy", "recomputed", "message"),
    [
        ("never", lambda _: True, r"recomputed says what an R runs again, and 1f1b"),
        ("never", [{0}, ()], "recomputed has layers of stage 0, of which 1f1b"),
        ("always", [{0}], "the layers of each of 2 stages, got 1"),
        ("always", [{0}, {2}], "recomputed has layer 2 of stage 1, which has 2"),
    ],
)
def test_refusals(policy: str, recomputed: Any, message: str) -> None:
    assert policy in POLICIES
    stages = [nn.Sequential(*mlp(2)) for _ in range(2)]
    with pytest.raises(ParameterError, match=message):
        Pipeline(stages, schedule(policy=policy), mse, recomputed=recomputed)
