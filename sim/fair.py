"""Transfers that share links: each gets its fair share of the bandwidth.

Sharing is max-min fair: the rate of a transfer can only be raised by lowering that
of another one on a link they share, which is no faster. Progressive filling finds
it: all rates grow alike until a link is full, those that take this link stay where
they are, and the others go on growing (Bertsekas and Gallager, Data Networks, 2nd
edition, 6.5.2). It is how flows of one network card, or of one switch, come out in
the mean.

Whenever a transfer begins or ends, the rates of those connected with it are worked
out anew, and with them when each will end. So the end of a transfer that another
one slowed down is the sum of several parts: exact in ints and Fractions, rounded a
few times more in floats. One that goes at its own pace from begin to end takes its
duration, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from pipeproof.sched.exact import Number, ratio

if TYPE_CHECKING:
    import simpy

REMEMBERED = 4096
"""Meetings of transfers whose rates are kept."""


@dataclass(slots=True)
class _Transfer:
    index: int
    route: tuple[int, ...]
    left: Any
    """How long it would still take at its own rate."""
    speed: Any = 0
    """Its rate now, as a part of its own rate."""
    since: Any = 0
    estimate: simpy.Event | None = None


class FairLinks:
    """The transfers that are under way, and the links they share.

    Args:
        environment: whose clock runs.
        bandwidths: of each link, bytes per unit of time.
        ended: called with the index of a transfer that ends.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        bandwidths: Sequence[Number],
        ended: Callable[[int], None],
    ) -> None:
        self._env = environment
        self._bandwidths = bandwidths
        self._ended = ended
        self._using: list[dict[int, _Transfer]] = [{} for _ in bandwidths]
        self._changed: set[int] = set()
        self._own_rates: dict[tuple[int, ...], Number] = {}
        # A step repeats itself: so do the transfers that meet.
        self._speeds_of = lru_cache(REMEMBERED)(self._speeds)

    def begin(self, index: int, route: tuple[int, ...], duration: Any) -> None:
        """A transfer begins; `share` must follow before the clock moves.

        Args:
            index: its name.
            route: the links it takes.
            duration: how long it takes if it has them to itself.
        """
        if route not in self._own_rates:
            self._own_rates[route] = min(self._bandwidths[link] for link in route)
        transfer = _Transfer(index, route, left=duration)
        for link in route:
            self._using[link][index] = transfer
        self._changed.update(route)

    def share(self) -> None:
        """Give each transfer its share, after some have begun or ended."""
        if not self._changed:
            return
        together = self._connected()
        self._changed.clear()
        if len(together) == 1:  # the most frequent case by far
            for transfer in together.values():
                if transfer.speed != 1:
                    self._estimate(transfer, 1)
            return
        speeds = self._speeds_of(*(transfer.route for transfer in together.values()))
        for transfer, speed in zip(together.values(), speeds):
            if speed != transfer.speed:
                self._estimate(transfer, speed)

    def _speeds(self, *routes: tuple[int, ...]) -> list[Number]:
        """The fair rate of each of these transfers, as a part of its own rate."""
        rates = fair_rates(dict(enumerate(routes)), self._bandwidths)
        return [
            ratio(rates[place], self._own_rates[route])
            for place, route in enumerate(routes)
        ]

    def _connected(self) -> dict[int, _Transfer]:
        """All that share a link with what changed, or with one that does, ….

        In the order of their names, so that no order of a set decides anything.
        """
        found: dict[int, _Transfer] = {}
        links, seen = list(self._changed), set(self._changed)
        while links:
            for index, transfer in self._using[links.pop()].items():
                found[index] = transfer
                more = [link for link in transfer.route if link not in seen]
                seen.update(more)
                links += more
        return dict(sorted(found.items())) if len(found) > 1 else found

    def _estimate(self, transfer: _Transfer, speed: Any) -> None:
        now = self._env.now
        transfer.left -= (now - transfer.since) * transfer.speed
        transfer.since, transfer.speed = now, speed
        # Rounding may leave a little less than nothing.
        delay: Any = max(0, ratio(transfer.left, speed))
        event = self._env.timeout(delay, transfer)
        assert event.callbacks is not None  # it has not happened yet
        event.callbacks.append(self._over)
        transfer.estimate = event

    def _over(self, event: simpy.Event) -> None:
        transfer = cast(_Transfer, event.value)
        if transfer.estimate is not event:
            return  # its pace has changed since
        for link in transfer.route:
            del self._using[link][transfer.index]
            if self._using[link]:
                self._changed.add(link)
        self._ended(transfer.index)


def fair_rates(
    routes: Mapping[int, tuple[int, ...]], bandwidths: Sequence[Number]
) -> dict[int, Number]:
    """The max-min fair rate of each transfer, by progressive filling.

    Args:
        routes: transfer → the links it takes, at least one.
        bandwidths: of each link.
    """
    users: dict[int, int] = {}
    for route in routes.values():
        for link in route:
            users[link] = users.get(link, 0) + 1
    left: dict[int, Any] = {link: bandwidths[link] for link in users}
    growing = dict(routes)
    rates: dict[int, Number] = {}
    while growing:
        shares = {link: ratio(left[link], count) for link, count in users.items()}
        full = min(shares, key=lambda link: shares[link])
        rate = shares[full]
        for index in [i for i, route in growing.items() if full in route]:
            rates[index] = rate
            for link in growing.pop(index):
                left[link] -= rate
                users[link] -= 1
                if not users[link]:
                    del users[link]
    return rates
