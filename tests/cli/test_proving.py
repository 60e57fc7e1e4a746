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


SENT_AND_RECEIVED = """\
0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1
1RECV_F0,1F0,1RECV_F1,1F1,1B0,1SEND_B0,1B1,1SEND_B1
"""


def test_a_csv_with_communication_is_judged_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "lowered.csv"
    path.write_text(SENT_AND_RECEIVED)
    crossed = tmp_path / "crossed"
    crossed.write_text(
        SENT_AND_RECEIVED.replace("1RECV_F0,1F0,1RECV_F1", "1RECV_F1,1RECV_F0,1F0")
    )

    right, wrong = call(f"prove {path}"), call(f"prove {crossed} --json")
    assert right.exit_code == 0
    assert "proved: the gradient is that of unpipelined" in right.stdout
    assert wrong.exit_code == 1
    (finding,) = json.loads(wrong.stdout)["findings"]
    assert finding["found"] == (
        "activation 0→1:1 is received where activation 0→1:0 was sent"
    )
    for option in ("--receives late", "--remat always"):
        refused = call(f"prove {path} {option}")
        assert refused.exit_code == 2
        assert "communication" in refused.stderr


def test_a_csv_without_communication_is_lowered(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text(call("export 1f1b -p 2 -m 3 --to torch-csv").stdout)
    by_name = prove(catalog.make("1f1b", devices=2, micro_batches=3)).to_dict()

    found = json.loads(call(f"prove {path} --json").stdout)
    assert found["program"] == by_name["program"]


def test_check_says_whether_the_program_is_proved() -> None:
    small = call("check zb-h1 -p 2 -m 4").stdout.splitlines()
    large = call("check gpipe -p 64 -m 128").stdout.splitlines()
    digest = prove(catalog.make("zb-h1", devices=2, micro_batches=4)).to_dict()

    assert small[1].startswith(f"Its program {digest['program'][:16]} is proved; ")
    assert large[1].startswith("Its program is not proved: 16,384 ops are more than")
    proved = {
        source: json.loads(call(f"check {source} --json").stdout)["proved"]
        for source in ("1f1b -p 2 -m 2", "gpipe -p 64 -m 128")
    }
    assert list(proved.values()) == [True, None]
