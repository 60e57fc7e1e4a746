"""Where a program runs: links between devices, and who shares a processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number

Buffering = Literal["eager", "rendezvous"] | int


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
    """Devices and the links between them.

    Attributes:
        link_latency: of every link, in the Cost's unit of time.
        link_bandwidth: of every link, bytes per unit of time; None means that
            bytes cost no time. Needs a Cost with boundary_bytes. What a device
            OFFLOADs to another goes over a link too, and back over the one the
            other way, beside the messages there.
        links: (source, target) → Link, where one differs from the rest.
        buffering: what a send waits for: `eager`, nothing; `rendezvous`, its
            receive to be posted; k, the receive k messages before to be done.
        host_bandwidth: of each device to and from its host, bytes per unit of time,
            for OFFLOAD and RELOAD there; None means that copies cost no time.
        shared_processor: all devices are one, which runs their ops in the
            program's order: what several stages on one processor amount to.

    Raises:
        ParameterError: a number out of range, or an unknown buffering.
    """

    link_latency: Number = 0
    link_bandwidth: Number | None = None
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    buffering: Buffering = "eager"
    host_bandwidth: Number | None = None
    shared_processor: bool = False

    def __post_init__(self) -> None:
        Link(self.link_latency, self.link_bandwidth)
        Link(bandwidth=self.host_bandwidth)
        count = self.buffering
        if isinstance(count, bool) or (
            count not in ("eager", "rendezvous")
            and not (isinstance(count, int) and count >= 1)
        ):
            raise ParameterError(
                f"buffering must be 'eager', 'rendezvous' or a number of messages "
                f"of at least 1, got {self.buffering!r}"
            )
        for pair, link in self.links.items():
            if not isinstance(link, Link):
                raise ParameterError(f"links: expected a Link for {pair}, got {link!r}")

    def link(self, source: int, target: int) -> Link:
        """The link from one device to another."""
        default = Link(self.link_latency, self.link_bandwidth)
        return self.links.get((source, target), default)
