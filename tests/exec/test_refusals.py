"""What the chapter on models says: its example runs, and each refusal is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Masked, mlp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import pipeproof.exec
from pipeproof.exec import Pipeline, Whole, defer_batch_norm, trace
from pipeproof.sched import PipeproofError, Schedule, catalog

mse = functional.mse_loss
CHAPTER = (Path(pipeproof.exec.__file__).parent / "MODELS.md").read_text("utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", CHAPTER, flags=re.MULTILINE)
SENTENCES = {case: sentence for case, sentence in ROWS if case not in ("case", "---")}
X = torch.ones(6, 4, dtype=torch.float64)


def schedule(name: str = "gpipe", devices: int = 2) -> Schedule:
    return catalog.make(name, devices=devices, micro_batches=2 * devices // 2)


class Does(nn.Module):
    """What a function does, in the place of a stage."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def step(
    inputs: Any = X,
    targets: Any = X,
    *,
    stages: Any = None,
    plan: Schedule | None = None,
    loss: Any = mse,
    scale: Any = "rows",
    keywords: Any = None,
) -> None:
    plan = plan or schedule()
    stages = stages or [Masked(), Masked()]
    pipeline = Pipeline(stages, plan, loss, loss_scale=scale)
    pipeline.step(inputs, targets, keywords=keywords or {})


def in_inference_mode() -> None:
    with torch.inference_mode():
        step()


def wrapped() -> nn.Module:
    """Not made as usual, which takes processes."""
    module = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(module)
    return module


def changing_buffers() -> list[nn.Module]:
    return [nn.BatchNorm1d(4, dtype=torch.float64) for _ in range(4)]


def tied() -> list[nn.Module]:
    stages = mlp(4)
    stages[3][0].weight = stages[0][0].weight
    return stages


def with_a_bad_carry() -> list[nn.Module]:
    class Carries(nn.Module):
        takes_carry = True

        def forward(self, x: Tensor, carry: Any) -> Any:
            return x, [1]

    return [nn.Sequential(Carries(), *mlp(1)), *mlp(1)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Asks(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if x.sum() > 0 else self.a(x)


class Differs(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.dropout(self.a(x), training=self.training))


TWO_POSITIONS = X[:, None].expand(6, 2, 4)

REFUSED: dict[str, Callable[[], Any]] = {
    "no module": lambda: step(stages=[abs, *mlp(1)]),
    "empty": lambda: step(stages=[nn.Sequential(), *mlp(1)]),
    "number": lambda: step(stages=mlp(3)),
    "in place": lambda: step(stages=[Does(lambda x: x.detach().add_(1)), *mlp(1)]),
    "values": lambda: step(stages=[Does(lambda x: {x}), *mlp(1)]),
    "rows": lambda: step(X[:1], X[:1]),
    "different rows": lambda: step((X, X[:3])),
    "targets": lambda: step(X, X[:5]),
    "batch of": lambda: step((X, {1})),
    "no tensor": lambda: step([1, 2]),
    "scalar": lambda: step((X, torch.ones(()))),
    "whole": lambda: step((X, Whole(torch.ones(2, requires_grad=True)))),
    "keyword rows": lambda: step(keywords={"mask": torch.ones(7)}),
    "keyword gradient": lambda: step(keywords={"mask": X.clone().requires_grad_()}),
    "keyword unknown": lambda: step(keywords={"musk": 1}),
    "loss": lambda: step(loss=lambda y, _: y),
    "no gradient": lambda: step(loss=lambda y, _: y.detach().sum()),
    "weights": lambda: step(scale=lambda _: 0),
    "replicas": lambda: step(stages=changing_buffers(), plan=schedule("chimera", 4)),
    "tied replicas": lambda: step(stages=tied(), plan=schedule("chimera", 4)),
    "positions": lambda: step(
        TWO_POSITIONS,
        TWO_POSITIONS,
        stages=[nn.Sequential(nn.GRU(4, 4)), *mlp(1)],
        plan=catalog.make("terapipe", devices=2, micro_batches=2, slices=2),
    ),
    "carry": lambda: step(
        TWO_POSITIONS,
        TWO_POSITIONS,
        stages=with_a_bad_carry(),
        plan=catalog.make("terapipe", devices=2, micro_batches=2, slices=2),
    ),
    "batch norm": lambda: defer_batch_norm(nn.SyncBatchNorm(3)),
    "inference mode": in_inference_mode,
    "trace": lambda: trace(Asks(), ["b"]),
    "trace modes": lambda: trace(Differs(), ["b"]),
    "trace names": lambda: trace(Net(), ["d"]),
    "trace order": lambda: trace(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), ["2", "1"]
    ),
    "trace calls": lambda: trace(Net(), ["c"]),
    "wrapped": lambda: step(stages=[wrapped(), *mlp(1)]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_entry_is_refused_with_its_sentence(case: str) -> None:
    expected = ".*".join(map(re.escape, SENTENCES[case].split("…")))
    with pytest.raises(PipeproofError) as error:
        REFUSED[case]()

    said = " ".join(str(error.value).split())
    assert re.search(expected, said), said


def test_the_list_and_its_tests_are_the_same() -> None:
    assert SENTENCES.keys() == REFUSED.keys()


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", CHAPTER, flags=re.DOTALL)
    torch.manual_seed(0)

    exec(compile(example, "MODELS.md", "exec"), {"__name__": "example"})

    assert f"It prints `{capsys.readouterr().out.strip()}`" in CHAPTER
