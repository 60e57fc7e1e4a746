"""Which streams of a program share links.

A link of a pair of devices carries one stream and is its own. A network card, or a
node's way to its host, carries the streams of several devices: what they transfer
at the same time shares its bandwidth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from pipeproof.sched import Program
from pipeproof.sched.exact import Number
from pipeproof.sched.instructions import Stream, StreamKind
from pipeproof.sim.cluster import Cluster


@dataclass(frozen=True)
class Sharing:
    """The streams whose transfers may slow each other down.

    Attributes:
        routes: stream → the links that its transfers take, as places in
            `bandwidths`; only of streams that share one with another.
        bandwidths: of each link, bytes per unit of time.
    """

    routes: dict[int, tuple[int, ...]]
    bandwidths: list[Number]

    @classmethod
    def of(cls, program: Program, cluster: Cluster) -> Sharing:
        """What a program's streams share on a cluster."""
        if cluster.nic_bandwidth is None and cluster.node_host_bandwidth is None:
            return cls({}, [])
        routes = {
            number: _route(stream, cluster)
            for number, stream in enumerate(program.streams)
        }
        users = Counter(link for route in routes.values() for link in route)
        shared = {
            number: route
            for number, route in routes.items()
            if any(users[link] > 1 for link in route)
        }
        places: dict[Hashable, int] = {}
        bandwidths: list[Number] = []
        for route in shared.values():
            for link, bandwidth in route.items():
                if link not in places:
                    places[link] = len(places)
                    bandwidths.append(bandwidth)
        return cls(
            {n: tuple(places[link] for link in r) for n, r in shared.items()},
            bandwidths,
        )


def contended(program: Program, cluster: Cluster) -> bool:
    """Whether transfers of a program may share a link, and so change their pace.

    The time that each takes is then known only once it is over, and only the
    engine can play the program.
    """
    return bool(Sharing.of(program, cluster).routes)


def _route(stream: Stream, cluster: Cluster) -> dict[Hashable, Number]:
    """The links with a limit that a stream's transfers take."""
    limits: dict[Hashable, Number | None] = {}
    device = stream.device
    if stream.kind != StreamKind.RECV and stream.link is not None:
        source, target = stream.link
        limits[stream, "link"] = cluster.own_link(source, target).bandwidth
        if cluster.node(source) != cluster.node(target):
            limits["out", cluster.nic(source)] = cluster.nic_bandwidth
            limits["in", cluster.nic(target)] = cluster.nic_bandwidth
    elif stream.kind in (StreamKind.TO_HOST, StreamKind.FROM_HOST):
        limits[stream.kind, device] = cluster.host_bandwidth
        node = cluster.node(device)
        limits[stream.kind, "node", node] = cluster.node_host_bandwidth
    return {
        link: limit
        for link, limit in limits.items()
        if limit is not None and not math.isinf(limit)
    }
