"""OFFLOAD and RELOAD: what a forward stored leaves the device and comes back."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from models import batch_of, grads, mlp, same
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline, stash
from pipeproof.exec.stash import Copies, Stash, addresses
from pipeproof.sched import Schedule

mse = functional.mse_loss
CPU = torch.device("cpu")

AWAY = Schedule.parse(
    """\
devices: 1
placement: [0 0]
micro-batches: 2
slices: 1
steps: 1

device 0 | 0F0 0OFFLOAD0 1F0 0F1 1F1 1B1 0B1 0RELOAD0 1B0 0B0
"""
)
HERE = Schedule.parse(AWAY.format().replace(" 0OFFLOAD0", "").replace(" 0RELOAD0", ""))


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return batch_of(mlp(1), rows, torch.float64)


class Watched(nn.Module):
    """Saves its output, and says which of its outputs' memory there still is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.made: list[weakref.ref] = []
        self.alive: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.alive.append([memory() is not None for memory in self.made])
        hidden = torch.tanh(self.linear(x))
        self.made.append(weakref.ref(hidden.untyped_storage()))
        return hidden * 2


@pytest.mark.parametrize(("schedule", "kept"), [(AWAY, False), (HERE, True)])
def test_what_is_offloaded_is_gone_meanwhile(schedule: Schedule, kept: bool) -> None:
    """0F1 runs between 0OFFLOAD0 and 0RELOAD0, and sees whether 0F0's memory is."""
    watched = Watched()

    Pipeline([watched, *mlp(1)], schedule, mse).step(*batch())

    assert watched.alive == [[], [kept]]


def test_the_input_of_a_stage_goes_too() -> None:
    class Source(Watched):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x) * 3
            self.made.append(weakref.ref(y.untyped_storage()))
            return y

    schedule = Schedule.parse(
        AWAY.format()
        .replace("0F0 0OFFLOAD0 1F0", "0F0 1F0 1OFFLOAD0")
        .replace("0RELOAD0", "1RELOAD0")
    )
    source = Source()
    alive = []

    class Next(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            alive.append([memory() is not None for memory in source.made])
            return super().forward(x)

    # Of a small output, stage 0 keeps the tensor itself and not its place alone.
    Pipeline([source, Next(*mlp(1))], schedule, mse).step(*batch(6000))

    assert alive == [[True], [False, True]]


def test_gradients_are_those_without_copies() -> None:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            nn.Linear(4, 6),
            nn.Unflatten(1, (2, 3)),
            nn.LayerNorm(3),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6, 4),
        ).double()
        for _ in range(2)
    ]
    twin = copy.deepcopy(stages)
    x, y = batch()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))

    for model, inputs, schedule in ((stages, ours, AWAY), (twin, theirs, HERE)):
        torch.manual_seed(2)
        Pipeline(model, schedule, mse).step(inputs, y)

    assert same(grads(stages), grads(twin))
    assert same([ours.grad], [theirs.grad])


class Noted(Copies):
    """Keeps what it was given to copy."""

    def put(self, data: list[Tensor]) -> None:
        self.rows = [row.clone() for row in data]
        super().put(data)


def test_memory_is_copied_once_and_only_where_it_is_covered() -> None:
    whole = torch.arange(100, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    part = whole[40:46].view(3, 2)
    stash = Stash(CPU, addresses([weight]))
    with stash.saving():
        leaf = part.detach().requires_grad_()
        loss = ((leaf @ weight) * leaf.sum()).exp().sum() + (leaf.t() @ leaf).sum()
    (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)

    place = Noted(CPU, CPU)
    stash.offload(place, [leaf])
    sizes = sorted(map(len, place.rows))
    with torch.no_grad():
        whole.zero_()
    stash.reload()

    assert sizes == [8, 48, 72, 72], "a sum, six numbers of a hundred, two products"
    assert leaf.tolist() == [[40, 41], [42, 43], [44, 45]]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def test_a_saved_tensor_that_is_changed_in_place_is_refused() -> None:
    """Hooks keep autograd itself from noticing."""

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.exp()
            return hidden.mul_(2)

    stages = [nn.Sequential(*mlp(1), InPlace()), *mlp(1)]
    with pytest.raises(ModelError, match=r"at 0OFFLOAD0 .*changed in place after"):
        Pipeline(stages, AWAY, mse).step(*batch())


def test_copies_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose streams only note here what they are told."""
    told = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            return f"copies {self.name}"

    compute, ways = Stream("compute"), {False: Stream("away"), True: Stream("back")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(stash, "_stream", lambda device, back: ways[back])
    monkeypatch.setattr(stash, "_room", lambda row, place: torch.empty_like(row))
    place, row = Copies(torch.device("cuda", 0), CPU), torch.arange(3)

    place.put([row])
    found = place.get()
    place.ready()

    assert same(found, [row])
    assert told == [
        "away waits for compute",
        "back waits for compute",
        "back waits for copies away",
        "compute waits for copies back",
    ]
