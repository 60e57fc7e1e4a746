"""--cluster, --streams and the list of clusters."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.cli.options import STREAM_MODELS
from pipeproof.sched import catalog, lower
from pipeproof.sim import PRESETS, Cluster, Cost, cluster, preset, simulate

RUN = (
    "simulate 1f1b -p 16 -m 24 --forward 18.5 --backward 27.4 --activation-bytes 3e8 "
    "--boundary-bytes 25e6"
)
COST = Cost(forward=18.5, backward=27.4, activation_bytes=3e8, boundary_bytes=25e6)


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(command: str) -> str:
    result = call(command)
    assert result.exit_code == 2
    return result.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_in_seconds_and_the_run_in_its_unit(name: str) -> None:
    schedule = catalog.make("1f1b", devices=16, micro_batches=24)

    trace = simulate(schedule, COST, preset(name).in_units(1000))

    assert of(f"{RUN} --cluster {name}")["makespan"] == trace.makespan
    assert of(f"{RUN} --cluster {name} --unit ms")["makespan"] == trace.makespan
    seconds = of(f"{RUN} --cluster {name} --unit s")["makespan"]
    assert trace.makespan > seconds > of(RUN)["makespan"]


def test_a_file_and_what_the_command_line_adds(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "link_latency = 1e-3\nnode_of = [0, 1, 0, 1]\nnic_bandwidth = 2e9\n"
    )
    schedule = catalog.make("gpipe", devices=4, micro_batches=6)
    expected = simulate(
        lower(schedule, transfers="blocking", receives="late"),
        Cost(forward=5, boundary_bytes=4_000_000),
        Cluster(
            link_latency=1.0,
            node_of=[0, 1, 0, 1],
            nic_bandwidth=2e6,
            buffering="rendezvous",
            streams="one",
        ),
    )

    run = of(
        "simulate gpipe -p 4 -m 6 --forward 5 --boundary-bytes 4000000 "
        f"--cluster {path} --buffering rendezvous --streams one "
        "--transfers blocking --receives late"
    )

    assert run["makespan"] == expected.makespan


def test_links_are_said_once(tmp_path: Path) -> None:
    said_twice = refusal(
        f"{RUN} --cluster dgx-a100 --link-latency 3 --host-bandwidth 1"
    )
    unknown = refusal(f"{RUN} --cluster dgx")
    path = tmp_path / "mine.toml"
    path.write_text("link_latencies = 3")

    assert said_twice == (
        "Error: --cluster dgx-a100 says what its links are: leave out --link-latency, "
        "--host-bandwidth, or the cluster\n"
    )
    assert unknown == (
        "Error: 'dgx' is neither a cluster (dgx-a100, dgx-h100, aws-p4d-24xlarge) nor "
        "a file\n"
    )
    assert refusal(f"{RUN} --cluster {path}").startswith(
        f"Error: {path}: link_latencies: expected a key of link_latency, "
    )


def test_a_cluster_needs_bytes_to_send() -> None:
    assert "boundary_bytes" in refusal("simulate 1f1b -p 2 -m 2 --cluster dgx-h100")


@pytest.mark.parametrize("model", STREAM_MODELS)
def test_streams_are_drawn(model: str) -> None:
    shown = call(
        f"show 1f1b -p 2 -m 3 --backward 1 --boundary-bytes 1 --link-bandwidth 1 "
        f"--streams {model} --tick 1"
    )
    trace = simulate(
        catalog.make("1f1b", devices=2, micro_batches=3),
        Cost(backward=1, boundary_bytes=1),
        Cluster(link_bandwidth=1, streams=model),  # type: ignore[arg-type]
    )

    assert shown.stdout.splitlines()[1:] == trace.grid(1).splitlines()


def test_the_words_for_streams_are_the_original_ones() -> None:
    assert STREAM_MODELS == cluster.STREAM_MODELS


def test_list_of_clusters() -> None:
    found = of("list --clusters")["clusters"]
    shown = call("list --clusters").stdout

    assert [one["name"] for one in found] == list(PRESETS)
    assert found[0]["devices_per_node"] == 8
    assert found[0]["within_node.bandwidth"] == 300 * 10**9
    assert found[2]["host_memory"] == 1152 * 2**30
    assert [one["devices_per_nic"] for one in found] == [1, 1, 2]
    assert "node_host_bandwidth" not in found[2]
    for one in found:
        assert f"  {one['name']} " in shown
        assert one["source"] in shown
