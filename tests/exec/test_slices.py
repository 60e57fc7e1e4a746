"""Micro-batches in slices along the sequence, and what is carried between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Attention, against_reference, batch_of, close, grads, mlp
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import BatchError, LossError, ModelError, Pipeline
from pipeproof.exec.examples import gpt_layers, token_loss
from pipeproof.sched import Schedule, catalog, recompute

mse = functional.mse_loss


def sliced(slices: int = 3, name: str = "seq1f1b") -> Schedule:
    return catalog.make(name, devices=2, micro_batches=2, slices=slices)


def attentive(stages: int = 2, width: int = 4) -> list[nn.Sequential]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(width, width), Attention(width)).double()
        for _ in range(stages)
    ]


def sequences(rows: int = 5, positions: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return batch_of(attentive(), rows, torch.float64, positions)


@pytest.mark.parametrize("name", ["terapipe", "seq1f1b", "slimpipe"])
def test_a_gpt_in_slices_has_the_gradient_of_the_whole_sequence(name: str) -> None:
    torch.manual_seed(0)
    layers = gpt_layers(
        vocabulary=11, tokens=9, width=8, layers=3, heads=2, dropout=0.0
    )
    stages = [nn.Sequential(*layers[:2]).double(), nn.Sequential(*layers[2:]).double()]
    twin = copy.deepcopy(stages)
    ids = torch.randint(11, (5, 10))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    loss = Pipeline(stages, sliced(4, name), token_loss).step(inputs, targets)

    whole = token_loss(twin[1](twin[0](inputs)), targets)
    whole.backward()
    assert close([loss], [whole.detach()])
    assert close(grads(stages), grads(twin))


def test_each_slice_sees_its_positions_and_what_the_ones_before_left() -> None:
    """(positions, positions of the carry) by call: seven positions are 3 + 2 + 2."""
    seen = []

    class Watched(Attention):
        def forward(self, x: Tensor, carry: Any = None) -> Any:
            seen.append((x.shape[1], carry[0].shape[1] if carry else carry))
            return super().forward(x, carry)

    schedule = Schedule.parse(
        "devices: 1\nplacement: linear\nmicro-batches: 1\nslices: 3\n\n"
        "device 0 | 0F0 0F0.1 0F0.2 0B0.2 0B0.1 0B0\n"
    )
    stage = nn.Sequential(nn.Linear(4, 4), Watched(4)).double()
    x, y = sequences()

    Pipeline([stage], schedule, mse).step(x, y)
    Pipeline([stage], catalog.make("gpipe", devices=1, micro_batches=1), mse).step(x, y)

    assert seen == [(3, ()), (2, 3), (2, 5), (7, None)]


def test_the_gradient_of_the_inputs() -> None:
    stages = attentive()
    twin = copy.deepcopy(stages)
    x, y = sequences()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))

    Pipeline(stages, sliced(), mse).step(ours * 2, y)
    mse(twin[1](twin[0](theirs * 2)), y).backward()

    assert close([ours.grad], [theirs.grad])


def test_recomputed_slices_take_their_carry_again() -> None:
    schedule = recompute(sliced(), "always")

    against_reference(attentive(), schedule, *sequences())


def test_a_carry_that_is_handed_through_and_one_that_is_the_output() -> None:
    """Its gradient comes from every later slice, through nothing at all."""

    class Through(nn.Module):
        takes_carry = True

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor, carry: Any = None) -> Any:
            y = torch.tanh(self.linear(x))
            if not carry:
                return y if carry is None else (y, ((y[:, :1],), y))
            (start,), before = carry
            y = y + start + before.mean(1, keepdim=True)
            return y, ((start,), y)

    torch.manual_seed(0)
    stages = [nn.Sequential(Through()), nn.Sequential(Through(), Attention(4)).double()]

    against_reference(stages, sliced(), *sequences())


def test_losses_that_ignore_some_positions_count_by_those_that_are_left() -> None:
    """The second slice of the first micro-batch has none: its mean is NaN."""
    stages = attentive()
    twin = copy.deepcopy(stages)
    x, _ = sequences(4, 6)
    targets = torch.randint(4, (4, 6))
    targets[:2, 3:] = -100
    targets[3, 0] = -100

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def count(labels: Tensor) -> Tensor:
        return (labels != -100).sum()

    schedule = sliced(2)
    loss = Pipeline(stages, schedule, loss_fn, loss_scale=count).step(x, targets)

    whole = loss_fn(twin[1](twin[0](x)), targets)
    whole.backward()
    assert close([loss], [whole.detach()])
    assert close(grads(stages), grads(twin))
    wrong = Pipeline(attentive(), schedule, loss_fn, loss_scale=lambda _: -1.0)
    with pytest.raises(LossError, match="micro-batch 0, slice 0 the weight -1"):
        wrong.step(x, targets)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ((4, 2, 4), (4, 2, 4), "inputs has 2 positions for 3 slices"),
        ((4, 6, 4), (4, 5, 4), "targets have 5 positions and inputs 6"),
        ((4,), (4,), r"dimension 1 is the sequence, found a tensor of shape \(4,\)"),
    ],
)
def test_batches_that_have_no_such_slices_are_refused(
    inputs: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    pipeline = Pipeline(attentive(), sliced(), mse)
    with pytest.raises(BatchError, match=message):
        pipeline.step(torch.ones(inputs).double(), torch.ones(targets).double())


def test_units_that_mix_positions_without_a_carry_are_refused() -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(4)

    schedule = sliced()
    with pytest.raises(ModelError, match="Wraps, holds Attention, which takes a carry"):
        Pipeline([Wraps(), *mlp(1)], schedule, mse)
    with pytest.raises(ModelError, match="unit 0, GRU, has GRU, which mixes positions"):
        Pipeline([nn.GRU(4, 4), *mlp(1)], schedule, mse)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("output", r"must return \(output, carry\), returned Tensor"),
        ("list", "leaves a list in its carry"),
        ("in place", "stage 0 changes its carry in place, which is what an earlier"),
    ],
)
def test_carries_that_are_none_are_refused(returned: str, message: str) -> None:
    class Odd(nn.Module):
        takes_carry = True

        def forward(self, x: Tensor, carry: Any = None) -> Any:
            if returned == "in place" and carry:
                carry[0].add_(1)
            kept = x.detach().mean()
            return {"output": x, "list": (x, [kept]), "in place": (x, (kept,))}[
                returned
            ]

    pipeline = Pipeline([nn.Sequential(Odd()), *mlp(1)], sliced(), mse)
    with pytest.raises(ModelError, match=message):
        pipeline.step(*sequences())
