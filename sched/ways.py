"""Ways to recompute, of groups of devices, that fit together.

What a group may take at most follows from its own choice. What it takes follows also
from when the others hand things over, and so from theirs: where that decides, ways are
put together, the fastest first, and what all take then is worked out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from pipeproof.sched.transforms import Policy


@dataclass(frozen=True, slots=True)
class Way:
    """One for a group of devices that choose together.

    Attributes:
        time: of the busiest of them.
        policies, layers: of each of their stages.
        share: of what may wait on these devices, how much it leaves room for; from 0
            to 1.
    """

    time: float
    policies: tuple[Policy, ...]
    layers: tuple[tuple[int, ...], ...]
    share: float


def together(groups: Sequence[Sequence[Way]]) -> Iterator[tuple[Way, ...]]:
    """One way of each group, all that there are: by the longest time, then by the sum.

    Args:
        groups: the ways of each, the fastest first.
    """

    def key(places: tuple[int, ...]) -> tuple[float, float]:
        times = [ways[place].time for ways, place in zip(groups, places)]
        return max(times), sum(times)

    first = (0,) * len(groups)
    waiting = [(key(first), first)]
    seen = {first}
    while waiting:
        _, places = heappop(waiting)
        yield tuple(ways[place] for ways, place in zip(groups, places))
        for number, (ways, place) in enumerate(zip(groups, places)):
            following = (*places[:number], place + 1, *places[number + 1 :])
            if place + 1 < len(ways) and following not in seen:
                seen.add(following)
                heappush(waiting, (key(following), following))
