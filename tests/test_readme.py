"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeproof.sched import CATALOG

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_prints_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = blocks("python")

    exec(compile(example, "README.md", "exec"), {})

    printed = capsys.readouterr().out.strip()
    assert f"It prints `{printed}`" in README
    assert len([line for line in example.splitlines() if line]) <= 13


def test_the_commands_print_what_it_shows(tmp_path: Path) -> None:
    for block in blocks("console"):
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
        for command, shown in zip(parts[::2], parts[1::2]):
            program, *arguments = command.split()
            if program == "cat":
                (tmp_path / arguments[0]).write_text(shown, encoding="utf-8")
                continue
            assert program == "pipeproof"
            done = subprocess.run(
                [sys.executable, "-m", "pipeproof.cli", *arguments],
                cwd=tmp_path,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            assert done.stderr == ""
            assert done.stdout.startswith(shown), command


def test_the_commands_that_predict_run(tmp_path: Path) -> None:
    (block,) = blocks("sh")
    for command in block.replace("\\\n", "").strip().splitlines():
        program, *arguments = command.split()
        assert program == "pipeproof"
        done = subprocess.run(
            [sys.executable, "-m", "pipeproof.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        # Full activations of the large model do not fit, and check says so.
        assert done.returncode == (arguments[0] == "check"), done.stderr
    assert (tmp_path / "grid.csv").exists()


def test_the_catalogue_is_listed_whole() -> None:
    for row in CATALOG.values():
        assert f"| `{row.name}` | {row.bubble} | {row.peak} |" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
