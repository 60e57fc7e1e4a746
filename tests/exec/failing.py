"""Jobs in which something goes wrong on a rank."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import WIDTH
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore

from pipeproof.exec import Pipeline
from pipeproof.exec.errors import RankError
from pipeproof.exec.group import Ranks
from pipeproof.sched import catalog
from pipeproof.sched.lower import Messages


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a step of 1F1B on one rank.

    Attributes:
        kind: what.
        rank: where.
        signal: to end it with, for the kind `signal`.
    """

    kind: str
    rank: int
    signal: int = 0


class Failing(nn.Module):
    """Fails at the third micro-batch that comes through."""

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.fail, self.calls = fail, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            self.fail()
        return self.linear(x)


class Speechless(Exception):
    def __str__(self) -> str:
        raise TypeError("no words")


def spoil(fault: Fault) -> None:
    match fault.kind:
        case "speechless":
            raise Speechless
        case "stage" | "lender":
            raise ValueError("no such word: 7")
        case "interrupt":
            raise KeyboardInterrupt
        case "signal":
            os.kill(os.getpid(), fault.signal)


class Dropping(nn.Module):
    """Its output's shape depends on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x[:1]


def sum_of_squares(output: Tensor, targets: Tensor) -> Tensor:
    return output.square().sum()


def bad_loss(output: Tensor, targets: Tensor) -> Tensor:
    raise ArithmeticError("a loss of its own")


OTHERWISE: dict[str, Callable[[Pipeline, Tensor], object]] = {
    "evaluation": lambda pipeline, x: pipeline.evaluate(x, x),
    "prediction": lambda pipeline, x: pipeline.predict(x),
    "recorded step": lambda pipeline, x: pipeline.step(x, x, record=True),
    "norms": lambda pipeline, x: pipeline.clip_grad_norm_(1.0),
}
"""What one rank does while the others make a step, by what it is called."""


def faulty(ranks: Ranks, fault: Fault) -> None:
    """Two steps, in which this happens."""
    here, kind = ranks.rank == fault.rank, fault.kind
    micro_batches = 5 if here and kind == "schedule" else 4
    devices = ranks.size + (kind == "devices")
    names = {"lender": "bpipe", "apart": "interleaved", "messages": "dualpipe"}
    name = names.get(kind, "1f1b")
    if kind == "messages":
        micro_batches = 8
    schedule = catalog.make(name, devices=devices, micro_batches=micro_batches)
    stages: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(schedule.stages)]
    if here and kind in ("stage", "lender", "interrupt", "signal", "speechless"):
        stages[ranks.rank] = Failing(lambda: spoil(fault))
    elif here and kind == "shapes":
        stages[0] = nn.Linear(WIDTH, WIDTH, bias=False)
    elif here and kind == "none":
        stages[ranks.rank] = None
    elif kind == "tied":
        stages[1].weight = stages[3].weight
        if here:
            nn.init.zeros_(stages[3].weight)
    elif kind == "apart" and not here:
        stages[4].weight = stages[0].weight
    elif kind == "data":
        stages[fault.rank] = Dropping()
    loss_fn = bad_loss if kind == "loss" else sum_of_squares
    posted: Messages = "grouped" if here and kind == "messages" else "single"
    pipeline = Pipeline(stages, schedule, loss_fn, ranks=ranks, messages=posted)
    x = torch.ones(8, WIDTH)
    pipeline.step(x, x[:5] if kind == "rows" else x)
    if here and kind in OTHERWISE:
        OTHERWISE[kind](pipeline, x)
    if here and kind == "vanishes":
        os._exit(0)
    if not (here and kind == "leaves"):
        pipeline.step(-x, x)


def told(ranks: Ranks, fault: Fault) -> str:
    """What a rank says of a fault, which ends a company of its own."""
    store = PrefixStore(f"{fault}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=5)
    try:
        faulty(company, fault)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()
    return "nothing"


def endless(ranks: Ranks, fault: Fault) -> str:
    """An op that does not come to its end until a rank says that all stand still."""
    store = PrefixStore(f"{fault}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=1)

    def wait() -> None:
        while True:
            company.check()

    stages: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(ranks.size)]
    if ranks.rank == fault.rank:
        stages[ranks.rank] = Failing(wait)
    else:
        stages[fault.rank] = None
    schedule = catalog.make("1f1b", devices=ranks.size, micro_batches=4)
    x = torch.ones(8, WIDTH)
    try:
        Pipeline(stages, schedule, sum_of_squares, ranks=company).step(x, x)
    except RankError as error:
        return str(error)
    finally:
        company.leave()
    return "nothing"


def standing_still(ranks: Ranks, fault: Fault) -> str:
    """One rank is in a step and does nothing, until another one says so."""
    store = PrefixStore(f"{fault}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=1)
    try:
        if ranks.rank != fault.rank:
            faulty(company, fault)
        with company.together("a long op"):
            while True:
                company.check()
    except RankError as error:
        return str(error)
    finally:
        company.leave()


def interrupted(ranks: Ranks, fault: Fault) -> str:
    """Ctrl-C on a rank that waits in gloo for others who never speak."""
    company = Ranks(PrefixStore(f"{fault}", ranks.store), ranks.rank, ranks.size)

    def interrupt() -> None:
        while company._beats.waits is None:
            company.check()
        os.kill(os.getpid(), signal.SIGINT)

    try:
        if ranks.rank == fault.rank:
            threading.Thread(target=interrupt).start()
            faulty(company, fault)
        with company.together("a long op"):
            while True:
                company.check()
    except (RankError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()


def leaving_a_pid(ranks: Ranks, fault: Fault, folder: str) -> None:
    Path(folder, str(ranks.rank)).write_text(str(os.getpid()))
    faulty(ranks, fault)
