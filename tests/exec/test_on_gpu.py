"""What is to run on a GPU, on a tiny model and the host."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pipeproof.exec import StepError

pytestmark = pytest.mark.usefixtures("one_thread")
PATH = Path(__file__).parents[2] / "experiments" / "executor" / "on_gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["on_gpu"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, PATH], capture_output=True, text=True)

    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr


def test_gradients_of_the_loop(script: ModuleType) -> None:
    _, *rows = script.same(script.Here("cpu", True))

    assert [row[3] for row in rows] == ["equal bit by bit"] * 3


def test_peaks_by_policy(script: ModuleType) -> None:
    """What is small I lets go of later than is predicted, and here all is small."""
    head, *rows = script.memory(script.Here("cpu", True))

    assert len(rows) == 12
    for row in rows:
        found = dict(zip(head, row))
        limit = 10 if row[0] == "zb-h1" else 2
        assert abs(float(found["off"].rstrip("%"))) < limit
        assert float(found["all live bytes, MB"]) > float(found["counted, MB"])


def test_steps_on_other_streams(script: ModuleType) -> None:
    _, *rows = script.streams(script.Here("cpu", True))

    assert all(float(seconds) > 0 for _, seconds, *_ in rows)


@pytest.mark.slow
def test_more_blocks_fit_with_recomputation(script: ModuleType) -> None:
    _, *rows = script.largest_that_fits(script.Here("cpu", True))

    at_once, _, again, one_by_one = (int(row[3]) for row in rows)
    assert at_once < again
    assert at_once < one_by_one


def test_what_does_not_fit(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step says where it broke off, and chains that there was no room."""
    cause: Exception = torch.OutOfMemoryError("2 GiB")

    def train(*_: object) -> None:
        raise StepError("the step broke off") from cause

    monkeypatch.setattr(script, "_train", train)
    given = script.Here("cpu", True), script.TINY, script.WAYS[0], 1, 100
    assert script._fits(*given) is None
    cause = ValueError("not that")
    with pytest.raises(StepError):
        script._fits(*given)


def test_a_section_that_takes_too_long(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.SECTIONS, "same", (*script.SECTIONS["same"][:2], 0.01))
    arguments = script.argparse.Namespace(device="cpu", small=True)

    text, well = script.in_process("same", arguments)

    assert not well
    assert "It took more than its 0.01 s, and was ended." in text
