"""How long the instructions of a program take on a cluster, in one number type.

What both ways of playing a program share: the discrete-event engine and the
replay. Ints and Fractions stay exact: all are multiplied by what makes them whole,
and divided by it in the end. A single float among them makes all of them float64.

A program of millions of instructions has few different durations. They are worked
out one by one, and each instruction keeps the place of its own among them: mostly
a byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, plain, ratio
from pipeproof.sched.instructions import StreamKind
from pipeproof.sched.kernels import distinct, run
from pipeproof.sched.matching import ties_of
from pipeproof.sched.ties import homes_of, meets_nobody
from pipeproof.sched.trace import Timetable
from pipeproof.sched.weights import Sizes
from pipeproof.sim.cluster import Cluster, Link
from pipeproof.sim.cost import Cost
from pipeproof.sim.per_stage import divide

Index = NDArray[np.signedinteger[Any]]

BETWEEN_DEVICES = (StreamKind.TO_DEVICE, StreamKind.FROM_DEVICE)

SHORT, LONGEST = 2**31, 2**62
"""Where durations and latencies add up to less, no time overflows an int32 or int64."""


@dataclass(frozen=True)
class Prices:
    """Numbers of some of the instructions (or messages) of a program.

    Attributes:
        where: which instructions.
        numbers: the different ones.
        which: for each of `where`, its place in `numbers`.
    """

    where: Index
    numbers: list[Number]
    which: Index

    @cached_property
    def counts(self) -> list[int]:
        """How often each number is used."""
        counts = np.zeros(len(self.numbers), dtype=np.int64)
        columns = [self.which, counts]
        (counts,) = run(_count, columns, results=[1], size=len(self.which))
        used: list[int] = counts.tolist()
        return used


def _count(which: Any, counts: Any) -> None:
    for place in range(len(which)):
        counts[which[place]] += 1


@dataclass(frozen=True)
class Timing:
    """Durations and latencies of a program on a cluster.

    Attributes:
        times: the different durations.
        which: for each instruction its duration's place in `times`.
        latencies: per message, from the end of its SEND to its arrival.
        scale: exact times are whole multiples of 1 / scale, and kept as these: in
            int32 or int64 if no sum of them can overflow, else as Python's ints.
            None for float64.
    """

    times: NDArray[Any]
    which: Index
    latencies: NDArray[Any]
    scale: int | None

    @classmethod
    def each(
        cls, durations: NDArray[Any], latencies: NDArray[Any], scale: int | None
    ) -> Timing:
        """Of instructions whose durations are known one by one."""
        which = np.arange(len(durations), dtype=np.int32)
        return cls(durations, which, latencies, scale)

    @classmethod
    def of(cls, program: Program, cost: Cost, cluster: Cluster, sizes: Sizes) -> Timing:
        """Exact if all numbers that the program meets are ints or Fractions.

        Args:
            program: what is to be played.
            cost: times of its ops.
            cluster: its links.
            sizes: what the cost says of its buffers, for links with a bandwidth.

        Raises:
            ParameterError: costs that do not fit the schedule, or a bandwidth
                without bytes.
        """
        links = _links(program, cluster)
        spent = [computing(program, cost, cluster)]
        spent += _sending(program, links, sizes) + _copying(program, cluster, sizes)
        spent += tying(program, cost, cluster)
        under_way = _latencies(program, links)
        used = [
            (number, count)
            for prices in (*spent, under_way)
            for number, count in zip(prices.numbers, prices.counts)
            if count
        ]
        scale = _whole([number for number, _ in used])
        if scale is None:
            dtype: Any = np.float64
        else:
            total = sum(number * scale * count for number, count in used)
            short = np.int32 if total < SHORT else np.int64
            dtype = short if total < LONGEST else object

        def scaled(number: Any) -> Number:
            return float(number) if scale is None else int(number * scale)

        times, which = _spread(len(program), spent, scaled, dtype)
        latencies, of = _spread(program.message_count, [under_way], scaled, dtype)
        return cls(times, which, latencies[of], scale)

    @cached_property
    def durations(self) -> NDArray[Any]:
        """Per instruction; for a SEND, how long it occupies its link."""
        result: NDArray[Any] = self.times[self.which]
        return result

    @property
    def events(self) -> int:
        """How many of all durations and latencies take time."""
        return int(np.count_nonzero(self.durations)) + int(
            np.count_nonzero(self.latencies)
        )

    def unscaled(self, times: NDArray[Any]) -> NDArray[Any]:
        """Times in the cost's unit: int64 or float64, else objects.

        Args:
            times: sums of durations and latencies.
        """
        return Timetable(times, times, self.scale or 1).in_units(times)


def _whole(numbers: list[Any]) -> int | None:
    """What makes all of them whole when multiplied; None if any is a float."""
    if any(isinstance(number, float) for number in numbers):
        return None
    return math.lcm(1, *(Fraction(number).denominator for number in numbers))


def _spread(
    size: int, prices: list[Prices], scaled: Callable[[Any], Number], dtype: Any
) -> tuple[NDArray[Any], Index]:
    """The different numbers that are used, 0 the first, and which each has."""
    place: dict[Number, int] = {0: 0}
    tables = [
        [
            place.setdefault(scaled(number), len(place)) if used else 0
            for number, used in zip(some.numbers, some.counts)
        ]
        for some in prices
    ]
    short = np.min_scalar_type(-len(place))
    which = np.zeros(size, dtype=short)
    for some, table in zip(prices, tables):
        if any(table):
            columns = [some.where, some.which, np.array(table, dtype=short), which]
            (which,) = run(_put, columns, results=[3], size=len(some.where))
    times = np.empty(len(place), dtype=dtype)
    times[:] = list(place)
    return times, which


def _put(where: Any, which: Any, table: Any, result: Any) -> None:
    for place in range(len(where)):
        result[where[place]] = table[which[place]]


def computing(program: Program, cost: Cost, cluster: Cluster) -> Prices:
    """How long each COMPUTE takes on its device.

    Raises:
        ParameterError: a sequence whose length is not the number of stages.
    """
    prices = Prices(program.computes, *cost.priced(program))
    if not cluster.speeds:
        return prices
    devices = program.schedule.devices
    codes, which = _distinct(prices.which * devices + program.device[program.computes])
    numbers = [
        ratio(prices.numbers[code // devices], cluster.speed(code % devices))
        for code in codes
    ]
    return Prices(prices.where, numbers, which)


def _sending(program: Program, links: dict[int, Link], sizes: Sizes) -> list[Prices]:
    """How long each SEND occupies its link, where bytes cost time."""
    if all(link.bandwidth is None for link in links.values()):
        return []
    sends = np.flatnonzero(program.action == Action.SEND)
    size, which = _read(program, sends, sizes, "link")
    return [_by_stream(program, sends, size, which, links)]


def _by_stream(
    program: Program,
    where: Index,
    size: list[Number],
    which: Index,
    links: dict[int, Link],
) -> Prices:
    """How long transfers of these sizes take, each over its stream's link."""
    code = program.stream[where].astype(np.int64) * max(1, len(size)) + which
    pairs, which = _distinct(code)
    streams_and_sizes = (divmod(pair, len(size)) for pair in pairs)
    times = [links[stream].occupied(size[n]) for stream, n in streams_and_sizes]
    return Prices(where, times, which)


def _copying(program: Program, cluster: Cluster, sizes: Sizes) -> list[Prices]:
    """How long each COPY takes: to and from the host, and between devices."""
    only = cluster.only_link
    links = {
        number: only or cluster.link(*stream.link)
        for number, stream in enumerate(program.streams)
        if stream.link is not None and stream.kind in BETWEEN_DEVICES
    }
    ways = [*links.values(), cluster.host_link]
    if all(way.bandwidth is None for way in ways) and _free(w.latency for w in ways):
        return []
    copies = np.flatnonzero(program.action == Action.COPY)
    between = np.zeros(len(program.streams), dtype=np.bool_)
    between[list(links)] = True
    over = between[program.stream[copies]]
    away, host = copies[over], copies[~over]
    result = []
    if cluster.host_link.bandwidth is not None and len(host):
        size, which = _read(program, host, sizes, "host")
        times = list(map(cluster.host_link.occupied, size))
        result.append(Prices(host, times, which))
    if all(link.bandwidth is None for link in links.values()):
        size, which = [0], np.zeros(len(away), dtype=np.int64)
    else:
        size, which = _read(program, away, sizes, "link")
    if links:
        # A SEND's latency is its receiver's to wait for; here nobody else waits.
        taken = _by_stream(program, away, size, which, links)
        stream = program.stream[away].astype(np.int64)
        pairs, which = _distinct(stream * len(taken.numbers) + taken.which)
        times = [
            plain(taken.numbers[n] + links[number].latency)
            for number, n in (divmod(pair, len(taken.numbers)) for pair in pairs)
        ]
        result.append(Prices(away, times, which))
    return result


def tying(program: Program, cost: Cost, cluster: Cluster) -> list[Prices]:
    """How long each TIE takes, alike on all of its devices.

    Of n devices each sends every other one a part of n of its gradient, sums the parts
    that it gets, and sends that sum to all: two rounds of n - 1 parts, one after the
    other, over the slowest link between any two of them. It does not contend with
    other transfers. Devices that each hold all stages of a tie send nothing.
    """
    schedule = program.schedule
    if not schedule.ties:
        return []
    numbers: list[Number] = []
    for tie, size in zip(schedule.ties, cost.per_tie(schedule)):
        homes = [] if meets_nobody(schedule, tie) else list(homes_of(schedule, tie))
        links = [cluster.link(a, b) for a in homes for b in homes if a != b]
        part = divide(size, max(1, len(homes)))
        rounds = [(len(homes) - 1) * one.occupied(part) + one.latency for one in links]
        numbers.append(plain(2 * max(rounds, default=0)))
    ties = ties_of(program)
    where = np.array(list(ties), dtype=np.int64)
    return [Prices(where, numbers, np.array(list(ties.values()), dtype=np.int64))]


def _latencies(program: Program, links: dict[int, Link]) -> Prices:
    """How long each message is under way from the end of its SEND."""
    numbers = [
        links[stream].latency if stream in links else 0
        for stream in range(len(program.streams))
    ]
    if _free(numbers):
        return Prices(np.zeros(0, dtype=np.int64), [], np.zeros(0, dtype=np.int64))
    sends = np.flatnonzero(program.action == Action.SEND)
    return Prices(program.message[sends], numbers, program.stream[sends])


def _free(latencies: Iterable[Number]) -> bool:
    """Whether nothing takes time, nor makes it a float or a Fraction."""
    return all(type(number) is int and number == 0 for number in latencies)


def _links(program: Program, cluster: Cluster) -> dict[int, Link]:
    """The link of each stream that sends."""
    only = cluster.only_link
    return {
        number: only or cluster.link(stream.device, stream.peer)
        for number, stream in enumerate(program.streams)
        if stream.kind == StreamKind.SEND and stream.peer is not None
    }


def _read(
    program: Program, where: Index, sizes: Sizes, what: str
) -> tuple[list[Number], Index]:
    """The bytes that each of these instructions reads.

    Returns:
        The different numbers of bytes, and which each has.
    """
    if sizes.bytes is None:
        raise ParameterError(
            f"a {what} bandwidth needs bytes to send: give the Cost "
            f"{'boundary' if what == 'link' else 'activation'}_bytes"
        )
    owner, buffer = program.reads.owner, program.reads.values
    wanted = np.zeros(len(program), dtype=np.bool_)
    wanted[where] = True
    mine = wanted[owner]
    size = sizes.bytes
    if size.dtype == np.int64 and int(size.max(initial=0)) * len(owner) >= LONGEST:
        size = size.astype(object)
    total = np.zeros(len(program), dtype=size.dtype)
    np.add.at(total, owner[mine], size[buffer[mine]])
    return _distinct(total[where])


def _distinct(values: NDArray[Any]) -> tuple[list[Any], Index]:
    """The different values, and which of them each is: few among many."""
    different = distinct(values)
    return different.tolist(), np.searchsorted(different, values)
