"""What offloaded activations take of a node's host, and the cap on it."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import whole_language

from pipeproof.cli import main
from pipeproof.sched import BufferKind, ParameterError, Schedule, fits
from pipeproof.sched.hosts import host_peaks
from pipeproof.sim import Cluster, Cost, simulate

TWO = Schedule.parse(
    """\
devices: 2
placement: linear
micro-batches: 2

device 0 | 0F0 0OFFLOAD0 0F1 0B1 0RELOAD0 0B0
device 1 | 1F0 1OFFLOAD0 1F1 1B1 1RELOAD0 1B0
"""
)
COST = Cost(forward=4, backward=6, activation_bytes=(8, 5))


def test_devices_of_a_node_share_its_host() -> None:
    """0F0's activations are away from 4 on, and 1F0's from 8."""
    trace = simulate(TWO, COST, Cluster(host_bandwidth=2))
    names = trace.program.label

    one = host_peaks(trace, [0, 0])
    assert [(peak.total, names(peak.op)) for peak in one] == [(13, "1OFFLOAD0")]
    apart = host_peaks(trace, [0, 1])
    assert [(peak.node, peak.total) for peak in apart] == [(0, 8), (1, 5)]


def test_a_host_that_is_too_small_is_a_finding() -> None:
    trace = simulate(TWO, COST, Cluster(host_bandwidth=2))

    assert fits(trace, host_memory=13).ok
    assert fits(trace, host_memory=8, node_of=[0, 1]).ok
    (finding,) = fits(trace, host_memory=12).findings
    assert (finding.rule, finding.device, finding.step) == ("host memory", 1, 1)
    assert finding.found == "13 bytes at 1OFFLOAD0 on the host of node 0"
    assert finding.expected == "at most 12 bytes of activations on a node's host"


def test_a_cluster_says_how_much_its_hosts_have(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("devices_per_node = 4\nmemory = 1e9\nhost_memory = 10\n")
    command = "check pipeoffload -p 4 -m 8 -v 2 --offload 1 --activation-bytes 8 --json"

    result = CliRunner().invoke(main, shlex.split(f"{command} --cluster {path}"))
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding["rule"] == "host memory"


@settings(max_examples=40)
@given(schedule=whole_language(), bandwidth=st.sampled_from([None, 1, 3]))
def test_is_the_most_of_all_copies_at_one_time(
    schedule: Schedule, bandwidth: int | None
) -> None:
    cost = Cost(activation_bytes=7 * schedule.stages)
    trace = simulate(schedule, cost, Cluster(host_bandwidth=bandwidth))
    node_of = [device % 2 for device in range(schedule.devices)]
    size = trace.sizes.known_bytes()
    program = trace.program
    spans = [(row[0], node_of[row[1]]) for row in program.buffers.tolist()]
    times: dict[int, list[tuple[object, int]]] = {}
    for i in range(len(program)):
        for b in program.writes[i]:
            times.setdefault(b, [(trace.start[i], 2 * i)])
    for i in range(len(program)):
        for b in program.frees[i]:
            times[b].append((trace.end[i], 2 * i + 1))
    for node in (0, 1):
        mine = [
            (times[b], size[b])
            for b, (kind, home) in enumerate(spans)
            if kind == BufferKind.HOST and home == node
        ]
        most = max(
            (
                sum(n for (born, died), n in mine if born <= now < died)
                for (now, _), _ in mine
            ),
            default=0,
        )
        found = [peak.total for peak in host_peaks(trace, node_of) if peak.node == node]
        assert found == ([most] if mine else [])


def test_refuses_a_cap_that_is_none() -> None:
    trace = simulate(TWO, COST)

    with pytest.raises(ParameterError, match="host_memory must be a number of at l"):
        fits(trace, host_memory=-1)
