"""Where a program runs: devices, nodes, the links between them, and their limits.

Bytes are bytes and times are in the Cost's unit, bandwidths in bytes per unit of
time. Presets and files are in seconds; `in_units` turns them into another unit.

Two nodes of a cluster::

    +- node 0 ----------------------------+        +- node 1 ----------
    | host - host_bandwidth - device 0 -+ |        |
    |                            |      | |        |
    |                      within_node  NIC  link  NIC - device 2 ...
    |                            |      | |        |
    | host - host_bandwidth - device 1 -+ |        |
    +-------------------------------------+        +-------------------

A transfer to another node takes the link of its pair of devices, the sender's NIC
outward and the receiver's inward; its rate is its fair share of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from os import PathLike

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.streams import STREAM_MODELS as STREAM_MODELS
from pipeproof.sched.streams import Buffering as Buffering
from pipeproof.sched.streams import StreamModel as StreamModel


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two devices.

    A message occupies the link for bytes / bandwidth and arrives `latency` after
    it has left.

    Attributes:
        latency: in the Cost's unit of time.
        bandwidth: bytes per unit of time; None means that bytes cost no time.

    Raises:
        ParameterError: a negative latency, or a bandwidth that is not above 0.
    """

    latency: Number = 0
    bandwidth: Number | None = None

    def __post_init__(self) -> None:
        if not is_number(self.latency) or not 0 <= self.latency < math.inf:
            raise ParameterError(
                f"link latency must be a finite time of at least 0, got "
                f"{self.latency!r}"
            )
        if self.bandwidth is None:
            return
        if not is_number(self.bandwidth) or not self.bandwidth > 0:
            raise ParameterError(
                f"link bandwidth must be above 0 bytes per unit of time, got "
                f"{self.bandwidth!r}: None means that bytes cost no time"
            )

    def occupied(self, size: Number) -> Number:
        """How long a message of `size` bytes occupies the link."""
        if self.bandwidth is None or math.isinf(self.bandwidth):
            return 0
        if isinstance(size, int) and isinstance(self.bandwidth, int):
            return Fraction(size, self.bandwidth)
        return size / self.bandwidth


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices, the nodes they are in, and the links between them.

    Attributes:
        link_latency: of every link that neither `links` nor `within_node` says
            otherwise of, in the Cost's unit of time.
        link_bandwidth: likewise, bytes per unit of time; None means that bytes
            cost no time. Any bandwidth needs a Cost with boundary_bytes. What a
            device OFFLOADs to another goes over the link too, and back over the
            one the other way, beside the messages there.
        links: (source, target) → Link, where one differs from the rest.
        buffering: what a send waits for: `eager`, nothing; `rendezvous`, its
            receive to be posted; k, the receive k messages before to be done.
        host_bandwidth: of each device to and from its host, bytes per unit of time,
            for OFFLOAD and RELOAD there; None means that copies cost no time.
        shared_processor: all devices are one, which runs their ops in the
            program's order: what several stages on one processor amount to.
        streams: which of a device's streams are one, in the program's order:
            `dir`, none; `pair`, sends to and receives from one device, as in a
            communicator of two; `one`, all sends and receives; `sync`, everything.
        speeds: device → speed, where it is not 1: its ops take duration / speed.
        memory: bytes of each device; None where it is not known.
        devices_per_node: devices 0 … n - 1 are node 0, the next n node 1, ….
        node_of: the node of each device, where nodes are otherwise.
        within_node: the link between devices of one node.
        nic_bandwidth: of a network card, in each direction; shared by all transfers
            to and from other nodes of the devices it serves.
        devices_per_nic: how many devices of a node a card serves, by their order;
            default all of them.
        node_host_bandwidth: of all devices of a node to their host together, and
            likewise from it.
        host_memory: bytes of each node's host; None where it is not known.

    Raises:
        ParameterError: a number out of range, an unknown buffering or stream model,
            or something about nodes where it is not said which device is in which.
    """

    link_latency: Number = 0
    link_bandwidth: Number | None = None
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    buffering: Buffering = "eager"
    host_bandwidth: Number | None = None
    shared_processor: bool = False
    streams: StreamModel = "dir"
    speeds: Mapping[int, Number] = field(default_factory=dict)
    memory: Number | None = None
    devices_per_node: int | None = None
    node_of: Sequence[int] = ()
    within_node: Link | None = None
    nic_bandwidth: Number | None = None
    devices_per_nic: int | None = None
    node_host_bandwidth: Number | None = None
    host_memory: Number | None = None

    def __post_init__(self) -> None:
        Link(self.link_latency, self.link_bandwidth)
        count = self.buffering
        if isinstance(count, bool) or (
            count not in ("eager", "rendezvous")
            and not (isinstance(count, int) and count >= 1)
        ):
            raise ParameterError(
                f"buffering must be 'eager', 'rendezvous' or a number of messages "
                f"of at least 1, got {self.buffering!r}"
            )
        if self.streams not in STREAM_MODELS:
            raise ParameterError(
                f"streams must be one of {', '.join(STREAM_MODELS)}, got "
                f"{self.streams!r}"
            )
        for pair, link in self.links.items():
            if not isinstance(link, Link):
                raise ParameterError(f"links: expected a Link for {pair}, got {link!r}")
        if not isinstance(self.within_node, Link | None):
            raise ParameterError(
                f"within_node must be a Link, got {self.within_node!r}"
            )
        for name in ("host_bandwidth", "nic_bandwidth", "node_host_bandwidth"):
            self._above_zero(name, "bytes per unit of time")
        for name in ("memory", "host_memory"):
            self._above_zero(name, "bytes")
        for device, speed in self.speeds.items():
            if not _is_positive(speed) or math.isinf(speed):
                raise ParameterError(
                    f"speeds: device {device} must have a finite speed above 0, got "
                    f"{speed!r}: 1 is nominal, 1/2 takes twice as long"
                )
        self._check_nodes()

    def _above_zero(self, name: str, what: str) -> None:
        value = getattr(self, name)
        if value is not None and not _is_positive(value):
            raise ParameterError(f"{name} must be above 0 {what}, got {value!r}")

    def _check_nodes(self) -> None:
        # A caller's list could change behind our back.
        object.__setattr__(self, "node_of", tuple(self.node_of))
        for node in self.node_of:
            if isinstance(node, bool) or not isinstance(node, int) or node < 0:
                raise ParameterError(
                    f"node_of must be integers of at least 0, one for each device, "
                    f"got {node!r}"
                )
        for name in ("devices_per_node", "devices_per_nic"):
            if getattr(self, name) is not None:
                at_least_one(**{name: getattr(self, name)})
        if self.devices_per_node is not None and self.node_of:
            raise ParameterError(
                "devices_per_node and node_of both say which device is in which "
                "node: give one of them"
            )
        if self.devices_per_node is None and not self.node_of:
            names = ("within_node", "nic_bandwidth", "node_host_bandwidth")
            for name in (*names, "host_memory"):
                if getattr(self, name) is not None:
                    raise ParameterError(
                        f"{name} needs to know which devices share a node: give "
                        "devices_per_node or node_of"
                    )
        if self.devices_per_nic is None:
            return
        if self.nic_bandwidth is None:
            raise ParameterError("devices_per_nic needs a nic_bandwidth")
        if self.devices_per_node and self.devices_per_nic > self.devices_per_node:
            raise ParameterError(
                f"a card serves devices of one node: devices_per_nic must be at most "
                f"devices_per_node, {self.devices_per_node}, got {self.devices_per_nic}"
            )

    def node(self, device: int) -> int:
        """The node of a device; 0 where nodes are not known.

        Raises:
            ParameterError: `node_of` has no such device.
        """
        if self.devices_per_node is not None:
            return device // self.devices_per_node
        if not self.node_of:
            return 0
        if device >= len(self.node_of):
            raise ParameterError(
                f"node_of says the nodes of {len(self.node_of)} devices; device "
                f"{device} needs one too"
            )
        return self.node_of[device]

    def nic(self, device: int) -> tuple[int, int]:
        """The network card of a device: its node, and its number there.

        Raises:
            ParameterError: as `node`.
        """
        node = self.node(device)
        if self.devices_per_nic is None:
            return node, 0
        if self.devices_per_node is not None:
            place = device % self.devices_per_node
        else:
            place = self.node_of[:device].count(node)
        return node, place // self.devices_per_nic

    def link(self, source: int, target: int) -> Link:
        """The link between two devices, with the bandwidth that it has to itself.

        Raises:
            ParameterError: as `node`.
        """
        link = self.own_link(source, target)
        if self.nic_bandwidth is None or self.node(source) == self.node(target):
            return link
        return replace(link, bandwidth=slower(link.bandwidth, self.nic_bandwidth))

    @property
    def only_link(self) -> Link | None:
        """The link between any two devices, if all are alike whatever their nodes."""
        if self.links or self.within_node is not None or self.nic_bandwidth is not None:
            return None
        return Link(self.link_latency, self.link_bandwidth)

    def own_link(self, source: int, target: int) -> Link:
        """The link between two devices, whatever the network cards can take."""
        named = self.links.get((source, target))
        if named is not None:
            return named
        if self.within_node is not None and self.node(source) == self.node(target):
            return self.within_node
        return Link(self.link_latency, self.link_bandwidth)

    @property
    def host_link(self) -> Link:
        """The link of a device to its host, with the bandwidth it has to itself."""
        return Link(bandwidth=slower(self.host_bandwidth, self.node_host_bandwidth))

    def speed(self, device: int) -> Number:
        """How fast a device runs its ops; 1 is nominal."""
        return self.speeds.get(device, 1)

    def in_units(self, per_second: Number) -> Cluster:
        """A cluster in seconds, in another unit of time.

        Args:
            per_second: how many of them a second has: 1000 for milliseconds.
        """

        def link(one: Link) -> Link:
            return Link(one.latency * per_second, slowed(one.bandwidth))

        def slowed(bandwidth: Number | None) -> Number | None:
            if isinstance(bandwidth, int) and isinstance(per_second, int):
                return plain(Fraction(bandwidth, per_second))
            return None if bandwidth is None else bandwidth / per_second

        return replace(
            self,
            link_latency=self.link_latency * per_second,
            link_bandwidth=slowed(self.link_bandwidth),
            links={pair: link(one) for pair, one in self.links.items()},
            within_node=None if self.within_node is None else link(self.within_node),
            host_bandwidth=slowed(self.host_bandwidth),
            nic_bandwidth=slowed(self.nic_bandwidth),
            node_host_bandwidth=slowed(self.node_host_bandwidth),
        )

    @staticmethod
    def load(path: str | PathLike[str]) -> Cluster:
        """A cluster from a TOML file; see `pipeproof.sim.cluster_file`.

        Raises:
            ParseError: naming the file, the key, what was expected and found.
            OSError: the file cannot be read.
        """
        from pipeproof.sim.cluster_file import load

        return load(path)


def slower(one: Number | None, other: Number | None) -> Number | None:
    """The lower of two bandwidths, None being unlimited."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0  # type: ignore[operator]
