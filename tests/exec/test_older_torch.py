"""What older releases of torch lack: done otherwise, or refused."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import against_reference, mlp
from torch import nn
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from pipeproof.exec import ActivationMeter, Pipeline, sharded, slot, stores
from pipeproof.sched import ParameterError, catalog, recompute
from pipeproof.sched.errors import UnsupportedError


def batch() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(2, 8, 4, dtype=torch.float64))


@pytest.mark.parametrize("policy", ["never", "always"])
def test_halves_without_knowing_what_the_graph_holds(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "TELLS", False)
    plan = recompute(catalog.make("zb-h1", devices=2, micro_batches=4), policy)
    against_reference(mlp(2), plan, *batch())


def test_a_meter_says_that_it_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "TELLS", False)
    stages = mlp(2)
    plan = catalog.make("gpipe", devices=2, micro_batches=2)
    pipeline = Pipeline(stages, plan, nn.functional.mse_loss)
    with (
        pytest.raises(UnsupportedError, match="does not tell what its graph holds"),
        ActivationMeter(stages),
    ):
        pipeline.step(*batch())


def test_sharding_that_averages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Mock(spec=["set_reduce_scatter_divide_factor"])
    monkeypatch.setattr(sharded, "_roots", lambda _: [root])
    with pytest.raises(UnsupportedError, match="cannot be told to add them up"):
        sharded.Sharded(nn.Identity())


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_another_client_of_a_store(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = (
        FileStore(str(tmp_path / "store"), 1)
        if kind == "file"
        else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    )
    monkeypatch.setattr(stores, "hasattr", lambda *_: False, raising=False)
    other = stores.another(PrefixStore("default", store))
    other.set("said", "so")

    assert other is not store
    assert store.get("said") == b"so"


def test_a_store_of_which_there_is_no_other_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "hasattr", lambda *_: False, raising=False)
    with pytest.raises(ParameterError, match="ranks meet in a HashStore"):
        stores.another(HashStore())
