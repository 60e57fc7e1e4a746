"""What a backward in two halves needs, for one shape of a stage's graph.

The walk is done once for a shape of graph. A later graph is recognised by what leads
where in it, by the kind and the order of creation of its nodes, and by its leaves: all
of them, for a layer that is left out or no longer frozen may show in one place only.
One that differs is walked anew. `split.py` says what is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from pipeproof.exec.graph import Graph, Steps, variable_of
from pipeproof.exec.slot import tensor_of

LET_GO_FROM = 1 << 15
"""Bytes of a saved tensor from which on letting go of it is worth 4 µs."""
_REENTRANT = CheckpointFunction._backward_cls


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
        roots: how many.
        steps: what leads where; nodes are numbered as they are found, the roots first.
        marks: of all nodes but leaves.
        leaves: (node, parameter) of those that take up a gradient.
        ends: leaves that are inputs.
        caught: (node, output) of each fork's gradients.
        calls: of W.
        early: leaves whose gradient is formed in I.
        spare: (node, attribute) of saved tensors that W does not need.
        whole: whether I is the undivided backward.
    """

    roots: int
    steps: Steps
    marks: tuple[Mark, ...]
    leaves: tuple[tuple[int, Tensor], ...]
    ends: tuple[int, ...]
    caught: tuple[tuple[int, int], ...]
    calls: tuple[Call, ...]
    early: tuple[Tensor, ...]
    spare: tuple[tuple[int, str], ...]
    whole: bool


def recognised(
    plan: Plan, roots: list[Node], inputs: list[Tensor]
) -> list[Node] | None:
    """The plan's nodes in another graph; None if that has another shape.

    Args:
        plan: of a graph.
        roots: of another.
        inputs: its leaves whose gradients I is for.
    """
    if len(roots) != plan.roots:
        return None
    nodes: list[Any] = list(roots)
    for number, children in plan.steps:
        below = nodes[number].next_functions
        if len(below) != len(children):
            return None
        for (node, _), child in zip(below, children):
            if (node is None) != (child < 0):
                return None
            if child == len(nodes):
                nodes.append(node)
            elif child >= 0 and nodes[child] is not node:
                return None
    newest = roots[0]._sequence_nr()
    for mark in plan.marks:
        node = nodes[mark.node]
        if (
            type(node) is not mark.kind
            or newest - node._sequence_nr() != mark.age
            or (mark.name is not None and node.name() != mark.name)
        ):
            return None
    for number, leaf in plan.leaves:
        if variable_of(nodes[number]) is not leaf:
            return None
    known = set(map(id, inputs))
    if any(id(variable_of(nodes[number])) not in known for number in plan.ends):
        return None
    return nodes


def walked(roots: list[Node], inputs: list[Tensor], *, at_once: bool) -> Plan:
    """The plan for a graph.

    Args:
        roots: where the backward starts.
        inputs: leaves whose gradients I is for.
        at_once: whether I forms the parameters' gradients too.
    """
    graph = Graph(roots)
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
    leaves = {n: leaf for n in graph.order if (leaf := variable_of(n)) is not None}
    # All outputs of a fork, for another graph of this shape may use others.
    caught = [(fork, i) for fork in late for i in range(len(fork._input_metadata))]
    needed = {n for fork in late for n in graph.off(fork, spine)} | late.keys()
    addresses = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    spare = [
        (node, attribute)
        for node in graph.order
        if late and node not in needed
        for attribute in _large(node, addresses)
    ]
    place, steps = graph.numbered()
    found = [(i, node) for node, i in place.items() if i >= len(roots)]
    calls = []
    for level in graph.levels(list(late)):
        members = [i for i, (fork, _) in enumerate(caught) if fork in level]
        below = [leaves[leaf] for fork in level for leaf in late[fork]]
        calls.append(Call(tuple(members), tuple(below)))
    return Plan(
        roots=len(roots),
        steps=steps,
        marks=tuple(
            _mark(number, node, roots[0])
            for number, node in [*enumerate(roots), *found]
            if node not in leaves
        ),
        leaves=tuple((place[n], leaf) for n, leaf in leaves.items() if n not in ends),
        ends=tuple(place[n] for n in leaves if n in ends),
        caught=tuple((place[fork], output) for fork, output in caught),
        calls=tuple(calls),
        early=tuple(leaves[leaf] for leaf in early),
        spare=tuple((place[node], attribute) for node, attribute in spare),
        whole=any(map(_runs_once, graph.order)),
    )


def _runs_once(node: Node) -> bool:
    """Whether it cannot be part of a graph that is kept for a second call.

    Reentrant checkpointing refuses to; a compiled graph lends its buffers to its own
    backward.
    """
    return isinstance(node, _REENTRANT) or node.name() == "CompiledFunctionBackward"


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
    leaves = [variable_of(leaf) for branch in branches for leaf in branch]
    return all(v is not None and v.dim() < 2 and not v._backward_hooks for v in leaves)


def saved_by(node: Node, attribute: str) -> Sequence[Any]:
    """What a node has saved under a name: torch's SavedTensor objects."""
    saved = getattr(node, attribute)
    return saved if isinstance(saved, (tuple, list)) else (saved,)


def _large(node: Node, kept: set[int]) -> Iterator[str]:
    """Where a node saves what is worth letting go of; what is at `kept` lives on."""
    for attribute in dir(node):
        if attribute.startswith("_raw_saved_"):
            for saved in saved_by(node, attribute):
                tensor = tensor_of(saved)
                if (
                    tensor is not None
                    and tensor.nbytes >= LET_GO_FROM
                    and tensor.untyped_storage().data_ptr() not in kept
                ):
                    yield attribute
                    break
