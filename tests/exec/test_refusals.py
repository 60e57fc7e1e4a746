"""What the chapter on models says: its example runs, and each refusal is one."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from models import Counts, Masked, mlp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import pipeproof.exec
from pipeproof.exec import (
    ModelError,
    Pipeline,
    Whole,
    defer_batch_norm,
    split_at,
    split_evenly,
    trace,
)
from pipeproof.exec.homes import refuse_shared
from pipeproof.exec.losses import Loss, check_learning
from pipeproof.exec.recomputed import recompute_only
from pipeproof.exec.sharded import check_wrapped
from pipeproof.exec.stage import Stage
from pipeproof.exec.ties import _refuse_sharded
from pipeproof.sched import PipeproofError, Schedule, catalog, recompute, with_steps

mse = functional.mse_loss
CHAPTER = (Path(pipeproof.exec.__file__).parent / "MODELS.md").read_text("utf-8")


def table(text: str) -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", text, flags=re.MULTILINE)
    return {case: sentence for case, sentence in rows if case != "case"}


SENTENCES, BETWEEN_RANKS = map(table, CHAPTER.split("### Between ranks"))
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


def sgd(stages: list[nn.Module]) -> list[Any]:
    return [torch.optim.SGD(stage.parameters()) for stage in stages]


def one_for_all(stages: list[nn.Module]) -> list[Any]:
    return [torch.optim.SGD([p for s in stages for p in s.parameters()])] * 2


def stepping(
    optimizers: Callable[[list[nn.Module]], Any],
    plan: Schedule | None = None,
    stages: list[nn.Module] | None = None,
) -> Pipeline:
    stages = stages or mlp(2)
    plan = plan or with_steps(schedule())
    return Pipeline(stages, plan, mse, optimizers=optimizers(stages))


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


class Rolls(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.rand_like(grad)


def changed_since() -> None:
    stages = mlp(2)
    pipeline = Pipeline(stages, schedule(), mse)
    stages[1][0] = nn.Identity()
    pipeline.step(X, X)


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


class Calls(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class TakesNothing(Net):
    def forward(self) -> Tensor:
        return self.b(self.a.weight)


class TakesAll(Net):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.b(self.a(inputs[0]))


class Carrying(nn.Module):
    takes_carry = True

    def forward(self, x: Tensor, carry: Any) -> Any:
        return x


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.carrying = Carrying()


class Giving(nn.Module):
    """Says that it gives skips, and does not."""

    def __init__(self, names: Any) -> None:
        super().__init__()
        self.gives_skips = names

    def forward(self, x: Tensor) -> Tensor:
        return x


class Taking(nn.Module):
    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        return x + fine


def taking(said: Any) -> nn.Module:
    unit = Taking()
    unit.takes_skips = said
    return unit


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: Any) -> None:
        raise RecursionError


def sliced(inputs: Any, targets: Any = None, **given: Any) -> None:
    plan = catalog.make("terapipe", devices=2, micro_batches=2, slices=2)
    step(inputs, inputs if targets is None else targets, plan=plan, **given)


def pipeline() -> Pipeline:
    return Pipeline([Masked(), Masked()], schedule(), mse)


def copied() -> None:
    stages = [nn.Sequential(Uncopied(), *mlp(1)), *mlp(1)]
    Pipeline(stages, schedule("chimera"), mse, ["cpu", "meta"])


def tied_across_devices() -> None:
    first, second = mlp(2)
    second[0].weight = first[0].weight
    homes = {(n, n): Stage(n, s, n, X.device) for n, s in enumerate((first, second))}
    homes[1, 1].device = torch.device("meta")
    refuse_shared(homes)


def changing_what_is_offloaded() -> None:
    plan = catalog.make("gpipe", devices=1, micro_batches=1)
    text = plan.format().replace("0F0", "0F0 0OFFLOAD0 0RELOAD0")
    stage = nn.Sequential(*mlp(1), Does(lambda x: x.exp().mul_(2)))
    step(stages=[stage], plan=Schedule.parse(text))


def with_sharded(refused: Callable[[list[nn.Module]], None]) -> None:
    """Its first stage as torch shards one over processes 0 and 1, without these."""
    stages = mlp(2)
    root = Mock(parameters=lambda: [Mock(device_mesh=Mock(mesh=torch.arange(2)))])

    def roots(stage: nn.Module) -> list[Mock]:
        return [root] if stage is stages[0] else []

    with patch.object(pipeproof.exec.sharded, "_roots", roots):
        refused(stages)


def recomputed_in_part(function: Callable[[Tensor], Tensor]) -> None:
    stages = [nn.Sequential(nn.Linear(4, 4), Does(function)).double(), *mlp(1)]
    plan = recompute(schedule(), "always")
    Pipeline(stages, plan, mse, recomputed=[{1}, ()]).step(X, X)


TWO_POSITIONS = X[:, None].expand(6, 2, 4)


def saving_otherwise() -> Any:
    turn = count()
    return recomputed_in_part(lambda x: x.tanh() if next(turn) % 2 else x * x)


REFUSED: dict[str, Callable[[], Any]] = {
    "no module": lambda: step(stages=[abs, *mlp(1)]),
    "none": lambda: step(stages=[None, *mlp(1)]),
    "split_at": lambda: split_at(mlp(3), [1, 1]),
    "split_evenly": lambda: split_evenly(mlp(1), 2),
    "buffer changed late": lambda: step(
        stages=[Counts(after=1), *mlp(1)], plan=recompute(schedule(), "always")
    ),
    "in place, later": changing_what_is_offloaded,
    "in place, in part": lambda: recomputed_in_part(lambda x: x.add_(1)),
    "saves otherwise": saving_otherwise,
    "sharded, in part": lambda: recompute_only(
        {(0, 0): Mock()}, mlp(2), recompute(schedule(), "always"), [{0}, {0}], [0]
    ),
    "no batch": lambda: pipeline().step(None, None),
    "no inputs": lambda: pipeline().predict(None),
    "no targets": lambda: pipeline().evaluate(X, None),
    "slices": lambda: sliced(X[:, None]),
    "no sequence": lambda: sliced(X[:, 0]),
    "different positions": lambda: sliced(
        (TWO_POSITIONS, X[:, None].expand(6, 3, 4)), X
    ),
    "target positions": lambda: sliced(TWO_POSITIONS, X[:, None].expand(6, 3, 4)),
    "keyword positions": lambda: sliced(
        TWO_POSITIONS, keywords={"mask": torch.ones(6, 3)}
    ),
    "loss type": lambda: step(loss=lambda *_: 1.0),
    "weight": lambda: step(scale=lambda _: -1),
    "tied devices": tied_across_devices,
    "copies": copied,
    "carry returned": lambda: sliced(
        TWO_POSITIONS, stages=[nn.Sequential(Carrying(), *mlp(1)), *mlp(1)]
    ),
    "carry within": lambda: sliced(
        TWO_POSITIONS, stages=[nn.Sequential(Holding(), *mlp(1)), *mlp(1)]
    ),
    "trace first": lambda: trace(Net(), ["a"]),
    "trace nothing": lambda: trace(Calls()),
    "trace no input": lambda: trace(TakesNothing()),
    "trace args": lambda: trace(TakesAll()),
    "trace keyword": lambda: trace(Net(), keywords=["mask"]),
    "sharded, split": lambda: with_sharded(
        lambda stages: check_wrapped(stages, schedule("zb-h1"), None)
    ),
    "sharded, replicas": lambda: with_sharded(
        lambda stages: check_wrapped(stages, schedule("chimera"), None)
    ),
    "sharded elsewhere": lambda: with_sharded(
        lambda stages: check_wrapped(stages, schedule(), None)
    ),
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
    "one number": lambda: step(
        stages=changing_buffers()[:2],
        plan=catalog.make("1f1b", devices=2, micro_batches=len(X)),
    ),
    "layout": lambda: step(X.to_sparse()),
    "gradients in forward": lambda: step(
        stages=[*mlp(1), Does(lambda x: torch.autograd.grad(x.sum() * x, x)[0])],
        plan=recompute(schedule(), "always"),
    ),
    "random backward": lambda: step(
        stages=[*mlp(1), nn.Sequential(*mlp(1), Does(Rolls.apply))]
    ),
    "keyword needed": lambda: step(stages=[Taking(), *mlp(1)]),
    "changed": lambda: changed_since(),
    "shared state": lambda: step(stages=[(norm := changing_buffers()[0]), norm]),
    "replicas": lambda: step(stages=changing_buffers(), plan=schedule("chimera", 4)),
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
    "skip names": lambda: step(stages=[Giving("fine"), *mlp(1)]),
    "skip within": lambda: step(stages=[nn.ModuleDict({"a": Giving(())}), *mlp(1)]),
    "skip returned": lambda: step(stages=[Giving(("fine",)), Taking()]),
    "skip takers": lambda: step(stages=[taking(["fine"]), *mlp(1)]),
    "skip parameter": lambda: step(stages=[taking({"skip": "a"}), *mlp(1)]),
    "skip unknown": lambda: step(stages=[taking({"fine": "a"}), *mlp(1)]),
    "skip twice": lambda: step(stages=[Giving(("fine",)), Giving(("fine",))]),
    "skip back": lambda: step(stages=[Taking(), Giving(("fine",))]),
    "skip unused": lambda: step(stages=[Giving(("fine",)), *mlp(1)]),
    "skips otherwise": lambda: step(
        stages=mlp(3), plan=schedule(devices=3).with_skips([(0, 2)])
    ),
    "ties otherwise": lambda: step(
        stages=tied(), plan=schedule(devices=4).with_ties([(0, 2)])
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
    "targets missing": lambda: step(X, None),
    "targets unused": lambda: step(loss=lambda output: output.sum()),
    "weights of targets": lambda: step(
        X, None, loss=lambda output: output.sum(), scale=len
    ),
    "optimizers missing": lambda: stepping(lambda stages: None),
    "STEPs missing": lambda: stepping(sgd, schedule()),
    "optimizers": lambda: stepping(lambda stages: sgd(stages)[:1]),
    "optimizer": lambda: stepping(lambda stages: ["sgd", None]),
    "optimizer with closure": lambda: stepping(
        lambda stages: [torch.optim.LBFGS(stage.parameters()) for stage in stages]
    ),
    "optimizer lacks": lambda: stepping(lambda stages: [None, sgd(stages)[1]]),
    "optimizer of others": lambda: stepping(one_for_all),
    "tied, stepped": lambda: stepping(
        lambda stages: [*sgd(stages)[:1], torch.optim.Adam(stages[1].parameters())],
        stages=tied()[::3],
    ),
    "copying": lambda: copy.deepcopy(pipeline()),
    "norm, stepped": lambda: stepping(sgd).clip_grad_norm_(1.0),
    "scaler, stepped": lambda: stepping(sgd).step(
        X, X, scaler=torch.amp.GradScaler("cpu")
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_entry_is_refused_with_its_sentence(case: str) -> None:
    with pytest.raises(PipeproofError) as error:
        REFUSED[case]()

    assert same(SENTENCES[case], str(error.value)), str(error.value)


def test_the_list_and_its_tests_are_the_same() -> None:
    assert SENTENCES.keys() == REFUSED.keys()


IN_WORDS = {
    "_in_place": "in place",
    "changed_in_place": "in place, later",
    "no_unit_takes": "keyword unknown",
}
"""Functions that make a sentence, and the entry that has it."""


def raised() -> Iterator[tuple[str, str]]:
    """Where the executor refuses a model, a batch or a loss, and what it says."""
    for path in Path(pipeproof.exec.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("ModelError", "BatchError", "LossError")
            ):
                yield f"{path.name}:{node.lineno}", words_of(node.args[0])


def words_of(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(words)):
            return words
        case ast.JoinedStr(values=parts):
            return "".join(map(words_of, parts))
        case ast.FormattedValue():
            return "…"
        case ast.Call(func=ast.Name(id=name)):
            return SENTENCES[IN_WORDS[name]]
    raise AssertionError(f"a sentence that cannot be read: {ast.unparse(node)}")


def same(listed: str, said: str) -> bool:
    """Whether one text with gaps fits the other, the gaps of which are the same."""
    pattern = ".*".join(map(re.escape, listed.split("…")))
    return re.search(pattern, " ".join(said.split())) is not None


def test_the_list_has_every_refusal_that_there_is() -> None:
    listed = [*SENTENCES.values(), *BETWEEN_RANKS.values()]
    sites = list(raised())

    assert len(sites) > 50
    assert [
        where for where, said in sites if not any(same(s, said) for s in listed)
    ] == []


WHERE_RANKS_ARE = {
    "no stage": ("exec/test_faults.py", "was given None for it"),
    "part missing": ("faults/test_ranks.py", "and one of its stages needs them"),
    "other rows": ("faults/test_ranks.py", "and the inputs 6"),
    "accumulate": ("exec/test_updating.py", "was called with accumulate=True"),
    "keyword missing": ("exec/test_values.py", "which a unit of its stages"),
    "other shapes": ("faults/test_ranks.py", "in the step before, for a batch of"),
    "tied here": ("exec/test_faults.py", "share a parameter on another rank"),
}


TIES: dict[str, Callable[[], Any]] = {
    "loss learns": lambda: check_learning(
        Loss.of(nn.PReLU(4)), [None, *mlp(1)], [1], [1, 3]
    ),
    "tied, sharded": lambda: with_sharded(
        lambda stages: _refuse_sharded((0, 1), stages)
    ),
}


def test_what_is_refused_between_ranks_is_tested_on_ranks() -> None:
    for name, words in WHERE_RANKS_ARE.values():
        assert words in (Path(__file__).parent.parent / name).read_text("utf-8")
    assert BETWEEN_RANKS.keys() == WHERE_RANKS_ARE.keys() | TIES.keys()


@pytest.mark.parametrize("case", TIES)
def test_ties_that_ranks_refuse(case: str) -> None:
    with pytest.raises(ModelError) as error:
        TIES[case]()
    assert same(BETWEEN_RANKS[case], str(error.value))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_examples_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", CHAPTER, flags=re.DOTALL)
    names = {"__name__": "example"}  # what one makes, the next may use
    torch.manual_seed(0)

    assert len(examples) == 5
    for example in examples:
        exec(compile(example, "MODELS.md", "exec"), names)
        assert f"It prints `{capsys.readouterr().out.strip()}`" in CHAPTER
