"""`pipeproof prove`, and what `pipeproof check` says of programs."""

import json
import shlex
from pathlib import Path

from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.sched import B, F, Schedule, catalog, lower, prove


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def test_prints_the_certificate_of_what_was_asked_for() -> None:
    schedule = catalog.make("zb-h1", devices=2, micro_batches=4)
    late = prove(lower(schedule, receives="late"))

    result = call("prove zb-h1 -p 2 -m 4 --receives late")
    assert (result.exit_code, result.stdout) == (0, f"{late}\n")
    data = json.loads(call("prove zb-h1 -p 2 -m 4 --receives late --json").stdout)
    assert {**data, **late.to_dict()} == data
    assert data["devices"] == 2


def test_messages_in_groups() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    program = lower(schedule, messages="grouped")

    proved = call("prove 1f1b -p 2 -m 4 --messages grouped")
    assert (proved.exit_code, proved.stdout) == (0, f"{prove(program)}\n")
    checked = call("check 1f1b -p 2 -m 4 --messages grouped --streams sync --json")
    assert json.loads(checked.stdout)["ok"]


def test_a_broken_schedule_is_refuted(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    broken = Schedule.of([[B(0, 0), F(0, 0)]])
    path.write_text(broken.format(), encoding="utf-8")

    result = call(f"prove {path}")
    assert result.exit_code == 1
    assert result.stdout == f"{prove(broken)}\n"
    data = json.loads(call(f"prove {path} --json").stdout)
    assert not data["ok"]
    assert data["findings"]


def test_check_judges_the_program_under_a_stream_model() -> None:
    result = call("check 1f1b -p 2 -m 4 --streams pair --buffer 2")

    assert result.exit_code == 0
    assert "without deadlock, streams 'pair', buffering 2" in result.stdout
    refused = call("check 1f1b -p 2 -m 4 --streams pair --forward 3")
    assert refused.exit_code == 2
    assert "--forward matters only to what is alive at once" in refused.output
