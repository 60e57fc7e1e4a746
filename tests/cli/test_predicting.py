"""list, show, check, simulate, sweep."""

import json
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.cli.values import number, sizes
from pipeproof.sched import CATALOG, catalog, lower, recompute
from pipeproof.sim import Cluster, Cost, DeadlockError, simulate

KEYS = [
    *("schedule", "devices", "stages", "micro_batches", "chunks", "ops"),
    *("makespan", "span", "ideal", "bubble_fraction", "bubble_ratio", "span_bubble"),
    *("peak_activations", "peak_bytes"),
]


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_gpipe_of_four_devices() -> None:
    run = of("simulate gpipe -p 4 -m 8")

    assert list(run) == KEYS
    assert run["bubble_fraction"] == 3 / 11
    assert run["bubble_ratio"] == 3 / 8
    assert (run["makespan"], run["ideal"], run["span"]) == (33, 24, 33)
    assert run["peak_activations"] == [8, 8, 8, 8]
    assert run["peak_bytes"] is None
    assert (run["ops"], run["stages"], run["chunks"]) == (64, 4, 1)
    assert all(type(run[key]) is int for key in ("makespan", "ideal", "span"))


def test_numbers_are_those_of_python() -> None:
    run = of(
        "simulate 1f1b -p 8 -m 24 --forward 18.5 --input-grad 18.1 --weight-grad 9.3 "
        "--link-latency .6 --remat except-last"
    )

    schedule = recompute(
        catalog.make("1f1b", devices=8, micro_batches=24), "except-last"
    )
    trace = simulate(
        schedule,
        Cost(forward=18.5, input_grad=18.1, weight_grad=9.3),
        Cluster(link_latency=0.6),
    )
    assert run["makespan"] == trace.makespan
    assert run["bubble_fraction"] == trace.bubble_fraction
    assert run["peak_activations"] == trace.peak_activations


def test_every_option_reaches_the_simulator() -> None:
    run = of(
        "simulate gpipe -p 2 -m 3 --backward-order fifo --remat always "
        "--forward 1,2 --input-grad 1/3 --weight-grad 2 --backward 5/2 --recompute 3 "
        "--overlap 4 --weight-grad-memory 1/2 --weight-bytes 7 --gradient-bytes 7 "
        "--optimizer-bytes 14 --activation-bytes 100 --boundary-bytes 10 "
        "--input-bytes 5,10 --link-latency 1/2 --link-bandwidth 4 "
        "--buffering rendezvous --transfers blocking --receives late "
        "--messages grouped"
    )

    schedule = catalog.make("gpipe", devices=2, micro_batches=3, backward="fifo")
    program = lower(
        recompute(schedule, "always"),
        transfers="blocking",
        receives="late",
        messages="grouped",
    )
    cost = Cost(
        forward=(1, 2),
        input_grad=Fraction(1, 3),
        weight_grad=2,
        backward=Fraction(5, 2),
        recompute=3,
        overlap=4,
        weight_grad_memory=Fraction(1, 2),
        weight_bytes=7,
        gradient_bytes=7,
        optimizer_bytes=14,
        activation_bytes=100,
        boundary_bytes=10,
        input_bytes=(5, 10),
    )
    cluster = Cluster(
        link_latency=Fraction(1, 2), link_bandwidth=4, buffering="rendezvous"
    )
    trace = simulate(program, cost, cluster)
    assert run["makespan"] == float(trace.makespan)
    assert run["bubble_ratio"] == float(trace.bubble_ratio)
    assert run["peak_bytes"] == trace.peak_bytes


def test_skips_of_a_file_have_bytes(tmp_path: Path) -> None:
    schedule = catalog.make("1f1b", devices=3, micro_batches=2).with_skips([(0, 2)])
    file = tmp_path / "skipping.txt"
    file.write_text(schedule.format(), "utf-8")

    run = of(f"simulate {file} --weight-grad 0 --skip-bytes 4 --link-bandwidth 1")

    cost = Cost(weight_grad=0, skip_bytes=4)
    trace = simulate(schedule, cost, Cluster(link_bandwidth=1))
    assert (run["makespan"], run["peak_bytes"]) == (16, trace.peak_bytes)


def test_ties_of_a_file_have_bytes(tmp_path: Path) -> None:
    schedule = catalog.make("1f1b", devices=3, micro_batches=2).with_ties([(0, 2)])
    file = tmp_path / "tied.txt"
    file.write_text(schedule.format(), "utf-8")

    run = of(f"simulate {file} --boundary-bytes 0 --tied-bytes 4 --link-bandwidth 1")

    cost = Cost(boundary_bytes=0, tied_bytes=4)
    trace = simulate(schedule, cost, Cluster(link_bandwidth=1))
    free = simulate(schedule.with_ties([]), Cost())
    assert run["makespan"] == trace.makespan == free.makespan + 4


@pytest.mark.parametrize("what", ["skip", "tie"])
def test_bytes_of_what_there_is_not_are_refused(what: str) -> None:
    option = {"skip": "--skip-bytes", "tie": "--tied-bytes"}[what]
    result = call(f"simulate 1f1b -p 3 -m 2 {option} 4 --link-bandwidth 1")

    assert result.exit_code == 2
    assert f"1f1b(devices=3, micro_batches=2) has no {what}s: leave it" in result.stderr


def test_people_read_each_metric_by_its_name() -> None:
    shown = call("simulate 1f1b -p 4 -m 8 --link-latency 1").stdout

    for name in KEYS[6:13]:
        assert f" {name} " in shown
    assert "lower bound" in shown
    assert "Longest wait: device 0 waits for 1B0: its gradient arrives at " in shown


def test_the_lower_bound_is_reached_or_missed() -> None:
    assert "makespan is at it" in call("simulate gpipe -p 4 -m 8").stdout
    missed = call("simulate naive -p 4 -m 8").stdout
    assert "% above it" in missed


def test_nothing_waits_on_one_device() -> None:
    shown = call("simulate gpipe -p 1 -m 2").stdout

    assert "No device idles before its last op." in shown


def test_a_deadlock_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> None:
        raise DeadlockError("nothing can go on")

    monkeypatch.setattr("pipeproof.cli.simulating.predict", hang)
    result = call("simulate 1f1b -p 2 -m 8")

    assert (result.exit_code, result.stderr) == (1, "Error: nothing can go on\n")


def test_simulate_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    run = of(f"simulate gpipe -p 2 -m 2 --forward 5 --unit us --trace {path}")

    events = json.loads(path.read_text())["traceEvents"]
    assert run["makespan"] == 21
    assert max(e["ts"] + e["dur"] for e in events if e["ph"] == "X") == 21


def test_sweep_matches_the_closed_forms() -> None:
    cells = of("sweep gpipe,1f1b -p 2,4,8,16 -m 8,32")["cells"]

    assert len(cells) == 16
    for cell in cells:
        row = CATALOG[cell["schedule"]]
        p, m = cell["devices"], cell["micro_batches"]
        assert cell["bubble_fraction"] == float(row.bubble_fraction(p, m))
        assert cell["peak_activations"] == [
            row.peak_activations(p, m, d) for d in range(p)
        ]


def test_sweep_of_the_whole_catalogue() -> None:
    cells = of(f"sweep {','.join(CATALOG)} -p 2:8 -m 16")["cells"]

    assert [cell["devices"] for cell in cells[:3]] == [2, 4, 8]
    assert len(cells) == 3 * len(CATALOG)


def test_show_draws_the_grid() -> None:
    shown = call("show 1f1b -p 2 -m 3 --backward 1").stdout

    assert shown.splitlines() == [
        "1f1b(devices=2, micro_batches=3)",
        "device 0 | F0 F1 .. B0 F2 B1 .. B2",
        "device 1 | .. F0 B0 F1 B1 F2 B2 ..",
    ]


def test_show_as_json() -> None:
    shown = of("show 1f1b -p 2 -m 3 --backward 1")

    assert shown["grid"][1] == "device 1 | .. F0 B0 F1 B1 F2 B2 .."
    assert shown["schedule"] == "1f1b"


def test_the_tick_that_show_suggests_will_do() -> None:
    assert call("show gpipe -p 4 -m 9000 --tick 12").exit_code == 0
    result = call("show gpipe -p 4 -m 9000 --forward .001 --backward .002")
    tick = result.stderr.partition("--tick ")[2].partition(",")[0].split()[0]
    again = "show gpipe -p 4 -m 9000 --forward .001 --backward .002 --tick"
    assert call(f"{again} {tick}").exit_code == 0


def test_show_refuses_what_a_terminal_cannot_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeproof.cli.showing._is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")

    refused = call("show 1f1b -p 4 -m 16")

    assert refused.exit_code == 2
    assert "wider than 60 characters" in refused.stderr
    assert "less -S" in refused.stderr
    tick = refused.stderr.partition("--tick ")[2].partition(",")[0]
    again = call(f"show 1f1b -p 4 -m 16 --tick {tick}")
    assert again.exit_code == 0
    assert max(map(len, again.stdout.splitlines())) <= 60


def test_list_names_all() -> None:
    rows = of("list")["schedules"]

    assert [row["name"] for row in rows] == list(CATALOG)
    assert all(row["source"] and row["bubble"] for row in rows)
    shown = call("list").stdout
    assert all(f"  {name} " in shown for name in CATALOG)
    assert "--backward-order" in shown


def test_check_of_a_good_schedule() -> None:
    verdict = of("check 1f1b -p 2 -m 3")

    assert verdict["ok"] is True
    assert verdict["findings"] == []
    assert verdict["digest"] == catalog.make("1f1b", devices=2, micro_batches=3).digest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("+3", 3),
        ("-2", -2),
        ("1/3", Fraction(1, 3)),
        ("18.5", 18.5),
        (".6", 0.6),
        ("2.", 2.0),
        ("1e3", 1000.0),
        ("1.5E-3", 0.0015),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    assert number(text) == value
    assert type(number(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:64", (2, 4, 8, 16, 32, 64)),
        ("3:50", (3, 6, 12, 24, 48)),
        ("2:16:4", (2, 6, 10, 14)),
        ("2,4,2,8", (2, 4, 8)),
        ("1,4:8,5:7:1", (1, 4, 8, 5, 6, 7)),
        ("7:7", (7,)),
    ],
)
def test_sizes(text: str, value: tuple[int, ...]) -> None:
    assert sizes(text) == value
