"""What ranks do that goes wrong, and what each of them says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from models import GivesOne, TakesOne
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn import functional

from pipeproof.exec import Pipeline, Ranks
from pipeproof.sched import Schedule, catalog

WIDTH, MICRO_BATCHES = 4, 4


@dataclass(frozen=True)
class Wrong:
    """Something that goes wrong on one of two ranks.

    Attributes:
        kind: what.
        rank: where.
    """

    kind: str
    rank: int


@dataclass(frozen=True)
class Said:
    """What a rank says.

    Attributes:
        first: of the step in which it goes wrong.
        then: of the next step with the same pipeline.
        anew: whether a new company of the ranks computes the right gradients.
    """

    first: str
    then: str
    anew: bool


class InBackward(torch.autograd.Function):
    """Fails where nobody looks: in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ZeroDivisionError("in a backward of its own")


class Odd(nn.Module):
    """A layer with a fault of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(WIDTH, WIDTH), kind

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "system exit":
                raise SystemExit(3)
            case "backward":
                x = InBackward.apply(x)
            case "memory":
                raise torch.OutOfMemoryError("no memory for 7 GiB")
        result: Tensor = self.layer(x)
        if self.kind == "not finite":
            result = result / 0
        if self.kind == "values" and x.sum() > 0:
            result = result.repeat(1, 2)
        return result.double() if self.kind == "double" else result


def schedule() -> Schedule:
    return catalog.make("1f1b", devices=2, micro_batches=MICRO_BATCHES)


def stages_of(kind: str, where: int) -> list[nn.Module]:
    torch.manual_seed(0)
    stages: list[nn.Module] = [Odd("") for _ in range(2)]
    if kind in ("system exit", "backward", "memory", "double", "not finite", "values"):
        stages[where].kind = kind
    return stages


def right(ranks: Ranks) -> bool:
    """Whether a step without faults is that without a pipeline."""
    stages, twins = stages_of("", 0), stages_of("", 0)
    x, y = torch.randn(2, 8, WIDTH)
    Pipeline(stages, schedule(), functional.mse_loss, ranks=ranks).step(x, y)
    functional.mse_loss(nn.Sequential(*twins)(x), y).backward()
    mine, twin = stages[ranks.rank].parameters(), twins[ranks.rank].parameters()
    return all(
        p.grad is not None
        and q.grad is not None
        and torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for p, q in zip(mine, twin)
    )


def wronged(ranks: Ranks, wrong: Wrong) -> Said:
    """A step that goes wrong, the next one, and one of a new company."""
    here, kind = ranks.rank == wrong.rank, wrong.kind
    company = Ranks(
        PrefixStore(f"{wrong}", ranks.store), ranks.rank, ranks.size, timeout_s=5
    )
    x, y = torch.randn(2, 8, WIDTH)
    if here and kind == "rows":
        x, y = x[:6], y[:6]
    stages = stages_of(kind, wrong.rank)
    if here and kind == "targets":
        y = None
    if kind == "values":
        x = x.abs()
    if here and kind == "dtype":
        stages[0].double()
    if kind == "skips":
        name = "fine" if here else "coarse"
        last = nn.Sequential(TakesOne(name), nn.Linear(WIDTH, WIDTH))
        stages = [nn.Sequential(GivesOne(name, WIDTH)), last]
    pipeline: Pipeline | None = None

    def step() -> str:
        nonlocal pipeline
        try:
            if pipeline is None:
                pipeline = Pipeline(
                    stages,
                    schedule(),
                    functional.mse_loss,
                    ranks=company,
                    check_finite=kind == "not finite",
                )
                if kind == "values":
                    pipeline.step(-x, y)
            pipeline.step(x, y)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    try:
        first, then = step(), step()
    finally:
        company.leave()
    anew = Ranks(PrefixStore(f"{wrong} again", ranks.store), ranks.rank, ranks.size)
    try:
        return Said(first, then, right(anew))
    finally:
        anew.leave()


def growing(ranks: Ranks, sizes: tuple[int, ...]) -> bool:
    """Whether steps of these sizes add up to the gradients without a pipeline."""
    stages, twins = stages_of("", 0), stages_of("", 0)
    pipeline = Pipeline(stages, schedule(), functional.mse_loss, ranks=ranks)
    for rows in sizes:
        x, y = torch.randn(
            2, rows, WIDTH, generator=torch.Generator().manual_seed(rows)
        )
        pipeline.step(x, y)
        functional.mse_loss(nn.Sequential(*twins)(x), y).backward()
    mine, twin = stages[ranks.rank].parameters(), twins[ranks.rank].parameters()
    return all(
        p.grad is not None
        and q.grad is not None
        and torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for p, q in zip(mine, twin)
    )
