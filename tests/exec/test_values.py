"""What crosses between stages, and what a batch may be made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job, alone, nested, part
from keying import Keyed, keyed
from models import (
    Masked,
    Nested,
    against_reference,
    close,
    grads,
    keywords,
    loss_of,
    mlp,
    same,
    schedules,
)
from pool import Do
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import BatchError, ModelError, Pipeline, Whole, reference
from pipeproof.exec.forms import Form
from pipeproof.exec.tensors import check, handed_on, mapped
from pipeproof.sched import POLICIES, Schedule, catalog, recompute

mse = functional.mse_loss
WIDTH = 4


@settings(max_examples=25, deadline=None)
@given(data=st.data(), schedule=schedules().filter(lambda s: s.slices == 1))
def test_nested_values_cross_in_every_schedule(
    data: st.DataObject, schedule: Schedule
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    stages = [Nested() for _ in range(schedule.stages)]
    rows = data.draw(st.integers(schedule.micro_batches, 2 * schedule.micro_batches))
    inputs, targets = torch.randn(2, rows, WIDTH, dtype=torch.float64)

    against_reference(stages, schedule, inputs, targets, loss_of)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved"])
def test_nested_values_cross_between_ranks(name: str, do: Do, one_thread: None) -> None:
    """The float in it is another one for each micro-batch and step."""
    job = Job(name, 2, 4, stage=nested, shapes=((9,),) * 3, loss=loss_of)

    results = do(part, job, 2)

    expected = alone(job)
    for result in results:
        assert result.losses == expected.losses
        for stage, found in result.grads.items():
            assert found == expected.grads[stage]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.builds(torch.ones, st.tuples(st.integers(0, 3), st.integers(1, 2))),
    lambda of: (
        st.lists(of, max_size=3)
        | st.lists(of, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(), of, max_size=3)
    ),
)


@given(value=values)
def test_what_a_rank_reads_is_what_another_wrote(value: Any) -> None:
    check(value, "stage 0")
    form, found = Form.of(value)

    def plain(leaf: Any) -> Any:
        return ("tensor", leaf.shape) if isinstance(leaf, Tensor) else leaf

    read = Form.parse(form.to_text())
    assert read == form
    back = read.filled(found)
    assert mapped(plain, back) == mapped(plain, value)
    assert repr(mapped(plain, handed_on(value))) == repr(mapped(plain, value))


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: {"a": [1, {2}]}, r"stage 0 returned set at \['a'\]\[1\]: a tensor"),
        (lambda x: x.shape, "stage 0 returned Size: a tensor"),
        (lambda x: (x, torch.float32), r"stage 0 returned dtype at \[1\]"),
        (lambda x: {(1, 2): x}, "returned a dict with a key of type tuple"),
        (lambda x: iter([x]), "returned list_iterator"),
    ],
)
def test_what_cannot_cross_is_refused(make: Any, message: str) -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    pipeline = Pipeline([Returns(make), *mlp(1)], schedule, mse)
    with pytest.raises(ModelError, match=message):
        pipeline.step(*torch.randn(2, 4, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpipe", "zb-h1", "chimera"])
def test_keyword_inputs_go_to_every_unit_that_names_them(
    name: str, policy: str
) -> None:
    schedule = recompute(catalog.make(name, devices=4, micro_batches=4), policy)
    torch.manual_seed(0)
    stages = [nn.Sequential(Masked(), nn.Tanh()) for _ in range(4)]
    twin, whole = copy.deepcopy(stages), copy.deepcopy(stages)
    x, y = torch.randn(2, 9, WIDTH, dtype=torch.float64)

    Pipeline(stages, schedule, mse).step(x, y, keywords=keywords(9))
    reference(twin, schedule, mse, x, y, keywords=keywords(9))

    assert same(grads(stages), grads(twin))
    given = keywords(9) | {"table": keywords(9)["table"].value}
    for stage in whole:
        x = stage[1](stage[0](x, **given))
    mse(x, y).backward()
    assert close(grads(stages), grads(whole))


def test_keyword_inputs_of_ranks(do: Do, one_thread: None) -> None:
    """A rank that was not given one would have used its default in silence."""
    assert do(keyed, Keyed(), 2) == [keyed(False, Keyed())[n : n + 1] for n in (0, 1)]

    for said in do(keyed, Keyed(missing=1), 2):
        assert "rank 1 got no keyword input 'mask', which a unit of its stages" in said
    for said in do(keyed, Keyed(unknown=True), 2):
        assert "no unit takes the keyword input 'musk'" in said


class Asking(nn.Module):
    def forward(self, x: Any, other: Any, power: float = 1.0) -> Any:
        return x * other**power


def test_a_keyword_that_is_needed_is_asked_for() -> None:
    """Of several inputs the first alone is what goes from stage to stage."""
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    stages = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64), Asking()]
    pipeline = Pipeline(stages, schedule, mse)
    x, y = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    for call in (pipeline.step, pipeline.evaluate):
        with pytest.raises(BatchError, match=r"give keywords=\{'other': …\}"):
            call((x, y), y)
    pipeline.step(x, y, keywords={"other": y})

    stages[1].register_forward_pre_hook(
        lambda _, inputs, given: (inputs, given | {"other": 2.0}), with_kwargs=True
    )
    Pipeline(stages, schedule, mse).step(x, y)


def packed_step(**given: Any) -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    x, y = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    Pipeline([Masked(), Masked()], schedule, mse).step(x, y, keywords=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mask": torch.ones(7)},
            r"keyword input 'mask' has shape \(7,\) and the batch 6 rows: .* must be "
            r"marked Whole\(mask\)",
        ),
        (
            {"mask": torch.ones(6, requires_grad=True)},
            "keyword input 'mask' requires a gradient, which nothing would receive",
        ),
        ({"x": 1}, "no unit takes the keyword input 'x'.* found 'mask', 'power', 't"),
        (
            {"table": Whole({"bias": torch.ones(3, requires_grad=True)})},
            "table has a tensor marked Whole that requires a gradient",
        ),
    ],
)
def test_keywords_that_are_refused(given: dict[str, Any], message: str) -> None:
    """Offsets of packed sequences were cut into rows like any tensor (fault 38)."""
    with pytest.raises(BatchError, match=message):
        packed_step(**given)


def test_offsets_of_packed_sequences_reach_every_micro_batch_whole() -> None:
    seen = []

    class Packed(nn.Module):
        def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
            seen.append(cu_seqlens.tolist())
            return x

    schedule = catalog.make("gpipe", devices=1, micro_batches=3)
    stages = [nn.Sequential(Packed(), *mlp(1))]
    x, y = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 6])

    Pipeline(stages, schedule, mse).step(x, y, keywords={"cu_seqlens": Whole(offsets)})

    assert seen == [[0, 2, 6]] * 3


def test_keywords_in_slices() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor, by: Tensor, of_row: Tensor) -> Tensor:
            return self.linear(x) * by[..., None] * of_row[:, None, None]

    schedule = catalog.make("terapipe", devices=2, micro_batches=2, slices=3)
    stages = [Scaled(), Scaled()]
    twin = copy.deepcopy(stages)
    x, y = torch.randn(2, 5, 7, WIDTH, dtype=torch.float64)
    given = {"by": torch.randn(5, 7), "of_row": torch.randn(5)}

    Pipeline(stages, schedule, mse).step(x, y, keywords=given)

    mse(twin[1](twin[0](x, **given), **given), y).backward()
    assert close(grads(stages), grads(twin))
    with pytest.raises(BatchError, match="the schedule cuts 7 positions along dim"):
        Pipeline(stages, schedule, mse).step(
            x, y, keywords={**given, "by": torch.randn(5, 8)}
        )


def test_a_batch_may_be_nested_and_hold_what_is_no_tensor() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

        def forward(self, batch: dict[str, Any]) -> Tensor:
            assert batch["eps"] == 0.5
            (x, more), table = batch["x"], batch["table"]
            assert table.shape == (9,)
            return self.linear(x) * batch["eps"] + more["z"] * table.sum()

    def loss(output: Tensor, targets: dict[str, Any]) -> Tensor:
        return mse(output, targets["y"]) * targets["factor"]

    x, y, z = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    table = torch.arange(9.0)

    def batch(mark: Callable[[Tensor], Any]) -> tuple[Any, Any]:
        inputs = {"x": [x, {"z": z}], "table": mark(table), "eps": 0.5, "none": None}
        return inputs, {"y": y, "factor": 2}

    stages = [Reads(), *mlp(1)]
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    _, twin = against_reference(stages, schedule, *batch(Whole), loss)

    for stage in twin:
        stage.zero_grad()
    inputs, targets = batch(lambda tensor: tensor)
    loss(twin[1](twin[0](inputs)), targets).backward()
    assert close(grads(stages), grads(twin))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda x: (x, x[:3]), r"different rows: \[3, 6\]: mark those Whole"),
        (lambda x: (x, {1}), "inputs holds set: a batch is made of tensors"),
        (lambda x: {"a": None}, "inputs must hold a tensor, which is cut into rows"),
        (
            lambda x: (x, Whole(x.clone().requires_grad_())),
            "marked Whole that requires",
        ),
    ],
)
def test_batches_that_are_refused(inputs: Any, message: str) -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    with pytest.raises(BatchError, match=message):
        Pipeline(mlp(2), schedule, mse).step(inputs(x), x)


def test_the_gradient_of_nested_inputs() -> None:
    class Adds(nn.Module):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            return batch["a"] * batch["scale"] + batch["b"][0]

    x, y, z = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    ours = [x.clone().requires_grad_(), z.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), z.clone().requires_grad_()]
    stages = [Adds(), *mlp(1)]
    twin = copy.deepcopy(stages)
    schedule = catalog.make("gpipe", devices=2, micro_batches=3)

    Pipeline(stages, schedule, mse).step({"a": ours[0], "scale": 2, "b": [ours[1]]}, y)

    mse(twin[1](theirs[0] * 2 + theirs[1]), y).backward()
    assert close([x.grad for x in ours], [x.grad for x in theirs])
