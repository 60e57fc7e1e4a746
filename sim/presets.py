"""Clusters that can be had, from their makers' public figures.

In bytes and seconds; `Cluster.in_units` turns them into another unit of time. All
bandwidths are peak figures of one direction: what a program reaches is less, and
what it reaches on a machine of yours goes into a file (see `cluster_file`). Data
sheets state NVLink and PCIe in both directions together, and cards in bits:

    A100 (NVIDIA, A100 Tensor Core GPU data sheet): NVLink 600 GB/s, PCIe 4.0 64 GB/s
    H100 (NVIDIA, H100 Tensor Core GPU data sheet): NVLink 900 GB/s, PCIe 5.0 128 GB/s

They give no latencies. Those here are what NCCL's own cost model takes for a hop of
its ring algorithm with the simple protocol: 3.4 µs by NVLink, 14 µs by network
(NVIDIA/nccl, src/graph/tuning.cc, hwLat, as of releases 2.19 to 2.27; 9.6 µs by
network in older ones).
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
    # 8 single-port ConnectX-6 of 200 Gb/s for compute; 2 TB of system memory.
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
    # 8 single-port ConnectX-7 of 400 Gb/s for compute; 2 TB of system memory.
    "NVIDIA H100 data sheet, 2022; DGX BasePOD reference architecture, 2024, DGX H100",
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

P4D_24XLARGE = Preset(
    "aws-p4d-24xlarge",
    "nodes of 8 A100 40 GB, NVSwitch, four 100 Gb/s cards for two devices each",
    # 400 Gb/s of Elastic Fabric Adapter on 4 network cards; 1,152 GiB of memory.
    "Amazon EC2 P4 instances and EFA documentation, 2020; NVIDIA A100 data sheet, 2020",
    Cluster(
        devices_per_node=8,
        within_node=Link(3.4e-6, 300 * GB),
        link_latency=14e-6,
        nic_bandwidth=12_500_000_000,
        devices_per_nic=2,
        host_bandwidth=32 * GB,
        memory=40 * GB,
        host_memory=1152 * GIB,
    ),
)

PRESETS = {preset.name: preset for preset in (DGX_A100, DGX_H100, P4D_24XLARGE)}


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
