"""Models and batches for the executor's tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import sizes_of
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline, Whole, reference
from pipeproof.exec.rng import key
from pipeproof.sched import CATALOG, POLICIES, Kind, Schedule, catalog, recompute
from pipeproof.sched.row import Case

WIDTH = 4
DTYPES = (torch.float32, torch.float64)


EXECUTED = list(CATALOG)
"""The rows that the executor runs."""


def small(name: str) -> Schedule:
    """A row at three devices, or four where it needs them."""
    fits = CATALOG[name].allows
    sizes = next(size for size in ((3, 4), (3, 6), (4, 8)) if fits(Case(*size)))
    return catalog.make(name, devices=sizes[0], micro_batches=sizes[1])


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any row of the catalogue at any small size, with any recompute policy."""
    name = draw(st.sampled_from(EXECUTED))
    devices, micro_batches = draw(sizes_of(name))
    schedule = catalog.make(name, devices=devices, micro_batches=micro_batches)
    if schedule.has(Kind.OFFLOAD):  # one or the other
        return schedule
    return recompute(schedule, draw(st.sampled_from(POLICIES)))


class Attention(nn.Module):
    """Causal attention of one head; keys and values are carried between slices."""

    takes_carry = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if carry:
            k, v = torch.cat([carry[0], k], 1), torch.cat([carry[1], v], 1)
        seen = q.new_ones(q.shape[1], k.shape[1], dtype=torch.bool)
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        unseen = ~seen.tril(k.shape[1] - q.shape[1])
        y = x + scores.masked_fill(unseen, -torch.inf).softmax(2) @ v
        return y if carry is None else (y, (k, v))


class Shift(nn.Module):
    """Mixes each position with the one before; its carry is its output's end.

    A position counter, which wants no gradient, goes along.
    """

    takes_carry = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        one = x.new_tensor(1, dtype=torch.int64)
        last, (count,) = carry or (torch.zeros_like(x[:, :1]), (one,))
        y = self.linear(x) + torch.cat([last, x[:, :-1]], 1)
        at = count + torch.arange(x.shape[1], device=x.device)
        y = y / at[:, None]
        return y if carry is None else (y, (x[:, -1:], (at[-1] + 1,)))


@st.composite
def models(
    draw: st.DrawFn, stages: int, dtype: torch.dtype, *, sequence: bool = False
) -> list[nn.Sequential]:
    """Stages of linear layers, some with a norm, some with dropout.

    Args:
        draw: of hypothesis.
        stages: how many.
        dtype: of parameters.
        sequence: some with attention, or another unit that takes a carry.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.integers(1, 8))
    result = []
    for _ in range(stages):
        layers: list[nn.Module] = []
        for _ in range(draw(st.integers(1, 3))):
            layers.append(nn.Linear(width, width))
            layers.append(draw(st.sampled_from([nn.Tanh, nn.GELU, nn.Identity]))())
            if draw(st.booleans()):
                layers.append(nn.LayerNorm(width))
            if draw(st.booleans()):
                layers.append(nn.Dropout(0.4))
            if sequence and draw(st.booleans()):
                layers.append(draw(st.sampled_from([Attention, Shift]))(width))
        result.append(nn.Sequential(*layers).to(dtype))
    return result


class GivesOne(nn.Module):
    """Gives something beside its output, and uses it itself."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.gives_skips = (name,)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x).tanh()
        return x * y + y, {self.gives_skips[0]: y}


class TakesOne(nn.Module):
    """Uses it twice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.takes_skips = {"skip": name}

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x * skip + skip


def as_said(stages: list[nn.Sequential], schedule: Schedule) -> list[nn.Sequential]:
    """The stages, with units that give and take where the schedule has skips, and
    one that is in several stages where it has a tie."""
    width, weight = width_of(stages), next(stages[0].parameters())
    for name, (source, target) in enumerate(schedule.skips):
        stages[source].append(GivesOne(f"skip {name}", width).to(weight.dtype))
        stages[target].append(TakesOne(f"skip {name}"))
    for tie in schedule.ties:
        unit = nn.Linear(width, width).to(weight.dtype)
        for stage in tie:
            stages[stage].append(unit)
    return stages


def width_of(stages: Sequence[nn.Module]) -> int:
    return next(m.in_features for m in stages[0].modules() if isinstance(m, nn.Linear))


def batch_of(
    stages: Sequence[nn.Module], rows: int, dtype: torch.dtype, positions: int = 0
) -> tuple[Tensor, Tensor]:
    """(rows, width), or (rows, positions, width)."""
    shape = (rows, positions) if positions else (rows,)
    inputs, targets = torch.randn(2, *shape, width_of(stages), dtype=dtype)
    return inputs, targets


def mlp(stages: int, width: int = 4, dtype: torch.dtype = torch.float64) -> list:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh())
        for _ in range(stages)
    ]


def grads(stages: Sequence[nn.Module]) -> list[Tensor | None]:
    return [p.grad for stage in stages for p in stage.parameters()]


def same(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    """Bit by bit."""
    return len(left) == len(right) and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left, right)
    )


def close(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    """Within 1e-12 of the largest entry of all.

    Not of each tensor's own: a gradient that is zero in theory, such as those
    behind a norm over one feature, has nothing but rounding in it.
    """
    largest = max(float(b.abs().max()) for b in right if b is not None)
    return all(
        float((a - b).abs().max()) <= 1e-12 * largest
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    )


def against_reference(
    stages: Sequence[nn.Module],
    schedule: Schedule,
    inputs: object,
    targets: object,
    loss_fn: object = functional.mse_loss,
    *,
    recomputed: object = None,
    **options: object,
) -> tuple[Tensor, Sequence[nn.Module]]:
    """Run both from one seed; assert that loss, gradients and buffers are equal.

    The reference does not mind what is recomputed. Returns the loss and the stages of
    the reference.
    """
    twin = copy.deepcopy(stages)
    pipeline = Pipeline(stages, schedule, loss_fn, recomputed=recomputed, **options)
    torch.manual_seed(11)
    loss = pipeline.step(inputs, targets)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    expected = reference(twin, schedule, loss_fn, inputs, targets, **options)
    assert torch.equal(drawn, torch.rand(1)), "the generator goes on the same"
    assert torch.equal(loss, expected)
    assert same(grads(stages), grads(twin))
    for ours, theirs in zip(stages, twin):
        assert same(list(ours.buffers()), list(theirs.buffers()))
    return loss, twin


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, entries: int) -> Tensor:
        ctx.save_for_backward(x.new_zeros(entries))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        assert ctx.saved_tensors
        return grad * 2, grad.sum().reshape(1), None


class Keeps(nn.Module):
    """A stage that keeps `entries` float64 numbers for backward, and no more."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return _Keep.apply(x, self.weight, self.entries)


class Counts(nn.Module):
    """Multiplies by how often it was called, but for its first calls."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.after, self.ran = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        if self.ran > self.after:
            self.calls += 1
        return x * self.calls.clone()


class FullBatch(nn.Module):
    """A unit on the whole batch; dropout with the masks of its parts."""

    def __init__(self, unit: nn.Module, seeds: list[list[int]]) -> None:
        super().__init__()
        self.unit, self.seeds = unit, seeds

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.unit, nn.Dropout):
            return self.unit(x)
        masks = []
        for seeds, rows in zip(self.seeds, x.tensor_split(len(self.seeds))):
            parts = rows.tensor_split(len(seeds), 1) if len(seeds) > 1 else [rows]
            found = []
            for number, part in zip(seeds, parts):
                torch.manual_seed(number)
                found.append(functional.dropout(torch.ones_like(part), self.unit.p))
            masks.append(torch.cat(found, 1))
        return x * torch.cat(masks)


def full_batch(
    stages: Sequence[nn.Sequential], schedule: Schedule, step_seed: int
) -> nn.Sequential:
    """The same model, for one step on the whole batch."""
    units = [unit for stage in stages for unit in stage]
    return nn.Sequential(
        *(
            FullBatch(
                unit,
                [
                    [key(step_seed, number, m, q) for q in range(schedule.slices)]
                    for m in range(schedule.micro_batches)
                ],
            )
            for number, unit in enumerate(units)
        )
    )


class Nested(nn.Module):
    """Takes a tensor or what it returns: a bit of everything that can cross."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.packed(self.linear(value).tanh(), 1, value.detach() / 3)
        assert value["nothing"] is None
        assert value["flag"] is True
        assert value["name"] == "é"
        x, (keep, order, half) = value["x"], value["rest"]
        assert keep.dtype == torch.bool
        assert order.dtype == torch.int64
        y = self.linear(x).where(keep, x).gather(-1, order)
        return self.packed(y + half[0], value["depth"] + 1, half[0])

    def packed(self, x: Tensor, depth: int, half: Tensor) -> Any:
        keep, order = x.detach() > 0, x.detach().argsort(-1)
        return {
            "x": x,
            "rest": (keep, order, [half]),
            "depth": depth,
            "flag": True,
            "nothing": None,
            "name": "é",
            7: float(x.detach()[0, 0]),
        }


def loss_of(output: Any, targets: Tensor) -> Tensor:
    return functional.mse_loss(output["x"], targets) * output["depth"]


class Masked(nn.Module):
    """Keyword inputs: a mask of rows, a table all rows share, and a number."""

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.scaled = scaled

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        table: Any = None,
        power: int = 1,
    ) -> Tensor:
        y = self.linear(x).tanh()
        if mask is not None:
            y = y * mask[:, None]
        if table is not None:
            y = y + table["bias"][0]
        return y**power


def keywords(rows: int) -> dict[str, Any]:
    return {
        "mask": torch.arange(rows, dtype=torch.float64) / rows,
        "table": Whole({"bias": torch.arange(12.0).view(3, 4)}),
        "power": 3,
    }
