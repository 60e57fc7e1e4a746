"""I and W together are B, bit by bit, whatever the stage's graph looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeproof.exec.split import Splitter

WIDTH = 4


class Product(torch.autograd.Function):
    """x @ w by hand; counts how often it goes backward."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        Product.backwards += 1
        x, w = ctx.saved_tensors
        return grads[0] @ w.T, x.T @ grads[0]


class Calls(nn.Module):
    """A stage written as a function of parameters and inputs."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.p = nn.ParameterList(torch.randn(*shape) for shape in shapes)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.p, *inputs)


def in_place(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    h = x @ w
    h.mul_(2)
    h += b
    h[:, :2] *= b[:2]
    return h.relu_()


SQUARE, ROW = (WIDTH, WIDTH), (WIDTH,)
STAGES: dict[str, Callable[[], nn.Module]] = {
    "a parameter used twice": lambda: Calls(
        lambda a, b, x: (x + a) + (b + a), ROW, ROW
    ),
    "a weight used twice in a row": lambda: Calls(
        lambda w, x: torch.tanh(x @ w) @ w, SQUARE
    ),
    "a branch of parameters only": lambda: Calls(
        lambda v, w, x: x @ (v * w) + (w**2).sum(), SQUARE, SQUARE
    ),
    "an output of parameters only": lambda: Calls(
        lambda w, x: (x @ w, w.exp()), SQUARE
    ),
    "chunks": lambda: Calls(
        lambda w, v, x: sum(
            c.tanh() * part for c, part in zip((x @ w).chunk(2, -1), v.chunk(2))
        ),
        SQUARE,
        ROW,
    ),
    "views": lambda: Calls(
        lambda w, b, x: x.view(-1).mul(w.t()[0, 1]).view_as(x).t()[:, :1] * w * b,
        SQUARE,
        ROW,
    ),
    "several inputs and outputs": lambda: Calls(
        lambda w, b, x, y: (x @ w + y, y * b, b * 2), SQUARE, ROW
    ),
    "an input and a parameter left out": lambda: Calls(
        lambda w, unused, x, y: x @ w, SQUARE, ROW
    ),
    "changes in place": lambda: Calls(in_place, SQUARE, ROW),
    "nothing to learn": lambda: Calls(torch.tanh),
    "the input itself": lambda: Calls(lambda x: x),
    "a custom function": lambda: Calls(
        lambda v, w, x: Product.apply(torch.relu(Product.apply(x, v)), w),
        SQUARE,
        SQUARE,
    ),
    "parametrised weights": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    ),
    "norms": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.LayerNorm(WIDTH)
    ),
    "a frozen layer": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, WIDTH).requires_grad_(False),
        nn.Linear(WIDTH, WIDTH),
    ),
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0),
    "recurrence": lambda: Calls(
        lambda v, w, x: torch.cat([h := torch.tanh(x @ v), torch.tanh(h @ w) @ w]),
        SQUARE,
        SQUARE,
    ),
}
INPUTS = {"several inputs and outputs": 2, "an input and a parameter left out": 2}

Grads = list[Tensor | None]


def gradients(
    stage: nn.Module, inputs: list[Tensor], splitter: Splitter | None
) -> tuple[Grads, Grads, Grads]:
    """Of the inputs; of the parameters after I; and after all."""
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter) / 3
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = stage(*(leaf.clone() for leaf in leaves))
    outputs = output if isinstance(output, tuple) else (output,)
    dice = torch.Generator().manual_seed(1)
    arrived = [torch.randn(o.shape, dtype=o.dtype, generator=dice) for o in outputs]
    pairs = [(o, g) for o, g in zip(outputs, arrived) if o.requires_grad]
    roots, grads = map(list, zip(*pairs))
    if splitter is None:
        torch.autograd.backward(roots, grads)
        found: Grads = [leaf.grad for leaf in leaves]
        between: Grads = []
    else:
        found, rest = splitter.input_grads(roots, grads, leaves)
        between = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
        rest.run()
    return found, between, [p.grad for p in stage.parameters()]


def same(ours: Grads, theirs: Grads) -> bool:
    return len(ours) == len(theirs) and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs)
    )


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", STAGES)
def test_both_halves_are_the_whole(name: str) -> None:
    stage, splitter = STAGES[name](), Splitter()
    for _ in range(3):  # walked once, recognised twice
        inputs = [torch.randn(3, WIDTH) for _ in range(INPUTS.get(name, 1))]
        whole, _, learned = gradients(stage, inputs, None)
        split, between, later = gradients(stage, inputs, splitter)

        assert same(split, whole)
        assert same(later, learned)
        assert all((g is not None) and (g == g.flatten()[0]).all() for g in between)


class Products(TorchDispatchMode):
    """Counts the operations that multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count[str(func)] += "mm" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STAGES)
def test_multiplies_nothing_twice(name: str) -> None:
    stage, inputs = STAGES[name](), [torch.randn(3, WIDTH)] * INPUTS.get(name, 1)
    Product.backwards = 0
    with Products() as undivided:
        gradients(stage, inputs, None)
    once, Product.backwards = Product.backwards, 0
    with Products() as divided:
        gradients(stage, inputs, Splitter())

    assert divided.count == undivided.count
    assert Product.backwards == once


def test_the_weights_wait_for_their_half() -> None:
    """Of two layers, I multiplies once each, and so does W."""
    stage = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    leaf = torch.randn(3, WIDTH, requires_grad=True)
    output = stage(leaf)
    with Products() as first:
        _, rest = Splitter().input_grads([output], [torch.ones_like(output)], [leaf])
    with Products() as second:
        rest.run()

    assert first.count.total() == second.count.total() == 2


def test_walks_a_graph_that_changed_anew() -> None:
    """One that takes another way each time, as layer drop does."""
    a, b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    ways: list[nn.Module] = [
        nn.Sequential(a, nn.Tanh()),
        nn.Sequential(a, nn.Tanh(), b),
        nn.Sequential(b, nn.Tanh(), a),
        nn.Sequential(a, nn.ReLU(), b),
        Calls(lambda x: a(x) + b(x)),
        Calls(lambda x: a(x) + a(x)),
    ]
    splitter = Splitter()
    for way in [*ways, *ways[::-1]]:
        inputs = [torch.randn(3, WIDTH)]
        whole, _, learned = gradients(way, inputs, None)
        split, _, later = gradients(way, inputs, splitter)

        assert same(split, whole)
        assert same(later, learned)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Steps of a random stage over values made so far: two inputs, three weights."""
    steps = []
    for number in range(draw(st.integers(1, 8))):
        values = st.integers(0, 4 + number)
        kind = draw(st.sampled_from(["add", "mul", "mm", "tanh", "cut"]))
        steps.append((kind, draw(values), draw(values)))
    return steps


def followed(steps: list[tuple[str, int, int]], values: list[Tensor]) -> list[Tensor]:
    values = list(values)
    for kind, i, j in steps:
        a, b = values[i], values[j]
        match kind:
            case "add":
                values.append(a + b)
            case "mul":
                values.append(a * b)
            case "mm":
                values.append(a @ b / WIDTH)
            case "tanh":
                values.append(torch.tanh(a))
            case "cut":
                values.append(torch.cat(a.chunk(2, 1)[::-1], 1))
    return values[5:]


@given(steps=programs(), others=programs(), out=st.integers(0, 7))
def test_random_graphs_split(
    steps: list[tuple[str, int, int]], others: list[tuple[str, int, int]], out: int
) -> None:
    splitter = Splitter()
    weights = [torch.randn(SQUARE) for _ in range(3)]
    for way in (steps, others, steps):
        results = []
        for split in (False, True):
            leaves = [torch.randn(SQUARE).requires_grad_() for _ in range(2)]
            torch.manual_seed(2)
            parameters = [weight.clone().requires_grad_() for weight in weights]
            for leaf in leaves:
                leaf.data = torch.randn(SQUARE)
            made = followed(way, [*leaves, *parameters])
            root = made[out % len(made)] + leaves[0] * 0.5
            given_ = torch.randn(SQUARE)
            if split:
                splitter.forget()
                inputs, rest = splitter.input_grads([root], [given_], leaves)
                rest.run()
            else:
                root.backward(given_)
                inputs = [leaf.grad for leaf in leaves]
            results.append([*inputs, *(p.grad for p in parameters)])

        assert same(*results)
