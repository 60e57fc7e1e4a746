"""Schedules read from files, and everything written to them."""

import json
import os
import shlex
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main
from pipeproof.cli.output import write_file
from pipeproof.sched import Schedule, catalog
from pipeproof.sched.interop.json_form import parse_json

WRONG_ORDER = """\
devices: 2
placement: linear
micro-batches: 2

device 0 | 0F0 0F1 0B0 0B1
device 1 | 1B0 1F0 1F1 1B1
"""


def call(command: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, shlex.split(command), input=stdin)


@pytest.mark.parametrize("form", ["text", "json"])
def test_round_trip_through_a_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    made = catalog.make("1f1b", devices=4, micro_batches=6)

    assert call(f"export 1f1b -p 4 -m 6 --to {form} -o {path}").exit_code == 0
    again = call(f"export {path} --to {form}").stdout

    read = parse_json(again) if form == "json" else Schedule.parse(again)
    assert (read, read.name) == (made, "1f1b")
    assert again == path.read_text()
    by_name = json.loads(call("simulate 1f1b -p 4 -m 6 --json").stdout)
    assert json.loads(call(f"simulate {path} --json").stdout) == by_name


def test_writes_into_a_pipe_by_its_path() -> None:
    """`-o /dev/stdout` in a pipeline: what the link leads to is no path."""
    reader, writer = os.pipe()
    write_file(f"/dev/fd/{writer}", lambda file: file.write("a schedule"))
    os.close(writer)
    with open(reader) as pipe:
        assert pipe.read() == "a schedule"


@pytest.mark.parametrize("form", ["text", "json"])
def test_standard_input(form: str) -> None:
    text = call(f"export gpipe -p 2 -m 3 --to {form}").stdout

    verdict = json.loads(call("check - --json", stdin=f"\n{text}").stdout)

    assert verdict["ok"]
    assert verdict["schedule"] == "gpipe"


def test_remat_applies_to_files_too(tmp_path: Path) -> None:
    path = tmp_path / "schedule.txt"
    path.write_text(catalog.make("gpipe", devices=2, micro_batches=3).format())

    run = json.loads(call(f"simulate {path} --remat always --json").stdout)

    assert run["peak_activations"] == [1, 1]


def test_findings_exit_with_1(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(WRONG_ORDER)

    result = call(f"check {path}")
    assert result.exit_code == 1
    assert "device 1, step 0: " in result.stdout
    assert "device 1 | B0 F0 F1 B1" in result.stdout
    assert result.stderr == ""

    report = call(f"check {path} --json")
    findings = json.loads(report.stdout)["findings"]
    assert report.exit_code == 1
    assert findings[0]["op"] == "1B0"
    assert set(findings[0]) == {
        *("rule", "device", "step", "op", "expected", "found", "remedy"),
    }


@pytest.mark.parametrize("command", ["simulate", "show", "export --to svg"])
def test_what_is_wrong_is_not_simulated(command: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(WRONG_ORDER)

    result = call(f"{command} {path}")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert "device 1, step 0: " in result.stderr


def test_what_is_wrong_can_still_change_its_form(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(WRONG_ORDER)

    exported = call(f"export {path} --to json").stdout

    assert parse_json(exported) == Schedule.parse(WRONG_ORDER)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "line 1, column 1: expected"),
        (b"devices: 2", "the header says 2 devices, found 0"),
        (b'  {"a": 1}', "$: expected keys of format, version"),
        (b"name: \xff", "expected text in UTF-8, found byte 0xff at 6"),
        (b"", "the header lacks `devices"),
        (WRONG_ORDER.replace("1F1", "1Q1").encode(), "line 6, column 20: expected a"),
    ],
)
def test_unreadable_files(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    path.write_bytes(data)

    result = call(f"check {path}")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {path}: ")
    assert message in result.stderr


def test_a_file_has_its_own_sizes(tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    path.write_text(WRONG_ORDER)

    result = call(f"check {path} -p 4 --backward-order lifo")

    assert result.exit_code == 2
    assert "its own sizes: leave out -p, --backward-order, or" in result.stderr


def test_too_large_a_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)  # all holes

    result = call(f"check {path}")

    assert result.exit_code == 2
    assert "at most 67,108,864 bytes, found 67,108,865 bytes" in result.stderr


def test_a_directory_is_no_schedule(tmp_path: Path) -> None:
    result = call(f"check {tmp_path}")

    assert (result.exit_code, "Is a directory" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("form", "opening"),
    [("chrome", '{"displayTimeUnit"'), ("svg", "<svg "), ("html", "<!DOCTYPE html>")],
)
def test_exports_of_a_prediction(form: str, opening: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    command = f"export gpipe -p 2 -m 2 --to {form} --link-latency 1/2"

    about = json.loads(call(f"{command} -o {path} --json").stdout)

    assert path.read_text().startswith(opening)
    assert (about["to"], about["path"]) == (form, str(path))
    assert about["bytes"] == path.stat().st_size
    assert call(command).stdout == path.read_text()


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)

    write_file(str(link), lambda file: file.write("after"))

    assert link.is_symlink()
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    write_file(str(tmp_path / "out"), lambda file: file.write("x"))
    (tmp_path / "usual").write_text("x")

    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_file(str(path), fail)

    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert path.read_text() == "before"


def test_a_device_is_written_to_as_it_is() -> None:
    write_file(os.devnull, lambda file: file.write("x"))

    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("form", ["torch-csv", "torch-csv-comms"])
def test_torch_csv_is_a_file_as_any_other(form: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    made = catalog.make("1f1b", devices=3, micro_batches=4)

    assert call(f"export 1f1b -p 3 -m 4 --to {form} -o {path}").exit_code == 0

    assert path.read_text()[:3] == ("0F0" if form == "torch-csv" else "0UN")
    assert Schedule.parse(call(f"export {path} --to text").stdout) == made
    assert call(f"export {path} --to {form}").stdout == path.read_text()
    assert call(f"check {path}").exit_code == 0
    assert "device 2 | .. .. F0 " in call(f"show {path}").stdout
    by_name = json.loads(call("simulate 1f1b -p 3 -m 4 --json").stdout)
    from_file = json.loads(call(f"simulate {path} --json").stdout)
    assert from_file == by_name | {"schedule": "torch-csv"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a", "0F0,0F2; import os\n", "row 1, column 2: expected an action"),
        ("a", ",0F0\n", None),
        ("a.csv", "x\n", "row 1, column 1: expected an action"),
        ("a.CSV", "", "found an empty file"),
        ("a", "\n0F0,0B0\n", "row 1: expected what a rank computes"),
    ],
)
def test_torch_csv_is_told_by_its_opening_or_name(
    name: str, text: str, message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)

    result = call(f"check {path}")

    assert result.exit_code == (2 if message else 1)
    assert (message or "") in result.stderr


def test_what_torch_cannot_say_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = call(f"export gpipe -p 2 -m 2 --remat always --to torch-csv -o {out}")

    assert result.exit_code != 0
    assert "torch's CSV has no R" in result.stderr
    assert not out.exists()
