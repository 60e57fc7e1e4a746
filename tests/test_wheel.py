"""The installed wheel works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CODE = """
import sched, sys
assert sched.scheduler, "the standard library's sched"
from pipeproof.sched import Schedule, catalog, check, lower, recompute
from pipeproof.sim import Cluster, Cost, simulate
assert simulate(catalog.make("gpipe", devices=4, micro_batches=8)).makespan == 33
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("sched", "sim", "exec", "cli"):
        assert f"pipeproof/{package}/py.typed" in names
    assert "pipeproof/sched/PROGRAM.md" in names
    assert "pipeproof/sim/CLUSTER.md" in names
    assert "pipeproof/__init__.py" not in names

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    options = {"cwd": tmp_path, "env": environment, "check": True}
    subprocess.run([python, "-c", CODE], **options)
    script = tmp_path / "venv" / "bin" / "pipeproof"
    listed = subprocess.run(
        [script, "list", "--json"], **options, capture_output=True, text=True
    )
    assert '"1f1b"' in listed.stdout
