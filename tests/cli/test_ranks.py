"""run --ranks: a process for each device."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: sums over threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def test_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    command = "run 1f1b -p 2 -m 4 --model gpt --steps 3 --json"

    ranks = call(f"{command} --ranks 2 --trace {path}")
    alone = call(command)

    assert ranks.exit_code == alone.exit_code == 0, ranks.output
    assert json.loads(ranks.stdout)["losses"] == json.loads(alone.stdout)["losses"]
    assert json.loads(ranks.stdout)["peak_activations"] == [2, 1]
    assert json.loads(path.read_text())["otherData"]["source"] == "measured"


def test_replicas_train_on_their_parts_of_one_batch() -> None:
    command = "run 1f1b -p 2 --steps 2 --batch 32 --dtype float64 --json"

    replicas = call(f"{command} -m 4 --ranks 4 --data-parallel 2 --messages grouped")
    alone = call(f"{command} -m 8")

    assert replicas.exit_code == alone.exit_code == 0, replicas.output
    expected = pytest.approx(json.loads(alone.stdout)["losses"], rel=1e-12)
    assert json.loads(replicas.stdout)["losses"] == expected


@pytest.mark.slow
def test_torchrun_starts_the_same() -> None:
    command = "1f1b -p 2 -m 4 --steps 2 --json"
    start = "-P -m torch.distributed.run --standalone --nproc-per-node=2"

    done = subprocess.run(
        [sys.executable, *f"{start} -m pipeproof.exec {command}".split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    alone = json.loads(call(f"run {command}").stdout)
    assert json.loads(done.stdout)["losses"] == alone["losses"]


def test_a_failing_rank_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own_model.py"
    path.write_text(
        "import torch\n"
        "class Fails(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        raise ValueError('no such word')\n"
        "def make(stages, batch, dtype, seed):\n"
        "    x = torch.ones(batch, 3, dtype=dtype)\n"
        "    return [torch.nn.Linear(3, 3), Fails(3, 3)], x, x, lambda y, t: y.sum()\n"
    )

    result = call(f"run 1f1b -p 2 -m 2 --ranks 2 --model {path}:make")

    assert result.exit_code == 2
    assert "rank 1 failed in the step: StepError: the step broke off at 1F0" in (
        result.stderr
    )
    assert "rank 0 ends: rank 1 failed in the step" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 3 --data-parallel 2", "needs 4 ranks, one for each device, in each"),
        ("--ranks 2 --data-parallel 0", "data_parallel must be at least 1, got 0"),
        ("--data-parallel 2", "data_parallel needs ranks: replicas are processes"),
    ],
)
def test_replicas_that_cannot_be(options: str, message: str) -> None:
    result = call(f"run gpipe -p 2 -m 2 {options}")

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("ranks", [0, 3])
def test_one_rank_for_each_device(ranks: int) -> None:
    result = call(f"run gpipe -p 2 -m 2 --ranks {ranks}")

    assert result.exit_code == 2
    assert f"needs 2 ranks, one for each device, got {ranks}" in result.stderr
