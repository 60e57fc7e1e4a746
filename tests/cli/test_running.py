"""run and verify."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main

torch = pytest.importorskip("torch")

OWN = """
import torch

def plain(stages, batch, dtype, seed):
    torch.manual_seed(seed)
    model = [torch.nn.Linear(3, 3, dtype=dtype) for _ in range(stages)]
    inputs = torch.randn(batch, 3, dtype=dtype)
    return model, inputs, inputs.sin(), torch.nn.functional.mse_loss

def with_units(**sizes):
    stages, *rest = plain(**sizes)
    return [[stage, torch.nn.Tanh()] for stage in stages], *rest

def normed(**sizes):
    stages, *rest = plain(**sizes)
    norm = torch.nn.BatchNorm1d(3, dtype=sizes["dtype"])
    return [torch.nn.Sequential(stages[0], norm), *stages[1:]], *rest

def sums(**sizes):
    "A loss that is no mean over rows: only the full batch tells."
    stages, inputs, targets, _ = plain(**sizes)
    return stages, inputs, targets, lambda y, t: (y - t).square().sum()

def fails(**sizes):
    raise RuntimeError("no data today")

def nothing(**sizes):
    return None

number = 3
"""


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str, status: int = 0) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own_model.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b"])
@pytest.mark.parametrize("remat", ["never", "adaptive"])
def test_verify_an_mlp(schedule: str, remat: str) -> None:
    verdict = of(f"verify {schedule} -p 3 -m 4 --batch 10 --remat {remat}")

    assert verdict["ok"]
    assert verdict["loss_equal"]
    assert verdict["full_batch_compared"]
    assert [stage["stage"] for stage in verdict["verdicts"]] == [0, 1, 2]
    for stage in verdict["verdicts"]:
        assert stage["bitwise_equal"]
        assert stage["largest_difference"] == 0
        assert stage["full_batch_relative"] < 1e-12


def test_verify_a_model_with_dropout_says_what_it_did_not_compare() -> None:
    result = call("verify 1f1b -p 2 -m 2 --batch 4 --model gpt --remat always")

    assert result.exit_code == 0
    assert "Compared bit for bit with a plain loop over the micro" in result.stdout
    assert "Not compared with one step over the whole batch: the model is random" in (
        result.stdout
    )


def test_verify_in_single_precision() -> None:
    verdict = of("verify gpipe -p 2 -m 2 --dtype float32")

    assert verdict["ok"]
    assert verdict["full_batch_obstacle"] == "1e-12 needs float64, this is float32"


@pytest.mark.parametrize("function", ["plain", "with_units"])
def test_verify_a_model_of_ones_own(function: str, own: Path) -> None:
    result = call(f"verify 1f1b -p 2 -m 3 --model {own}:{function}")

    assert result.exit_code == 0
    assert "within 1e-12 of each stage's largest gradient" in result.stdout


def test_batch_statistics_are_not_compared_with_the_full_batch(own: Path) -> None:
    verdict = of(f"verify gpipe -p 2 -m 2 --model {own}:normed")

    assert verdict["full_batch_obstacle"].startswith("stage 0 has BatchNorm1d")


def test_verify_exits_with_1_where_gradients_differ(own: Path) -> None:
    result = call(f"verify gpipe -p 2 -m 2 --model {own}:sums")

    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "One step over the whole batch differs by more than 1e-12" in result.stdout


def test_a_module_by_its_dotted_name(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)

    assert call("verify gpipe -p 2 -m 2 --model own_model:plain").exit_code == 0
    assert sys.path[0] != str(own.parent)
    monkeypatch.delitem(sys.modules, "own_model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet", "model must be one of mlp, gpt, or MODULE:FUNCTION, got 'resnet'"),
        ("{own}:absent", "has no function 'absent'"),
        ("{own}:number", "has no function 'number'"),
        ("{own}:fails", "RuntimeError: no data today ("),
        ("{own}:nothing", "must return stages, inputs, targets, loss_fn, returned No"),
        ("absent_module:f", "ModuleNotFoundError: No module named 'absent_module'"),
        ("{own}.py:f", "FileNotFoundError"),
    ],
)
def test_models_that_do_not_work(model: str, message: str, own: Path) -> None:
    result = call(f"verify gpipe -p 2 -m 2 --model {model.format(own=own)}")

    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_run_trains_and_measures(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    run = of(f"run 1f1b -p 2 -m 4 --steps 4 --lr 0.5 --trace {path}")

    assert len(run["losses"]) == len(run["step_seconds"]) == 4
    assert run["losses"][-1] < run["losses"][0]
    assert run["peak_activations"] == [2, 1]
    assert run["proved"] is True
    assert 0 < run["makespan"] < run["step_seconds"][-1]
    assert json.loads(path.read_text())["otherData"]["source"] == "measured"


def test_run_says_what_it_does() -> None:
    shown = call("run gpipe -p 2 -m 2 --steps 2 --batch 5").stdout

    assert "step 2/2: loss 0." in shown
    assert "median step time: " in shown
    assert " is proved; `pipeproof prove` prints the certificate." in shown
    assert " bubble_fraction " in shown
    assert "measured" in shown


def test_messages_can_be_posted_in_groups() -> None:
    """Then the program is another one, and the losses are the same."""
    runs = [
        call(f"run 1f1b -p 2 -m 4 --steps 1 --messages {messages}").stdout
        for messages in ("single", "grouped")
    ]
    single, grouped = (
        {"loss": re.search("loss ([0-9.]+)", r), "id": re.search("program (\\w+)", r)}
        for r in runs
    )

    assert single["loss"][1] == grouped["loss"][1]
    assert single["id"][1] != grouped["id"][1]


def test_the_seed_decides() -> None:
    runs = [of(f"run gpipe -p 2 -m 2 --steps 2 --seed {s}")["losses"] for s in "112"]

    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--batch 1", "inputs has 1 rows for 2 micro-batches"),
        ("--batch 0", "batch must be at least 1, got 0"),
        ("--device warp:9", "device 'warp:9' cannot be used"),
        ("--device cpu,cpu,cpu", "devices"),
    ],
)
def test_refusals(args: str, message: str) -> None:
    for command in ("run", "verify"):
        result = call(f"{command} gpipe -p 2 -m 2 {args}")
        assert result.exit_code == 2
        assert message in result.stderr


def test_run_needs_steps_and_a_rate() -> None:
    for args in ("--steps 0", "--lr -1", "--lr nan"):
        result = call(f"run gpipe -p 2 -m 2 {args}")
        assert result.exit_code == 2
        assert "must be" in result.stderr


def test_a_loss_that_leaves_the_numbers_is_null(own: Path) -> None:
    run = of(f"run gpipe -p 2 -m 2 --steps 8 --lr 1e30 --model {own}:plain")

    assert run["losses"][-1] is None


@pytest.mark.parametrize("command", ["run", "verify"])
def test_without_torch(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    result = call(f"{command} gpipe -p 2 -m 2")

    assert result.exit_code == 2
    assert result.stderr == (
        "Error: running a schedule needs torch: pip install 'pipeproof[exec]'\n"
    )


def test_steps_in_the_schedule_train_as_those_behind_it() -> None:
    plain = of("run 1f1b -p 2 -m 3 --steps 3")
    stepped = of("run 1f1b -p 2 -m 3 --steps 3 --with-steps")

    assert stepped["losses"] == plain["losses"]
    assert len(set(plain["losses"])) == 3
    assert stepped["ops"] == plain["ops"] + 2


@pytest.mark.parametrize("command", ["verify", "profile"])
def test_gradients_are_left_where_they_are_looked_at(command: str) -> None:
    found = of(f"{command} 1f1b -p 2 -m 3 --with-steps")

    assert found.get("ok", True)


def test_steps_are_drawn_and_proved() -> None:
    shown = call("show 1f1b -p 2 -m 1 --with-steps --step 2")
    assert shown.stdout.splitlines()[1:] == [
        "device 0 | F0   .... .... .... B0   ---- STEP ----",
        "device 1 | .... F0   B0   ---- STEP ---- .... ....",
    ]
    proved = call("prove zb-v -p 2 -m 4 --with-steps")
    assert "and each STEP updates by it" in proved.stdout
