"""A job with keyword inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jobs import WIDTH, digest
from models import Masked, keywords
from torch._C._distributed_c10d import PrefixStore
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.exec.errors import BatchError, RankError
from pipeproof.exec.group import Ranks
from pipeproof.sched import catalog


@dataclass(frozen=True)
class Keyed:
    """A step with keyword inputs.

    Attributes:
        missing: a rank that is not given one of them.
        unknown: whether there is one that no unit takes.
    """

    missing: int = -1
    unknown: bool = False


def keyed(ranks: Ranks | bool, job: Keyed) -> Any:
    """The gradients of the stages here, or what is refused."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    torch.manual_seed(0)
    stages = [Masked(), Masked()]
    x, y = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    given = keywords(7)
    mine = range(2)
    if isinstance(ranks, Ranks):
        mine = range(ranks.rank, ranks.rank + 1)
        store = PrefixStore(f"{job}", ranks.store)
        ranks = Ranks(store, ranks.rank, ranks.size, timeout_s=5)
        if ranks.rank == job.missing:
            del given["mask"]
    if job.unknown:
        given["musk"] = 1
    try:
        pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
        pipeline.step(x, y, keywords=given)
        return [digest(*(p.grad for p in stages[n].parameters())) for n in mine]
    except (BatchError, RankError) as error:
        return str(error)
    finally:
        if isinstance(ranks, Ranks):
            ranks.leave()
