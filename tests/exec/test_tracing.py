"""Stages from a model's own forward, and checkpoints under its own keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpointing import Checkpoint, Saved, checkpointed, saved
from jobs import digest
from models import against_reference, close, grads
from pool import Do
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import (
    BatchError,
    ModelError,
    Pipeline,
    profile_layers,
    split_at,
    trace,
)
from pipeproof.sched import POLICIES, ParameterError, catalog, partition, recompute

mse = functional.mse_loss
WIDTH = 4


class Block(nn.Module):
    """Its forward has control flow that fx could not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.dropout(self.linear(x).tanh())
        if mask is not None and bool((mask > 0).any()):
            y = y * mask[:, None]
        return y


class Net(nn.Module):
    """Nested modules, a parameter of its own, a long skip, an optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tail = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        start = self.enter(x) * self.scale
        y = start
        for block in self.blocks:
            y = y + block(y, mask)
        y = self.tail(y) * self.scale
        return {"y": y + start, "rows": x.size(0)}


def loss_of(output: Any, targets: Tensor) -> Tensor:
    return mse(output["y"], targets) * 1.0


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 9, WIDTH, dtype=torch.float64)


CUTS = ["blocks.1", "tail"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpipe", "zb-h1"])
def test_stages_by_name_have_the_gradient_of_the_model(name: str, policy: str) -> None:
    model = net()
    for block in model.blocks:
        block.dropout.p = 0.0
    twin = copy.deepcopy(model)
    twin.tail[1].eval()
    model.tail[1].eval()
    x, y = batch()
    mask = torch.arange(9.0)
    schedule = recompute(catalog.make(name, devices=3, micro_batches=3), policy)

    stages = trace(model, CUTS, keywords=["mask"])
    pipeline = Pipeline(stages, schedule, loss_of)
    loss = pipeline.step(x, y, keywords={"mask": mask})

    expected = loss_of(twin(x, mask), y)
    expected.backward()
    assert close([loss], [expected.detach()])
    assert close(grads([model]), grads([twin]))
    assert pipeline.predict(x, keywords={"mask": mask})["rows"] == [3, 3, 3]


@pytest.mark.parametrize("cuts", [["blocks.0"], ["blocks.1"], ["tail.1"]])
def test_masks_do_not_depend_on_where_the_cuts_fall(cuts: list[str]) -> None:
    found = []
    for at in (cuts, ["blocks.2"]):
        model = net()
        schedule = catalog.make("1f1b", devices=2, micro_batches=3)
        torch.manual_seed(7)
        Pipeline(trace(model, at), schedule, loss_of).step(*batch())
        found.append(grads([model]))

    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_traced_stages_equal_the_reference() -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            start = self.enter(x)
            for block in self.blocks:
                start = block(start)
            return self.tail(start)

    torch.manual_seed(0)
    stages = [nn.ModuleList(units) for units in trace(Plain(), CUTS)]
    schedule = catalog.make("1f1b", devices=3, micro_batches=4)

    against_reference(stages, schedule, *torch.randn(2, 9, WIDTH), mse)


class Fork(Net):
    """The second module needs nothing of the first, and gets None from it."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        left = self.enter(x)
        right = self.blocks[0](self.scale)
        return self.tail(left * right) + x / count


@pytest.mark.parametrize("cut", ["blocks.0", "tail.0", "tail.1"])
@pytest.mark.parametrize("name", ["gpipe", "zb-h1"])
def test_what_is_used_later_goes_there(cut: str, name: str) -> None:
    torch.manual_seed(0)
    model = Fork().double()
    model.blocks[0].dropout.p = 0.0
    schedule = catalog.make(name, devices=2, micro_batches=3)
    stages = [nn.ModuleList(units) for units in trace(model, [cut])]

    against_reference(stages, schedule, *batch(), mse)


def test_traced_skips_go_past_the_stages_between() -> None:
    """What `enter` made, and the batch's rows, are used in the last stage again."""
    schedule = catalog.make("zb-h1", devices=4, micro_batches=3)
    model = net()
    model.scale.requires_grad_(False)  # tied: summed stage by stage
    units = [unit for stage in trace(model) for unit in stage]
    stages = [nn.ModuleList(part) for part in split_at(units, [2, 1, 1, 2])]
    pipeline = Pipeline(copy.deepcopy(stages), schedule, loss_of)

    assert pipeline.schedule.skips == ((0, 3),)
    # Between them go their own outputs, and nothing else.
    assert all(not unit.gives_skips for stage in stages[1:3] for unit in stage)
    against_reference(stages, schedule, *batch(), loss_of)


def test_two_models_of_one_class_need_names() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=3)

    def both(*names: str) -> list[list[nn.Module]]:
        torch.manual_seed(0)
        models = Fork().double(), Fork().double()
        return [trace(model, name=name)[0] for model, name in zip(models, names)]

    with pytest.raises(ModelError, match=r"give the skip 'Fork\.x': give each a name"):
        Pipeline(both("", ""), schedule, mse)
    against_reference(
        [nn.ModuleList(units) for units in both("one", "two")], schedule, *batch(), mse
    )


def test_units_have_the_keys_of_the_model_and_share_its_tensors() -> None:
    model = net()
    found: dict[str, Tensor] = {}
    for units in trace(model, CUTS):
        for unit in units:
            found |= unit.state_dict(keep_vars=True)

    entries = model.state_dict(keep_vars=True)
    assert found.keys() == entries.keys()
    assert all(found[key] is entries[key] for key in entries)


def test_units_are_profiled_and_cut_anywhere() -> None:
    model = net()
    (units,) = trace(model)
    x, y = batch()
    schedule = catalog.make("1f1b", devices=3, micro_batches=3)
    assert len(units) == 6

    cuts = partition(profile_layers(units, x), schedule)
    Pipeline(split_at(units, cuts.sizes), schedule, loss_of).step(x, y)

    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_loads_into_another_partition(tmp_path: Path) -> None:
    schedule = catalog.make("1f1b", devices=3, micro_batches=3)
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = Pipeline(trace(model, CUTS), schedule, loss_of)
    pipeline.step(*batch())
    optimizer.step()

    state = pipeline.state_dict(model)
    assert list(state) == list(model.state_dict())
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)

    two = catalog.make("gpipe", devices=2, micro_batches=3)
    there = Pipeline(trace(other, ["blocks.2"]), two, loss_of)
    loaded = there.state_dict(other)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(loaded)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_ranks_save_four_ranks_and_one_process_load(
    do: Do, tmp_path: Path
) -> None:
    """Running statistics too, bit by bit, into a model of other weights."""
    path = tmp_path / "checkpoint"
    written = Checkpoint(path, tmp_path / "two", (2, 4))
    read = Checkpoint(path, tmp_path / "four", (1, 2, 1, 2), seed=1, reads=True)

    parts = do(checkpointed, written, 2)
    whole = parts[0] | parts[1]
    again = do(checkpointed, read, 4)
    model = read.model()
    assert digest(model[1].weight.detach()) != whole["1.weight"]
    state = model.state_dict()
    dcp.load(state, checkpoint_id=path, no_dist=True)

    assert whole.keys() == state.keys()
    assert sum(map(len, again)) == len(whole)
    assert {key: value for part in again for key, value in part.items()} == whole
    loaded = {key: digest(value) for key, value in model.state_dict().items()}
    assert loaded == whole
    assert model[0].num_batches_tracked == 4


def test_the_parts_of_ranks_are_the_model(do: Do) -> None:
    parts = do(saved, Saved(), 2)

    whole = {key: value for part in parts for key, value in part.items()}
    assert not parts[0].keys() & parts[1].keys()
    model = net_of_ranks()
    model.load_state_dict(whole)


def net_of_ranks() -> nn.Module:
    return Saved().model()


def test_an_optional_input_is_there_or_not_as_the_model_sees_it() -> None:
    """Traced as if always given, `if shift is not None` would have been taken."""

    class Optional(Net):
        def forward(
            self, x: Tensor, shift: Tensor | None = None, times: int = 2
        ) -> Tensor:
            x = self.enter(x)
            if shift is not None:
                x = x + shift
            return self.tail(x) * times

    torch.manual_seed(0)
    model = Optional().double().eval()
    x, _ = batch()
    shift = torch.randn(9, WIDTH, dtype=torch.float64)
    schedule = catalog.make("gpipe", devices=2, micro_batches=3)
    without = Pipeline(trace(model, ["tail"]), schedule, mse)
    given = trace(model, ["tail"], keywords=["shift", "times"])
    whole = copy.deepcopy(model).requires_grad_(False)

    assert close([without.predict(x)], [whole(x)])
    found = Pipeline(given, schedule, mse)
    keywords = {"shift": shift, "times": 5}
    assert close([found.predict(x, keywords=keywords)], [whole(x, **keywords)])
    with pytest.raises(BatchError, match="no unit takes the keyword input 'shift'"):
        without.predict(x, keywords={"shift": shift})
    with pytest.raises(BatchError, match="got no keyword input 'shift'"):
        found.predict(x, keywords={"times": 5})
    with pytest.raises(ParameterError, match="'shoft' is no optional input"):
        trace(model, ["tail"], keywords=["shoft"])


class Changes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.dropout(self.a(x), training=self.training))


class Asks(Changes):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) if y.sum() > 0 else y


class Two(Changes):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (Two, ["c"], "the model has no module 'c'"),
        (Net, ["blocks.9"], r"has no module 'blocks\.9'; did you mean 'blocks\.\d'"),
        (Two, ["unused"], "the model never calls its module 'unused'"),
        (Two, ["a"], "'a' is called first, and begins the first stage anyway"),
        (Net, ["tail", "blocks.1"], r"'blocks\.1' is called before 'tail': name mod"),
        (Changes, ["b"], "does other things in training than in eval mode, outside"),
        (Asks, ["b"], "the forward of Asks cannot be traced"),
        (lambda: nn.Tanh(), [], "Tanh calls no module: nothing can be cut"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: Any, at: list[str], message: str) -> None:
    built = model()
    built.train()

    with pytest.raises(ModelError, match=message):
        trace(built, at)

    assert all(module.training for module in built.modules())


class TakesMore(nn.Module):
    """A forward as wrappers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: Tensor, *others: Tensor, shift: Any = None, **options: Any
    ) -> Tensor:
        y = self.first(x)
        for other in others:
            y = y + other
        y = y if shift is None else y + shift
        return self.second(y) * options.get("scale", 1.0)


@pytest.mark.parametrize("keywords", [[], ["shift"]])
def test_inputs_without_names_are_none(keywords: list[str]) -> None:
    torch.manual_seed(0)
    model = TakesMore().double()
    twin = copy.deepcopy(model)
    x, y = batch()
    given = {"shift": x} if keywords else {}
    stages = trace(model, ["second"], keywords=keywords)
    plan = catalog.make("1f1b", devices=2, micro_batches=3)

    Pipeline(stages, plan, mse).step(x, y, keywords=given)

    mse(twin(x, **given), y).backward()
    assert close(grads([model]), grads([twin]))
