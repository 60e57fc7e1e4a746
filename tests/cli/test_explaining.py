"""explain."""

import json
import re
import shlex
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.sched import catalog, lower
from pipeproof.sim import Cluster, Cost, bounds, jitter, sensitivity, simulate

KEYS = [
    *("schedule", "devices", "stages", "micro_batches", "chunks", "ops"),
    *("makespan", "bound", "idle", "gaps", "critical_path"),
]


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_people_read_why() -> None:
    shown = call("explain 1f1b -p 2 -m 3 --link-latency 1/2 --gaps 2").stdout

    assert "makespan         14   7.69% above the lower bound" in shown
    assert "lower bound      13   by the work of device 1" in shown
    assert "  device 0: 5 idle: 5 waits for gradients of stage 1\n" in shown
    assert "The longest of 5 gaps\n  device 0 waits for 1B0: its gradient arr" in shown
    assert shown.count(" transit ") == 1
    assert "Critical path: 8 of 12 ops have no slack" in shown
    assert "stage 1 B" in shown
    assert "Sensitivity" not in shown
    assert "Jitter" not in shown


def test_numbers_are_those_of_python() -> None:
    found = of(
        "explain 1f1b -p 4 -m 8 --link-latency .5 --gaps 3 --sensitivity --jitter .1 "
        "--distribution gamma --straggler-chance .1 --straggler-slowdown 2 --runs 50 "
        "--seed 7"
    )

    program = lower(catalog.make("1f1b", devices=4, micro_batches=8))
    cluster = Cluster(link_latency=0.5)
    run = simulate(program, Cost(), cluster)
    bound = bounds(program, Cost(), cluster, max_activations=run.peak_activations)
    assert list(found) == [*KEYS, "sensitivity", "jitter"]
    assert found["makespan"] == run.makespan == 41
    assert found["bound"] == {
        "largest": bound.largest,
        "reason": "the work of device 3",
        "distance": float(bound.distance(41)),
        "chain": bound.chain,
        "work": list(bound.work),
        "memory": list(map(float, bound.memory or ())),
    }
    assert [device["total"] for device in found["idle"]] == [17] * 4
    for device in found["idle"]:
        assert sum(device["by_cause"].values()) == 17
        assert sum(device["by_blame"].values()) == 17
    assert found["gaps"][0] == {
        "device": 0,
        "start": 4,
        "end": 13,
        "cause": "gradient",
        "waiting": "0B0",
        "waits_for": "1B0",
        "text": "device 0 waits for 1B0: its gradient arrives at 13 (idle 9, transit "
        "0.5)",
    }
    assert len(found["gaps"]) == 3
    assert sum(found["critical_path"]["by_name"].values()) == 41
    assert found["critical_path"]["path"][-1]["end"] == 41
    gains = sensitivity(program, Cost(), cluster).gains
    assert [gain["gain"] for gain in found["sensitivity"]["gains"]] == [
        float(gain.gain) for gain in gains
    ]
    noise = jitter(
        program,
        Cost(),
        cluster,
        sigma=0.1,
        distribution="gamma",
        straggler_chance=0.1,
        straggler_slowdown=2,
        runs=50,
        seed=7,
    )
    assert found["jitter"]["makespan"]["0.95"] == noise.quantiles()[0.95]
    assert found["jitter"]["idle"][3]["0.5"] == noise.idle_quantiles()[3][0.5]


def test_tables_of_what_less_time_buys_and_of_jitter() -> None:
    shown = call(
        "explain gpipe -p 2 -m 2 --sensitivity --straggler-chance 1 "
        "--straggler-slowdown 3 --runs 4"
    ).stdout

    assert "Sensitivity: what 1% less time buys, each simulated" in shown
    assert "each device 3 times as slow with a chance of 1; 4 runs, seed 0" in shown
    assert re.search("makespan( +27){4}\n", shown)


def test_one_device_never_idles() -> None:
    shown = call("explain gpipe -p 1 -m 3").stdout

    assert "at the lower bound" in shown
    assert "device 0: never idle" in shown
    assert "Gaps" not in shown
    assert of("explain gpipe -p 1 -m 3")["gaps"] == []


def test_a_file_and_floats() -> None:
    """The critical path has no slack, whatever floats round to."""
    found = of("explain 1f1b -p 3 -m 5 --forward 1.1 --input-grad .7 --link-latency .3")

    assert found["critical_path"]["ops_without_slack"] >= 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("explain 1f1b -p 2 -m 2 --jitter -1", "sigma must be a finite standard devi"),
        ("explain 1f1b -p 2 -m 2 --jitter x", "expected a number: 3, 1.5 or 1/3"),
        ("explain 1f1b -p 2 -m 2 --jitter .1 --runs 0", "runs must be at least 1, got"),
        ("explain 1f1b -p 2 -m 2 --runs 5", "--runs is about runs with jitter: give"),
        ("explain 1f1b -p 2 -m 2 --gaps -1", "-1 is not in the range x>=0"),
        ("explain 1f1b -p 2", "1f1b needs -m"),
        ("explain gpipe -p 2 -m 2 --forward 1e308", "beyond the range of floating"),
        ("explain nope", "'nope' is neither a schedule of the catalogue"),
    ],
)
def test_usage_exits_with_two(args: str, message: str) -> None:
    result = call(args)

    assert result.exit_code == 2
    assert message in result.output
