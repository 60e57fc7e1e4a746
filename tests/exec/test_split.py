"""I and W together are B, bit by bit, whatever the stage's graph looks like."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pipeproof.exec import Pipeline
from pipeproof.exec.split import Splitter
from pipeproof.sched import catalog

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


def test_what_is_no_longer_frozen_learns_again() -> None:
    """A leaf more, which shows at its own place in the graph only."""
    ours, theirs = ([nn.Linear(WIDTH, WIDTH) for _ in range(6)] for _ in range(2))
    pipelined, whole = nn.Sequential(*ours), nn.Sequential(*theirs)
    whole.load_state_dict(pipelined.state_dict())
    x, y = torch.randn(2, 8, WIDTH)
    schedule = catalog.make("zb-h1", devices=2, micro_batches=4)
    pipeline = Pipeline([ours[:3], ours[3:]], schedule, functional.mse_loss)
    for frozen in (None, 0, 3, None, 5, 4):
        for layers in (ours, theirs):
            for number, layer in enumerate(layers):
                layer.requires_grad_(number != frozen)
                layer.zero_grad()
        pipeline.step(x, y)
        functional.mse_loss(whole(x), y).backward()

        pairs = list(zip(pipelined.parameters(), whole.parameters()))
        assert [p.grad is None for p, _ in pairs] == [q.grad is None for _, q in pairs]
        assert all(
            torch.allclose(p.grad, q.grad) for p, q in pairs if p.grad is not None
        )


def test_tells_outputs_of_one_node_apart() -> None:
    """Whose gradient arrives may change while the graph's shape does not."""
    which = [0]
    stage = Calls(lambda w, b, x: (x @ (w * 2) + b).chunk(2, 1)[which[0]], SQUARE, ROW)
    splitter = Splitter()
    for which[0] in (0, 1, 0):
        inputs = [torch.randn(3, WIDTH)]
        whole, _, learned = gradients(stage, inputs, None)
        split, _, later = gradients(stage, inputs, splitter)

        assert same(split, whole)
        assert same(later, learned)


def steps(stages: list[nn.Module], x: Tensor, count: int = 2) -> Pipeline:
    """ZB-H1 on these, gradients added up over steps."""
    schedule = catalog.make("zb-h1", devices=len(stages), micro_batches=4)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    for _ in range(count):
        pipeline.step(x, torch.ones(8, WIDTH))
    return pipeline


def undivided(stages: list[nn.Module], x: Tensor, count: int = 2) -> None:
    """The same by `loss.backward()`."""
    for _ in range(count):
        for part in x.tensor_split(4):
            output = nn.Sequential(*stages)(part)
            (functional.mse_loss(output, torch.ones(2, WIDTH)) / 4).backward()


def learned(stages: list[nn.Module]) -> Grads:
    found: Grads = []
    for stage in stages:
        for parameter in stage.parameters():
            found.append(parameter.grad)
            parameter.grad = None
    return found


def test_a_stage_whose_input_wants_no_gradient() -> None:
    """Its first node is where the spine ends; what is above it waits for W."""
    embedding = nn.Embedding(10, WIDTH)
    last = nn.Linear(WIDTH, WIDTH)
    stage = nn.Sequential(embedding, nn.Linear(WIDTH, WIDTH), nn.Tanh(), last)
    output = stage(torch.tensor([1, 2, 2]))
    with Products() as first:
        found, rest = Splitter().input_grads([output], [torch.ones_like(output)], [])
    with Products() as second:
        rest.run()

    assert found == []
    assert first.count.total() == second.count.total() == 2

    stages = [stage, nn.Linear(WIDTH, WIDTH)]
    learned(stages)
    ids = torch.randint(10, (8,))
    steps(stages, ids)
    ours = learned(stages)
    undivided(stages, ids)
    assert same(ours, learned(stages))


def test_the_first_of_all_products_waits_too() -> None:
    """The spine ends at the layer that the batch goes into, not at its weight."""
    stage = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    output = stage(torch.randn(3, WIDTH))
    with Products() as first:
        _, rest = Splitter().input_grads([output], [torch.ones_like(output)], [])
    with Products() as second:
        rest.run()

    assert (first.count.total(), second.count.total()) == (1, 2)


class Checkpointed(nn.Module):
    """A layer that is run again in its backward; counts its runs."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant, self.runs = nn.Linear(WIDTH, WIDTH), reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        def run(value: Tensor) -> Tensor:
            self.runs += 1
            return torch.tanh(self.layer(value))

        return checkpoint(run, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_once_more(reentrant: bool) -> None:
    """Of the first micro-batch twice, perhaps: it is how they are found out."""
    inner = [Checkpointed(reentrant) for _ in range(2)]
    ends = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    stages = [nn.Sequential(end, layer) for end, layer in zip(ends, inner)]
    x = torch.randn(8, WIDTH)
    pipeline = steps(stages, x, 1)
    for layer in inner:
        layer.runs = 0
    pipeline.step(x, torch.ones(8, WIDTH))
    ours = learned(stages)
    assert [layer.runs for layer in inner] == [8, 8]

    undivided(stages, x)
    assert same(ours, learned(stages))


def test_parameters_replaced_between_steps() -> None:
    stages = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    x = torch.randn(8, WIDTH)
    pipeline = steps(stages, x)
    for stage in stages:
        stage.weight = nn.Parameter(torch.randn(SQUARE))
        stage.bias.grad = None
    pipeline.step(x, torch.ones(8, WIDTH))
    ours = learned(stages)

    undivided(stages, x, 1)
    assert same(ours, learned(stages))


class Hooked(nn.Module):
    """A hook on what a layer returns, and on its weight: each makes it half."""

    def __init__(self, layer: nn.Module, keep: bool) -> None:
        super().__init__()
        self.layer, self.keep, self.calls = layer, keep, Counter[str]()
        self.kept: list[Tensor] = []
        for name, parameter in layer.named_parameters():
            parameter.register_hook(lambda grad, name=name: self.halve(name, grad))

    def halve(self, name: str, grad: Tensor) -> Tensor:
        self.calls[name] += 1
        return grad / 2

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        hidden.register_hook(lambda grad: self.halve("hidden", grad))
        if self.keep:
            hidden.retain_grad()
            self.kept.append(hidden)
        return torch.tanh(hidden)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(WIDTH, WIDTH), lambda: nn.LayerNorm(WIDTH)]
)
def test_hooks_run_as_often_as_in_one_backward(
    layer: Callable[[], nn.Module], keep: bool
) -> None:
    stages = [Hooked(layer(), keep) for _ in range(2)]
    x = torch.randn(8, WIDTH)
    steps(stages, x)
    ours, calls = learned(stages), [stage.calls.copy() for stage in stages]
    kept = [hidden.grad for stage in stages for hidden in stage.kept]
    for stage in stages:
        stage.calls.clear()
        stage.kept.clear()
    undivided(stages, x)

    assert calls == [stage.calls for stage in stages]
    assert same(ours, learned(stages))
    assert len(kept) == (16 if keep else 0)
    assert same(kept, [hidden.grad for stage in stages for hidden in stage.kept])


def test_what_w_will_not_read_is_let_go_of() -> None:
    """The input of a gelu goes with I; that of a linear layer, with W."""
    stage = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    leaf = torch.randn(256, 64, requires_grad=True)
    hidden = stage[0](leaf)
    output = stage[2](stage[1](hidden))
    gelu = hidden.untyped_storage()
    alive = weakref.ref(gelu)
    del hidden, gelu
    assert alive() is not None
    _, rest = Splitter().input_grads([output], [torch.ones_like(output)], [leaf])

    assert alive() is None
    with pytest.raises(RuntimeError, match="let go of after I"):
        torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    rest.run()
    assert stage[0].weight.grad is not None


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
