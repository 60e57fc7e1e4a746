"""A checkpoint of weights and of Adam's moments goes on anywhere, bit by bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pool import Do
from resuming import Resumed, resumed
from torch import nn
from torch.nn import functional

from pipeproof.exec import Pipeline, split_at
from pipeproof.sched import catalog

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def all_at_once(tmp_path: Path) -> dict[str, str]:
    return resumed(None, Resumed(tmp_path / "whole", tmp_path / "a", (8,), 0, 4))


@pytest.mark.parametrize("stepped", [False, True], ids=["yours", "STEPs"])
def test_two_ranks_then_one_process_or_four(
    stepped: bool, do: Do, tmp_path: Path
) -> None:
    expected = all_at_once(tmp_path)
    path = tmp_path / "half"
    do(resumed, Resumed(path, tmp_path / "b", (3, 5), 0, 2, stepped=stepped), 2)

    assert resumed(None, Resumed(path, tmp_path / "d", (8,), 2, 4)) == expected

    sizes = (1, 3, 2, 2)
    parts = do(resumed, Resumed(path, tmp_path / "f", sizes, 2, 4, stepped=stepped))
    assert {k: v for part in parts for k, v in part.items()} == expected


@pytest.mark.parametrize("stepped", [False, True], ids=["yours", "STEPs"])
def test_moments_of_what_is_tied(stepped: bool, do: Do, tmp_path: Path) -> None:
    """One entry of the checkpoint, whichever ranks hold the weight."""
    job = Resumed(tmp_path / "whole", tmp_path / "a", (3, 5), 0, 4, tied=True)
    expected = resumed(None, job)
    assert expected["0.weight"] == expected["7.weight"]
    half = replace(job, path=tmp_path / "half", last=2, stepped=stepped)
    rest = replace(half, first=2, last=4)

    do(resumed, replace(half, meeting=tmp_path / "b"), 2)
    assert resumed(None, rest) == expected
    four = replace(rest, meeting=tmp_path / "c", sizes=(1, 3, 2, 2))
    parts = do(resumed, four)
    assert {k: v for part in parts for k, v in part.items()} == expected

    resumed(None, replace(half, path=tmp_path / "one"))
    there = replace(four, path=tmp_path / "one", meeting=tmp_path / "d")
    again = do(resumed, there)
    assert {k: v for part in again for k, v in part.items()} == expected


def test_several_stages_on_a_rank(do: Do, tmp_path: Path) -> None:
    path = tmp_path / "half"
    job = Resumed(path, tmp_path / "b", (1, 3, 2, 2), 0, 2, "interleaved", stepped=True)
    do(resumed, job, 2)

    found = resumed(None, Resumed(path, tmp_path / "d", (8,), 2, 4))

    assert found == all_at_once(tmp_path)


def test_safetensors_of_each_part_are_the_models(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layers = [nn.Linear(4, 4) for _ in range(4)]
    model, other = nn.Sequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    nn.init.zeros_(other[2].weight)
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    pipeline = Pipeline(split_at(model, (1, 3)), schedule, functional.mse_loss)
    whole = pipeline.state_dict(model)

    for number, part in enumerate((list(whole)[:2], list(whole)[2:])):
        path = tmp_path / f"{number}.safetensors"
        safetensors.save_file({key: whole[key] for key in part}, path)
        other.load_state_dict(safetensors.load_file(path), strict=False)

    assert all(map(torch.equal, model.parameters(), other.parameters()))
