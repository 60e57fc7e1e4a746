"""What training without a pipeline computes, as hashes of what was done to what."""

from __future__ import annotations

from hashlib import md5

from pipeproof.sched import Schedule
from pipeproof.sched.ir import Skip


def term(*parts: object) -> str:
    return md5(repr(parts).encode()).hexdigest()


def of_loss(micro_batch: int, part: int, act: str) -> str:
    """Where a backward starts: the loss of an output, against these targets, times
    the weight of this micro-batch and slice."""
    loss = term("loss", micro_batch, part, term("out", act))
    return term("dloss", term("weighed", micro_batch, part, loss))


def reference(schedule: Schedule) -> list[list[str]]:
    """For each stage the gradient terms of an unpipelined step, sorted."""
    result: list[list[str]] = [[] for _ in range(schedule.stages)]
    last = schedule.stages - 1
    for m in range(schedule.micro_batches):
        x: dict[tuple[int, int], str] = {}
        act: dict[tuple[int, int], str] = {}
        for q in range(schedule.slices):
            for s in range(schedule.stages):
                x[s, q] = term("batch", m, q) if s == 0 else term("out", act[s - 1, q])
                over = [term("skip", k, act[k[0], q]) for k in into(schedule, s)]
                act[s, q] = term("act", s, m, q, x[s, q], act.get((s, q - 1)), over)
        dx: dict[tuple[int, int], str] = {}
        over_dx: dict[tuple[Skip, int], str] = {}
        for q in reversed(range(schedule.slices)):
            for s in range(last, -1, -1):
                above = dx[s + 1, q] if s < last else of_loss(m, q, act[s, q])
                g: tuple[object, ...] = (above, dx.get((s, q + 1)))
                g += ([over_dx[k, q] for k in out_of(schedule, s)],)
                dx[s, q] = term("dx", s, act[s, q], *g)
                for k in into(schedule, s):
                    over_dx[k, q] = term("dskip", k, act[s, q], *g)
                stash = term("stash", act[s, q], act[s, q], *g)
                came = [term("skip", k, act[k[0], q]) for k in into(schedule, s)]
                result[s].append(term("grad", s, stash, x[s, q], came))
    return list(map(sorted, result))


def into(schedule: Schedule, stage: int) -> list[Skip]:
    return [skip for skip in schedule.skips if skip[1] == stage]


def out_of(schedule: Schedule, stage: int) -> list[Skip]:
    return [skip for skip in schedule.skips if skip[0] == stage]
