"""Clusters that can be had, from their makers' public data sheets.

In bytes and seconds; `Cluster.in_units` turns them into another unit of time. All
bandwidths are peak figures of one direction: what a program reaches is less, and
what it reaches on a machine of yours goes into a file (see `cluster_file`).

Data sheets give no latencies. Those here are what NCCL's own cost model takes for
a hop of its ring algorithm with the simple protocol: 3.4 µs by NVLink, 5.7 µs by
PCIe, 14 µs by network (NVIDIA/nccl, src/graph/tuning.cc, hwLat, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeproof.sched.errors import ParameterError
from pipeproof.sim.cluster import Cluster, Link

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, slots=True)
class Preset:
    """A cluster with its name and where its numbers are from."""

    name: str
    summary: str
    source: str
    cluster: Cluster


DGX_A100 = Preset(
    "dgx-a100",
    "nodes of 8 A100 80 GB, NVSwitch, an HDR InfiniBand card each",
    # Per GPU: 600 GB/s of NVLink 3, 64 GB/s of PCIe 4.0 x16, in both directions
    # together; 8 single-port ConnectX-6 of 200 Gb/s; 2 TB of system memory.
    "NVIDIA DGX A100 640GB and A100 80GB data sheets, 2021",
    Cluster(
        devices_per_node=8,
        within_node=Link(3.4e-6, 300 * GB),
        link_latency=14e-6,
        nic_bandwidth=25 * GB,
        devices_per_nic=1,
        host_bandwidth=32 * GB,
        memory=80 * GB,
        host_memory=2000 * GB,
    ),
)

DGX_H100 = Preset(
    "dgx-h100",
    "nodes of 8 H100 80 GB, NVSwitch, an NDR InfiniBand card each",
    # Per GPU: 900 GB/s of NVLink 4, 128 GB/s of PCIe 5.0 x16, in both directions
    # together; 8 single-port ConnectX-7 of 400 Gb/s; 2 TB of system memory.
    "NVIDIA DGX H100 and H100 SXM data sheets, 2022",
    Cluster(
        devices_per_node=8,
        within_node=Link(3.4e-6, 450 * GB),
        link_latency=14e-6,
        nic_bandwidth=50 * GB,
        devices_per_nic=1,
        host_bandwidth=64 * GB,
        memory=80 * GB,
        host_memory=2000 * GB,
    ),
)

G5_48XLARGE = Preset(
    "aws-g5-48xlarge",
    "nodes of 8 A10G 24 GB, PCIe 4.0, one 100 Gb/s Ethernet card for all",
    # PCIe 4.0 x16 of the A10: 64 GB/s in both directions together.
    "Amazon EC2 G5 product page, 2021; NVIDIA A10 data sheet, 2021",
    Cluster(
        devices_per_node=8,
        within_node=Link(5.7e-6, 32 * GB),
        link_latency=14e-6,
        nic_bandwidth=12_500_000_000,
        host_bandwidth=32 * GB,
        memory=24 * GIB,
        host_memory=768 * GIB,
    ),
)

PRESETS = {preset.name: preset for preset in (DGX_A100, DGX_H100, G5_48XLARGE)}


def preset(name: str) -> Cluster:
    """A preset's cluster, in bytes and seconds.

    Raises:
        ParameterError: there is none of this name.
    """
    if name not in PRESETS:
        raise ParameterError(
            f"no cluster is called {name!r}: there are {', '.join(PRESETS)}"
        )
    return PRESETS[name].cluster
