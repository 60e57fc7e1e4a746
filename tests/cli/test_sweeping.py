"""`pipeproof sweep`: axes, the table, the file, the exit status."""

import importlib
import json
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.sched import catalog, lower, recompute
from pipeproof.sim import Cluster, Cost, DeadlockError, simulate


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def cells(command: str) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["cells"]


def test_every_combination() -> None:
    found = cells(
        "sweep 1f1b,interleaved -p 2,4 -m 8 -v 2,3 --remat never --remat always "
        "--forward 2 --input-grad 1,2,3,4 --input-grad 2 --weight-bytes 7 "
        "--link-latency 0 --link-latency 1/2 --receives late"
    )

    assert len(found) == (1 + 2) * 2 * 2 * 2 * 2
    # An input gradient for each of four stages fits 1F1B on four devices and the
    # interleaved one of two chunks on two; six, eight and twelve stages it does not.
    simulated = [cell for cell in found if cell["status"] == "simulated"]
    assert len(simulated) == len(found) // 2 + 2 * 4
    last = found[-1]
    names = ["schedule", "devices", "options", "recompute", "receives", "cost"]
    assert [last[name] for name in [*names, "cluster"]] == [
        "interleaved",
        4,
        {"chunks": 3},
        "always",
        "late",
        "forward=2 input-grad=2 weight-bytes=7",
        "link-latency=1/2",
    ]
    schedule = catalog.make("interleaved", devices=4, micro_batches=8, chunks=3)
    program = lower(recompute(schedule, "always"), receives="late")
    cost = Cost(forward=2, input_grad=2, weight_bytes=7)
    trace = simulate(program, cost, Cluster(link_latency=Fraction(1, 2)))
    assert last["makespan"] == trace.makespan
    assert last["peak_activations"] == list(map(float, trace.peak_activations))
    assert last["peak_bytes"] == trace.peak_bytes


def test_messages_in_groups_are_an_axis() -> None:
    found = cells(
        "sweep 1f1b -p 3 -m 6 --boundary-bytes 1 --link-bandwidth 2 --streams pair "
        "--messages single --messages grouped"
    )

    schedule = catalog.make("1f1b", devices=3, micro_batches=6)
    for cell, messages in zip(found, ("single", "grouped"), strict=True):
        program = lower(schedule, messages=messages)
        cluster = Cluster(link_bandwidth=2, streams="pair")
        trace = simulate(program, Cost(boundary_bytes=1), cluster)
        assert (cell["messages"], cell["makespan"]) == (messages, trace.makespan)
    assert found[0]["makespan"] != found[1]["makespan"]


def test_a_model_is_cut_for_each_schedule() -> None:
    command = "--model gpt-22b --device-flops 312e12 --unit s"
    found = cells(f"sweep 1f1b -p 2,4 -m 8 {command} --cluster dgx-a100")

    for cell, p in zip(found, (2, 4), strict=True):
        one = call(f"simulate 1f1b -p {p} -m 8 {command} --cluster dgx-a100 --json")
        assert cell["makespan"] == json.loads(one.stdout)["makespan"]
        assert cell["peak_bytes"] == json.loads(one.stdout)["peak_bytes"]
    assert found[0]["cost"] == "model=gpt-22b device-flops=312000000000000.0"


def test_a_table_shows_what_varies() -> None:
    shown = call("sweep 1f1b,interleaved -p 3 -m 6 -v 2 --forward 1 --forward 2").stdout

    assert [line.split() for line in shown.splitlines()[2:] if "=" in line] == [
        ["1f1b", "3", "6", "forward=1", "0.2500", "3", "24"],
        ["1f1b", "3", "6", "forward=2", "0.2500", "3", "32"],
        ["interleaved", "3", "6", "chunks=2", "forward=1", "0.1429", "4", "21"],
        ["interleaved", "3", "6", "chunks=2", "forward=2", "0.1429", "4", "28"],
    ]


def test_a_file_in_place_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    command = f"sweep gpipe,1f1b -p 2:8 -m 8 -o {path}"

    told = call(command)

    assert (told.exit_code, told.stdout) == (0, "")
    assert told.stderr == f"{path}: 6 points, 6 simulated, 0 refused, 0 broken\n"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = call(command + " --json")
    assert path.read_bytes() == whole
    assert again.stderr == (
        f"Note: {path}: its last line was cut off, and is written again\n"
    )
    assert json.loads(again.stdout) == {
        "path": str(path),
        "points": 6,
        "simulated": 6,
        "refused": 0,
        "broken": 0,
    }


def test_a_file_of_another_sweep(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    call(f"sweep gpipe -p 2 -m 8 -o {path}")
    before = path.read_bytes()

    refused = call(f"sweep gpipe -p 2 -m 9 -o {path}")

    assert refused.exit_code == 2
    assert "1 of its 1 rows belong to another sweep" in refused.stderr
    assert path.read_bytes() == before


def test_refusals_are_rows() -> None:
    found = cells("sweep dualpipe -p 2,3 -m 4")

    assert [cell["status"] for cell in found] == ["simulated", "refused"]
    assert found[1]["refused"].startswith("dualpipe needs an even number of devices")
    assert "makespan" not in found[1]
    table = call("sweep dualpipe -p 2,3 -m 4")
    assert table.exit_code == 0
    assert "  reason" in table.stdout
    assert "dualpipe needs an even number of devices" in table.stdout


def test_nothing_but_refusals() -> None:
    result = call("sweep dualpipe -p 3 -m 4")

    assert result.exit_code == 2
    assert "dualpipe needs an even number of devices" in result.stdout


def test_a_deadlock_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> None:
        raise DeadlockError("nothing can go on")

    module = importlib.import_module("pipeproof.sim.sweep")
    monkeypatch.setattr(module, "simulate", hang)
    result = call("sweep 1f1b -p 2 -m 8")

    assert result.exit_code == 1
    assert "nothing can go on" in result.stdout


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "rows.csv"
    module = importlib.import_module("pipeproof.sim.sweep")
    with monkeypatch.context() as patched:
        patched.setattr(module, "simulate", stop)
        result = call(f"sweep 1f1b -p 2 -m 8 -o {path}")

    assert result.exit_code == 130
    assert f"the same command goes on with {path}" in result.stderr
    assert call(f"sweep 1f1b -p 2 -m 8 -o {path}").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-p 2 -m 8 -v 2", "chunks: none of these schedules takes it: leave it out"),
        ("-p 2 -m 8 -v x", "expected sizes: 2,4,8"),
        ("-p 2 -m 8 -o rows.txt", "ends in .csv or .parquet"),
        ("-p 2 -m 8 --jobs 0", "0 is not in the range x>=1"),
        ("-p 99999 -m 99999", "99,999 devices × 99,999 micro-batches exceed"),
        ("-p 1:200:1 -m 1:200:1", "or into a file with -o"),
        ("-p 2 -m 8 --unit s --unit ms", "--unit is of the whole sweep"),
        ("-p 2 -m 8 --forward -1", "forward must be a finite number of at least 0"),
    ],
)
def test_refusals(args: str, message: str) -> None:
    result = call(f"sweep 1f1b {args}")

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
