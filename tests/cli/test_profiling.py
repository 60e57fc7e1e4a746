"""profile, and what reads its file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.sim import read_cost

pytest.importorskip("torch")


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str) -> dict:
    done = call(f"{command} --json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    return of(f"profile 1f1b -p 2 -m 4 --rounds 1 --ranks 2 -o {path}"), path


def test_a_profile_of_two_ranks(profiled: tuple[dict, Path]) -> None:
    found, path = profiled

    assert found["predicted_peak_bytes"] == found["measured_peak_bytes"]
    assert [(link["source"], link["target"]) for link in found["links"]] == [
        (0, 1),
        (1, 0),
    ]
    for stage in found["stages"]:
        for name in ("forward", "backward", "input_grad", "weight_grad", "recompute"):
            assert stage[name] > 0
    assert found["stages"][0]["boundary_bytes"] == 4 * 64 * 4
    cost = read_cost(path).cost
    assert list(cost.forward) == [stage["forward"] for stage in found["stages"]]


def test_another_schedule_of_the_same_stages_is_predicted(
    profiled: tuple[dict, Path],
) -> None:
    found, path = profiled
    command = f"simulate gpipe -p 2 -m 4 --cost {path}"

    seconds, other = of(f"{command} --unit s"), of(f"{command} --unit us --forward 0")

    first, last = found["stages"]
    least = 4 * max(first["forward"] + first["backward"], last["backward"])
    assert seconds["makespan"] >= least
    assert seconds["peak_bytes"] is not None
    assert 0 < other["makespan"] < 1e6 * seconds["makespan"]


def test_a_run_is_written_beside_what_was_predicted(
    profiled: tuple[dict, Path], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"

    told = of(f"run gpipe -p 2 -m 4 --steps 1 --trace {path} --cost {profiled[1]}")

    predicted = of(f"simulate gpipe -p 2 -m 4 --cost {profiled[1]} --unit s")
    assert 0 < told["predicted_makespan"] >= predicted["makespan"], "of one processor"
    events = json.loads(path.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "device 0, measured",
        "device 1, measured",
        "device 0, predicted",
        "device 1, predicted",
    ]
    arrows = [e["id"] for e in events if e["ph"] == "s"]
    assert len(set(arrows)) == len(arrows) == 2 * 8
    assert sorted(arrows) == sorted(e["id"] for e in events if e["ph"] == "f")


def test_a_profile_with_steps(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"

    found = of(f"profile 1f1b -p 2 -m 4 --with-steps --rounds 1 -o {path}")

    steps = [stage["step"] for stage in found["stages"]]
    assert min(steps) > 0
    assert list(read_cost(path).cost.step) == steps
    told = call("profile 1f1b -p 2 -m 2 --with-steps --rounds 1").output
    assert "STEP, ms" in told


def test_a_profile_in_one_process() -> None:
    found = of("profile zb-h1 -p 2 -m 4 --rounds 1")

    assert len(found["predicted_peak_bytes"]) == 1
    assert "step" not in found["stages"][0]
    assert found["measured_step"] > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile 1f1b -p 2 -m 2 --rounds 0", "rounds must be at least 1, got 0"),
        ("profile 1f1b -p 2 -m 2 --ranks 3", "needs 2 ranks, one for each device"),
        ("simulate 1f1b -p 2 -m 2 --cost /none", "/none: No such file"),
    ],
)
def test_refusals(command: str, message: str) -> None:
    done = call(command)

    assert done.exit_code == 2
    assert message in done.output


def test_stages_of_another_number(profiled: tuple[dict, Path]) -> None:
    done = call(f"simulate 1f1b -p 4 -m 2 --cost {profiled[1]}")

    assert done.exit_code == 2
    assert "has 2 numbers for 4 stages" in done.output
