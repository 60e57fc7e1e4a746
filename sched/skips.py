"""Skip connections: tensors that a stage hands straight to a later one.

A schedule says in `skips` which stages do. Those between have no part in it::

    F   stage 0 ──▶ stage 1 ──▶ stage 2 ──▶ stage 3       skips: 0>3
            └──────────── activation 0→3 ─────▲
    B   stage 0 ◀── stage 1 ◀── stage 2 ◀── stage 3
            ▲──────────── gradient 0→3 ───────┘

So F(3,m) needs F(0,m) and B(0,m) needs B(3,m), which the chain of stages orders
anyhow: `deps` need not say it again. What is handed over is a message like any other,
with buffers at both of its ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.stage_words import StageWords

if TYPE_CHECKING:
    from pipeproof.sched.ir import Schedule

Skip = tuple[int, int]
"""The stage that hands a tensor over, and the later one that takes it."""

MAX_SKIPS = 1 << 10

_WORDS = StageWords(
    "skips", ">", many=False, once="what one stage hands to another is one message"
)
named, format_skips = _WORDS.named, _WORDS.format


def listed(skips: Iterable[Any], where: str = "skips") -> tuple[Skip, ...]:
    """Skips in order, as a schedule keeps them.

    Raises:
        ParameterError: something else than pairs of stages, one twice, or too many.
    """
    found: list[Skip] = []
    for given in skips:
        source, target = _WORDS.stages(given, where)
        found.append((source, target))
        if len(found) > MAX_SKIPS:
            raise ParameterError(f"{where}: at most {MAX_SKIPS:,}, got more")
    return _WORDS.each_once(found, where)


def parse_skips(text: str, where: str) -> tuple[Skip, ...]:
    """What `format_skips` wrote.

    Raises:
        ParseError: saying where, what was expected and found.
    """
    return _WORDS.parse(text, where, listed)


def wrong(schedule: Schedule) -> list[tuple[Skip, str, str]]:
    """Skips that the stages do not allow, with what was found and what to do."""
    found = []
    for skip in schedule.skips:
        source, target = skip
        if (last := max(skip)) >= schedule.stages:
            what = f"there is no stage {last}"
            found.append((skip, what, "Name stages of the schedule, or drop it"))
        elif target < source:
            what = "it leads back"
            found.append((skip, what, f"Let it lead forward, {target}>{source}"))
        elif target == source:
            found.append((skip, "it leads nowhere", "Drop it: a stage keeps its own"))
        elif target == source + 1:
            what = "it leads to the next stage"
            found.append((skip, what, "Drop it: the stage's output goes there"))
    return found


@dataclass(frozen=True)
class SkipTable:
    """The skips of a schedule by the stages at their ends, for kernels.

    Attributes:
        source, target: int64, the stages of each skip.
        down, down_at: skips by source stage, and where those of each begin.
        up, up_at: by target stage, likewise.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    down: NDArray[np.int64]
    down_at: NDArray[np.int64]
    up: NDArray[np.int64]
    up_at: NDArray[np.int64]

    @classmethod
    def of(cls, schedule: Schedule) -> SkipTable:
        """Of legal skips."""
        pairs = np.array(schedule.skips, dtype=np.int64).reshape(-1, 2)
        source, target = pairs.T
        stages = np.arange(schedule.stages + 1)
        ends = []
        for column in (source, target):
            order = np.argsort(column, kind="stable")
            ends += [order, np.searchsorted(column[order], stages)]
        return cls(source, target, *ends)

    def __len__(self) -> int:
        return len(self.source)
