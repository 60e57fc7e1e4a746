"""A backward in two halves: the input's gradient now, the weights' later.

Walking from a stage's outputs down its graph, some nodes lead to the stage's
input: the spine. A spine node that also leads off the spine to parameters is a
fork, and the gradient that arrives at a fork is all that its parameters need::

    output ── … ── addmm ── gelu ── addmm ── … ── input        the spine
                     │                │
                   weight           weight                      off it

I runs the spine and catches the gradient at each fork; W starts at the forks
with what was caught, and runs what hangs off the spine. Autograd computes only
what leads to the gradients asked for, so no product is formed twice. Of what the
forward saved, I lets go of what W will not read, such as the input of gelu.

A parameter's gradient is formed in I as well, and W only adds it to `.grad`,

* where it hangs off several forks: autograd sums its parts before it adds them to
  `.grad`, and floating point minds the difference;
* where it shares a branch with such a one;
* where its fork is a Python `autograd.Function`, which computes all its gradients
  at once;
* where its fork has vectors only, as a norm's has: these gradients and the
  input's are one pass over the data, and W would need two tensors to repeat it;
* where the stage runs parts of its forward again in its backward (checkpointing),
  or its first forward puts a hook on a tensor: these would run in I and in W.

I is the undivided backward, and nothing is left to W, where autograd refuses to
be asked for some gradients only (reentrant checkpointing), and where a parameter
whose gradient I would form has a hook, which adding to `.grad` would call again.

Where no input wants a gradient, the spine leads to the node that is furthest from
the outputs.

The walk is done once for a shape of graph. A later graph is recognised by the
kind and the order of creation of the nodes that the walk found; one that differs
is walked anew.

Source: zero-bubble scheduling, Qi et al. 2023, arXiv:2401.10241, needs the split;
that it follows the graph's nodes is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

Root = Tensor | GradientEdge

MOST_PLANS = 8
"""Shapes of graph that are remembered for a stage."""
LET_GO_FROM = 1 << 15
"""Bytes of a saved tensor from which on letting go of it is worth 4 µs."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of autograd in W.

    Attributes:
        catches: where in the list of caught gradients its own stand.
        leaves: whose `.grad` it adds to.
    """

    catches: tuple[int, ...]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A node by which a graph is recognised.

    Attributes:
        node: its number.
        kind: its type.
        name: None where the type tells as much.
        age: how many nodes were made between it and the first root.
    """

    node: int
    kind: Any
    name: str | None
    age: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one shape of graph needs.

    Attributes:
        steps: how to come to the nodes, which are numbered as they are found, the
            roots first: (node, which of those that it leads to).
        marks: of all nodes but leaves.
        leaves: (node, parameter) of those that take up a gradient.
        caught: (node, output) of each fork's gradients.
        calls: of W.
        early: leaves whose gradient is formed in I.
        spare: (node, attribute) of saved tensors that W does not need.
        whole: whether I is the undivided backward.
    """

    steps: tuple[tuple[int, tuple[int, ...]], ...]
    marks: tuple[Mark, ...]
    leaves: tuple[tuple[int, Tensor], ...]
    caught: tuple[tuple[int, int], ...]
    calls: tuple[Call, ...]
    early: tuple[Tensor, ...]
    spare: tuple[tuple[int, str], ...]
    whole: bool


@dataclass(slots=True)
class Rest:
    """What I leaves for W.

    Attributes:
        calls: what autograd has yet to run: from where, with what, to which leaves.
        formed: leaves whose gradients I had to form.
        gradients: these.
    """

    calls: list[tuple[list[GradientEdge], list[Tensor], tuple[Tensor, ...]]]
    formed: list[Tensor]
    gradients: list[Tensor]

    def run(self) -> None:
        """W: add the weights' gradients to `.grad`. Once: they are let go of."""
        while self.calls:
            edges, caught, leaves = self.calls.pop()
            torch.autograd.backward(edges, caught, inputs=leaves)
        formed, gradients = self.formed, self.gradients
        self.formed, self.gradients = [], []
        if formed:
            torch.autograd.backward(formed, gradients)


class Splitter:
    """Splits a stage's backwards, and remembers the shapes of its graphs.

    Args:
        modules: of the stage; one that runs within a backward is checkpointed.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._modules = modules
        self._plans: list[Plan] = []
        self._at_once = False
        self._watched = False

    def forget(self) -> None:
        """The stage has other parameters than before."""
        self._plans.clear()

    def watching(self) -> AbstractContextManager[object]:
        """To run the forward in: the first that makes a graph is searched for hooks."""
        if self._watched or not torch.is_grad_enabled():
            return _UNWATCHED
        self._watched = True
        return _HookWatch(self._has_hooks)

    def _has_hooks(self) -> None:
        self._at_once = True
        self._plans.clear()

    def input_grads(
        self, roots: Sequence[Root], gradients: Sequence[Tensor], leaves: list[Tensor]
    ) -> tuple[list[Tensor | None], Rest]:
        """I: the gradients of the stage's inputs.

        Args:
            roots: the outputs that want a gradient, or their edges in the graph.
            gradients: of these; for a scalar, one.
            leaves: the inputs that want a gradient.

        Returns:
            Their gradients, None for one that no output depends on; and W.
        """
        starts = [_node(root) for root in roots]
        for number, plan in enumerate(self._plans):
            nodes = _recognised(plan, starts)
            if nodes is not None:
                if number:
                    self._plans.insert(0, self._plans.pop(number))  # the latest first
                return _halved(plan, nodes, roots, gradients, leaves)
        plan = _walked(starts, leaves, at_once=self._at_once)
        nodes = _recognised(plan, starts)
        assert nodes is not None  # in the graph that it was made from
        with _running(self._modules) as ran:
            result = _halved(plan, nodes, roots, gradients, leaves)
        if ran and not plan.whole:
            # Whoever runs again would do so in each call of autograd.
            plan = _walked(starts, leaves, at_once=True)
        self._plans = [plan, *self._plans[: MOST_PLANS - 1]]
        return result


def _halved(
    plan: Plan,
    nodes: list[Node],
    roots: Sequence[Root],
    gradients: Sequence[Tensor],
    leaves: list[Tensor],
) -> tuple[list[Tensor | None], Rest]:
    """I by a plan, whose nodes these are; and W."""
    if plan.whole or (plan.early and any(v._backward_hooks for v in plan.early)):
        return _undivided(roots, gradients, leaves), Rest([], [], [])
    forks = [GradientEdge(nodes[node], output) for node, output in plan.caught]
    outputs: list[Any] = list(roots)  # torch takes a mixture, its types do not
    inputs: list[Any] = [*leaves, *plan.early, *forks]
    if not inputs:  # nothing in this stage learns, and none before it
        return [], Rest([], [], [])
    found = torch.autograd.grad(
        outputs,
        inputs,
        gradients,
        retain_graph=bool(forks),
        allow_unused=True,
    )
    for number, attribute in plan.spare:
        _let_go(nodes[number], attribute)
    early, forked = len(leaves), len(leaves) + len(plan.early)
    rest = Rest([], [], [])
    for call in plan.calls:
        there = [i for i in call.catches if found[forked + i] is not None]
        if there:
            starts, caught = (
                [forks[i] for i in there],
                [found[forked + i] for i in there],
            )
            rest.calls.append((starts, caught, call.leaves))
    for leaf, gradient in zip(plan.early, found[early:forked]):
        if gradient is not None:
            rest.formed.append(leaf)
            rest.gradients.append(gradient)
    return list(found[:early]), rest


def _undivided(
    roots: Sequence[Root], gradients: Sequence[Tensor], leaves: list[Tensor]
) -> list[Tensor | None]:
    """B; the leaves are left without a `.grad`."""
    outputs: list[Any] = list(roots)
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(outputs, gradients)
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


_UNWATCHED = nullcontext()


class _HookWatch(TorchFunctionMode):
    """Tells of hooks that are put on tensors within a graph meanwhile."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        hooks = func in (Tensor.register_hook, Tensor.retain_grad)
        if hooks and not args[0].is_leaf:
            self._tell()
        return func(*args, **(kwargs or {}))


@contextmanager
def _running(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collect the modules whose forward is called meanwhile."""
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in modules]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _saved(node: Node, attribute: str) -> Sequence[Any]:
    """What a node has saved under a name: torch's SavedTensor objects."""
    saved = getattr(node, attribute)
    return saved if isinstance(saved, (tuple, list)) else (saved,)


def _let_go(node: Node, attribute: str) -> None:
    """Let go of saved tensors, but for those that have hooks of their own.

    Autograd asks a saved tensor's hooks what to keep, and is told: nothing.
    """
    for saved in _saved(node, attribute):
        if saved.unpack_hook is None and saved.data is not None:
            saved.register_hooks(_nothing, _missing)


def _nothing(_: Tensor) -> None:
    return None


def _missing(_: None) -> NoReturn:
    raise RuntimeError(
        "a tensor saved for the backward was let go of after I, which W should not "
        "have needed: the graph has changed since I"
    )


def _large(node: Node, kept: set[int]) -> Iterator[str]:
    """Where a node saves what is worth letting go of; what is at `kept` lives on."""
    for attribute in dir(node):
        if attribute.startswith("_raw_saved_"):
            for saved in _saved(node, attribute):
                tensor = saved.data if saved.unpack_hook is None else None
                if (
                    isinstance(tensor, Tensor)
                    and tensor.nbytes >= LET_GO_FROM
                    and tensor.untyped_storage().data_ptr() not in kept
                ):
                    yield attribute
                    break


def _node(root: Root) -> Node:
    if isinstance(root, GradientEdge):
        return root.node
    return root.grad_fn or get_gradient_edge(root).node


def _variable(node: Node | None) -> Tensor | None:
    """What a node adds gradients up in, if that is all it does."""
    found: Tensor | None = node.variable if type(node) is _ACCUMULATES else None  # type: ignore[attr-defined]
    return found


_ACCUMULATES = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
_REENTRANT = CheckpointFunction._backward_cls


def _recognised(plan: Plan, roots: list[Node]) -> list[Node] | None:
    """The plan's nodes in another graph; None if that has another shape."""
    nodes: list[Any] = list(roots)
    try:
        for number, children in plan.steps:
            below = nodes[number].next_functions
            for child in children:
                nodes.append(below[child][0])
    except (IndexError, AttributeError):  # a node that leads to fewer, or to none
        return None
    newest = roots[0]._sequence_nr()
    for mark in plan.marks:
        node: Any = nodes[mark.node]
        if (
            type(node) is not mark.kind
            or newest - node._sequence_nr() != mark.age
            or (mark.name is not None and node.name() != mark.name)
        ):
            return None
    for number, leaf in plan.leaves:
        if _variable(nodes[number]) is not leaf:
            return None
    return nodes


def _walked(roots: list[Node], inputs: list[Tensor], *, at_once: bool) -> Plan:
    graph = _Graph(roots)
    ends = {get_gradient_edge(leaf).node for leaf in inputs}
    spine = graph.leading_to(ends or graph.furthest())
    branches = {node: graph.branches(node, spine, ends) for node in graph.order}
    early = _early(branches, at_once)
    late = {
        fork: kept
        for fork, hanging in branches.items()
        if (
            kept := [leaf for branch in hanging for leaf in branch if leaf not in early]
        )
    }
    leaves = {n: leaf for n in graph.order if (leaf := _variable(n)) is not None}
    # All outputs of a fork, for another graph of this shape may use others.
    caught = [(fork, i) for fork in late for i in range(len(fork._input_metadata))]
    inner = [node for node in graph.order if node in spine and node not in ends]
    needed = {n for fork in late for n in graph.off(fork, spine)} | late.keys()
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    spare = [
        (node, attribute)
        for node in graph.order
        if late and node not in needed
        for attribute in _large(node, addresses)
    ]
    place, steps = graph.paths(
        [*late, *inner[-1:], *leaves, *(node for node, _ in spare)]
    )
    calls = []
    for level in graph.levels(list(late)):
        members = [i for i, (fork, _) in enumerate(caught) if fork in level]
        below = [leaves[leaf] for fork in level for leaf in late[fork]]
        calls.append(Call(tuple(members), tuple(below)))
    return Plan(
        steps=tuple(steps),
        marks=tuple(
            _mark(number, node, roots[0])
            for node, number in place.items()
            if node not in leaves
        ),
        leaves=tuple((place[n], leaf) for n, leaf in leaves.items() if n not in ends),
        caught=tuple((place[fork], output) for fork, output in caught),
        calls=tuple(calls),
        early=tuple(leaves[leaf] for leaf in early),
        spare=tuple((place[node], attribute) for node, attribute in spare),
        whole=any(isinstance(node, _REENTRANT) for node in graph.order),
    )


def _in_python(node: object) -> bool:
    return isinstance(node, BackwardCFunction)


def _mark(number: int, node: Node, root: Node) -> Mark:
    name = node.name()
    same = type(node).__name__ == name
    age = root._sequence_nr() - node._sequence_nr()
    return Mark(number, type(node), None if same else name, age)


def _early(
    branches: dict[Node, list[dict[Node, None]]], at_once: bool
) -> dict[Node, None]:
    """The leaves whose gradient is formed in I."""
    forks: dict[Node, set[Node]] = {}
    early: dict[Node, None] = {}
    for fork, hanging in branches.items():
        in_one = at_once or _in_python(fork) or _cheap(hanging)
        for branch in hanging:
            for leaf in branch:
                forks.setdefault(leaf, set()).add(fork)
                if in_one or len(forks[leaf]) > 1:
                    early[leaf] = None
    several = [branch for hanging in branches.values() for branch in hanging]
    settled = -1
    while settled != len(early):  # what shares a branch with one is one
        settled = len(early)
        for branch in several:
            if not early.keys().isdisjoint(branch):
                early |= branch
    return early


def _cheap(branches: list[dict[Node, None]]) -> bool:
    """Whether a fork has vectors only, without hooks."""
    leaves = [_variable(leaf) for branch in branches for leaf in branch]
    return all(v is not None and v.dim() < 2 and not v._backward_hooks for v in leaves)


class _Graph:
    """The nodes below some roots, each after all that lead to it.

    Attributes:
        order: the nodes.
    """

    def __init__(self, roots: list[Node]) -> None:
        self._roots = roots
        self.below: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        after: list[Node] = []
        waiting: list[tuple[Node, bool]] = [(root, False) for root in roots]
        while waiting:
            node, done = waiting.pop()
            if done:
                after.append(node)
            elif node not in self.below:
                self.below[node] = node.next_functions
                waiting.append((node, True))
                waiting += [
                    (child, False)
                    for child, _ in self.below[node]
                    if child is not None and child not in self.below
                ]
        self.order = after[::-1]
        self._off: dict[Node, dict[Node, None]] = {}

    def leading_to(self, targets: set[Node]) -> set[Node]:
        """The nodes from which one of these can be reached, and they themselves."""
        result = set(targets)
        for node in reversed(self.order):
            if any(child in result for child, _ in self.below[node]):
                result.add(node)
        return result

    def furthest(self) -> set[Node]:
        """The node with the longest way from the roots that is not a leaf.

        One that leads nowhere with an edge has an input that wants no gradient,
        and is better than the transposed weight below it.
        """
        inner = [node for node in self.order if _variable(node) is None]
        distance = dict.fromkeys(self.order, 0)
        for node in self.order:
            for child, _ in self.below[node]:
                if child is not None:
                    distance[child] = max(distance[child], distance[node] + 1)

        def rank(node: Node) -> tuple[int, bool]:
            took_input = any(child is None for child, _ in self.below[node])
            return distance[node] + took_input, took_input

        return {max(inner, key=rank)} if inner else set()

    def branches(
        self, node: Node, spine: set[Node], inputs: set[Node]
    ) -> list[dict[Node, None]]:
        """What hangs off a spine node, each branch as its leaves."""
        if node in inputs:
            return []
        if node in spine:
            below = [n for n, _ in self.below[node] if n is not None and n not in spine]
        else:
            below = [node] if node in self._roots else []
        return [found for child in below if (found := self._under(child))]

    def _under(self, node: Node) -> dict[Node, None]:
        """The leaves below a node off the spine, itself if it is one."""
        if node not in self._off:
            found: dict[Node, None] = {}
            if _variable(node) is not None:
                found[node] = None
            for child, _ in self.below[node]:
                if child is not None:
                    found |= self._under(child)
            self._off[node] = found
        return self._off[node]

    def off(self, fork: Node, spine: set[Node]) -> Iterator[Node]:
        """The nodes below a fork that are off the spine, and itself if it is."""
        waiting, seen = [fork], {fork}
        while waiting:
            node = waiting.pop()
            if node not in spine:
                yield node
            for child, _ in self.below[node]:
                if child is not None and child not in spine and child not in seen:
                    seen.add(child)
                    waiting.append(child)

    def paths(
        self, targets: list[Node]
    ) -> tuple[dict[Node, int], list[tuple[int, tuple[int, ...]]]]:
        """The number of each node on the ways to these, and the steps to them."""
        parent: dict[Node, Node] = {}
        for node in self.order:
            for child, _ in self.below[node]:
                if child is not None:
                    parent.setdefault(child, node)
        wanted = dict.fromkeys(self._roots)
        for target in targets:
            node = target
            while node not in wanted:
                wanted[node] = None
                node = parent[node]
        place = {root: i for i, root in reversed(list(enumerate(self._roots)))}
        count = len(self._roots)
        steps: list[tuple[int, tuple[int, ...]]] = []
        for node in self.order:
            children: list[int] = []
            for number, (child, _) in enumerate(self.below[node]):
                if child in wanted and child not in place and parent[child] is node:
                    place[child] = count + len(children)
                    children.append(number)
            if children:
                steps.append((place[node], tuple(children)))
                count += len(children)
        return place, steps

    def levels(self, forks: list[Node]) -> list[set[Node]]:
        """Forks none of which is below another, together."""
        chosen = set(forks)
        depth: dict[Node, int] = {}
        result: dict[int, set[Node]] = {}
        for node in reversed(self.order):
            children = (child for child, _ in self.below[node])
            under = (depth.get(child, 0) for child in children if child is not None)
            depth[node] = max(under, default=0)
            if node in chosen:
                result.setdefault(depth[node], set()).add(node)
                depth[node] += 1
        return [result[level] for level in sorted(result, reverse=True)]
