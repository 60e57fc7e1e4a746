"""Help, exit statuses, and what is imported when."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import commands, main, options
from pipeproof.sched import POLICIES, catalog, prove
from pipeproof.sched.interop.chrome import UNITS
from pipeproof.sched.lower import POLICIES as LOWERING

COMMANDS = [
    "list",
    "show",
    "check",
    "prove",
    "simulate",
    "explain",
    "sweep",
    "run",
    "profile",
    "verify",
    "export",
]
HEAVY = ["torch", "numba", "simpy", "networkx", "rich", "numpy", "pipeproof.sched"]


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def imported_by(*args: str) -> set[str]:
    """Which of HEAVY a fresh process has imported after a command."""
    code = (
        "import sys\n"
        "from pipeproof.cli import main\n"
        f"main({list(args)!r}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))


def test_commands_in_the_order_of_use() -> None:
    assert list(main.commands) == COMMANDS  # type: ignore[attr-defined]
    shown = call("--help").output.partition("Commands:")[2]
    places = [shown.index(f"  {name} ") for name in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = call(f"{command} --help")

    assert result.exit_code == 0
    assert f"pipeproof {command}" in result.output.partition("Example:")[2]
    assert "--json" in result.output


@pytest.mark.parametrize("args", [["--help"], ["simulate", "--help"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    assert imported_by(*args) == set()


def test_simulating_does_not_load_torch() -> None:
    loaded = imported_by("simulate", "gpipe", "-p", "2", "-m", "3", "--json")

    assert "pipeproof.sched" in loaded
    assert not loaded & {"torch", "rich", "simpy"}  # the replay needs no events


def test_words_spelled_out_for_speed_are_the_original_ones() -> None:
    assert options.POLICIES == POLICIES
    assert options.LOWERING == LOWERING
    assert tuple(UNITS) == options.UNITS


def test_version() -> None:
    result = call("--version")

    assert result.exit_code == 0
    assert result.output.startswith("pipeproof, version ") or "version" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "check nope",
            "'nope' is neither a schedule of the catalogue nor a file: the catalogue "
            "has naive, gpipe",
        ),
        ("check gpipe", "gpipe needs -p and -m: for example gpipe -p 4 -m 8"),
        ("check gpipe -p 2", "gpipe needs -m"),
        ("check gpipe -p 0 -m 3", "devices must be at least 1, got 0"),
        ("check gpipe -p 2 -m -1", "micro_batches must be at least 1, got -1"),
        ("check gpipe -p two -m 1", "'two' is not a valid integer"),
        ("show GPIPE", "nor a file: did you mean 'gpipe'? The catalogue has naive"),
        ("check gpipe -p 2 -m 3 -v 2", "it has --backward-order"),
        ("check 1f1b -p 2 -m 3 -v 2", "1f1b does not take -v: it has no options"),
        ("check 1f1b -p 2 -m 3 --slices 2", "1f1b does not take --slices"),
        ("check 1f1b -p 2 -m 3 --waves 2", "1f1b does not take --waves"),
        ("check 1f1b -p 2 -m 3 --group 2", "1f1b does not take --group"),
        ("check 1f1b -p 2 -m 3 --offload 1", "1f1b does not take --offload"),
        ("check v-half -p 2 -m 3 --times 5", "times must be three finite numbers"),
        (
            "check naive -p 2 -m 3 --backward-order fifo",
            "naive does not take --backward-order",
        ),
        ("check 1f1b -p 2 -m 3 --remat often", "'often' is not one of"),
        ("check gpipe -p 100000 -m 10000", "exceed 100,000,000, the most"),
        ("simulate gpipe -p 2 -m 2 --forward x", "'--forward': expected a number"),
        ("simulate gpipe -p 2 -m 2 --forward nan", "expected a number: 3, 1.5 or 1/3"),
        ("simulate gpipe -p 2 -m 2 --forward 1/0", "'1/0' divides by 0"),
        ("simulate gpipe -p 2 -m 2 --forward -1", "forward must be a finite number"),
        ("simulate gpipe -p 2 -m 2 --forward 1,2,3", "3 numbers for 2 stages"),
        ("simulate gpipe -p 2 -m 2 --forward 1e308", "beyond the range of floating"),
        ("simulate gpipe -p 2 -m 2 --link-bandwidth 3", "a link bandwidth needs bytes"),
        ("simulate gpipe -p 2 -m 2 --link-latency -1", "link latency must be a finite"),
        ("simulate gpipe -p 2 -m 2 --weight-grad-memory 2", "from 0 to 1, got 2"),
        ("simulate gpipe -p 2 -m 2 --buffering 0", "of at least 1, got 0"),
        ("simulate gpipe -p 2 -m 2 --buffering x", "expected eager, rendezvous or"),
        ("simulate gpipe -p 2 -m 2 --trace /nonexistent/x", "/nonexistent/x: No such"),
        ("simulate gpipe -p 2 -m 2 --transfers never", "'never' is not one of"),
        ("show gpipe -p 2 -m 2 --tick 0", "tick must be above 0, got 0"),
        ("show gpipe -p 4 -m 9000", "draw a column only every 11 units of time with"),
        ("show gpipe -p 2 -m 2 --tick 1e-5", "wider than 20,000 characters"),
        ("sweep nope -p 2 -m 2", "no schedule is called 'nope'"),
        ("sweep gpipe -p 2:x -m 2", "expected sizes: 2,4,8, or 2:64 (doubling)"),
        ("sweep gpipe -p 4:2 -m 2", "4:2 must rise, from at least 1"),
        ("sweep gpipe -p 1:99999999:1 -m 2", "has more than 10,000 sizes"),
        ("sweep gpipe -p 1:200:1 -m 1:200:1", "40,000 points exceed 10,000"),
        ("sweep gpipe -p 2", "Missing option '-m'"),
        ("export gpipe -p 2 -m 2", "Missing option '--to'"),
        ("export gpipe -p 2 -m 2 --to pdf", "'pdf' is not one of"),
        ("export gpipe -p 2 -m 2 --to json --json", "give it a name with -o"),
        ("export gpipe -p 9 -m 9000 --to svg", "162,000 ops are too many for one"),
        ("frobnicate", "No such command 'frobnicate'"),
    ],
)
def test_refusals(args: str, message: str) -> None:
    result = call(args)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_unforeseen_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("pipeproof.cli.listing.show_catalogue", fail)

    assert isinstance(call("list").exception, KeyError)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (MemoryError(), 2, "Error: out of memory: fewer devices or micro-batches"),
        (PermissionError(13, "Permission denied", "x"), 2, "x: Permission denied"),
    ],
)
def test_what_befalls_a_command(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("pipeproof.cli.listing.show_catalogue", fail)
    result = call("list")

    assert result.exit_code == status
    assert said in result.stderr
    assert result.stderr.strip().count("\n") == 0


def start(*args: str, **more: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeproof.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore interrupts, and what they start does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,  # type: ignore[call-overload]
    )


def test_control_c_ends_a_long_command_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "slow.py"
    path.write_text("def f(**_):\n    print('ready', flush=True)\n    input()\n")
    model = f"--model={path}:f"
    process = start("verify", "gpipe", "-p2", "-m2", model, stdin=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err.strip()) == (130, b"", b"interrupted")


def test_control_c_ends_a_sweep_and_its_processes_in_two(tmp_path: Path) -> None:
    """A terminal sends it to all of them, and each would print where it was."""
    path = tmp_path / "kept.csv"
    sizes = ["-p2:64", "-m", ",".join(map(str, range(64, 1024)))]
    process = start(
        "sweep", "1f1b,zb-h1", *sizes, "-o", str(path), start_new_session=True
    )
    while process.poll() is None and (
        not path.exists() or path.read_text().count("\n") < 3
    ):
        pass
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert (
        err.decode().split()
        == (
            f"What was done is kept; the same command goes on with {path} interrupted"
        ).split()
    )


def test_a_reader_that_goes_away_hears_no_complaint() -> None:
    process = start("export", "gpipe", "-p", "8", "-m", "90", "--to", "chrome")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()

    assert (process.wait(timeout=60), err) == (141, b"")


def test_the_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("pipeproof")
    done = subprocess.run(
        [script, "check", "gpipe", "-p", "2", "-m", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0
    program = prove(catalog.make("gpipe", devices=2, micro_batches=2)).to_dict()
    assert done.stdout == (
        "gpipe(devices=2, micro_batches=2): complete, ordered and free of cycles\n"
        f"Its program {program['program'][:16]} is proved; `pipeproof prove` prints "
        "the certificate.\n"
    )


def test_every_command_is_a_click_command() -> None:
    assert all(isinstance(command, click.Command) for command in commands.ALL)
