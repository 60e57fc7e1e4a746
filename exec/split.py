"""A backward in two halves: the input's gradient now, the weights' later.

Walking from a stage's outputs down its graph, some nodes lead to the stage's
input: the spine. A spine node that also leads off the spine to parameters is a
fork, and the gradient that arrives at a fork is all that its parameters need::

    output ── … ── addmm ── gelu ── addmm ── … ── input        the spine
                     │                │
                   weight           weight                      off it

I runs the spine and catches the gradient at each fork; W starts at the forks
with what was caught, and runs what hangs off the spine. Autograd computes only
what leads to the gradients asked for, so no product is formed twice.

Where this would compute anything twice, or add up in another order than an
undivided backward, the parameter's gradient is formed in I as well:

* it hangs off several forks: autograd sums its parts before it adds them to
  `.grad`, and floating point minds the difference;
* it shares a branch with such a one;
* its fork is a Python `autograd.Function`, which computes all its gradients at
  once;
* the stage runs parts of its forward again in its backward (checkpointing).

What W does with a gradient that I formed is to add it to `.grad`. Where no input
wants a gradient, the spine leads to the node that is furthest from the outputs.

The walk is done once for a shape of graph. A later graph is recognised by the
kind and the order of creation of the nodes that the walk found; one that differs
is walked anew.

Source: zero-bubble scheduling, Qi et al. 2023, arXiv:2401.10241, needs the split;
that it follows the graph's nodes is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Root = Tensor | GradientEdge


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
class Plan:
    """What one shape of graph needs.

    Attributes:
        steps: how to come to the nodes: each (a, i) is the i-th of what the a-th
            leads to, the roots being the first.
        marks: (node, name, age) of those by which the graph is recognised; the age
            is how many nodes were made between it and the first root.
        leaves: (node, parameter) of those that take up a gradient.
        caught: (node, output) of each fork's gradients.
        calls: of W.
        early: leaves whose gradient is formed in I.
    """

    steps: tuple[tuple[int, int], ...]
    marks: tuple[tuple[int, str, int], ...]
    leaves: tuple[tuple[int, Tensor], ...]
    caught: tuple[tuple[int, int], ...]
    calls: tuple[Call, ...]
    early: tuple[Tensor, ...]


@dataclass(slots=True)
class Rest:
    """What I leaves for W.

    Attributes:
        calls: what autograd has yet to run: from where, with what, to which leaves.
        formed: gradients that I had to form, with their leaves.
    """

    calls: list[tuple[list[GradientEdge], list[Tensor], tuple[Tensor, ...]]]
    formed: list[tuple[Tensor, Tensor]]

    def run(self) -> None:
        """W: add the weights' gradients to `.grad`."""
        for edges, caught, leaves in self.calls:
            torch.autograd.backward(edges, caught, inputs=leaves)
        for leaf, gradient in self.formed:
            torch.autograd.backward(leaf, gradient)


class Splitter:
    """Splits a stage's backwards, and remembers the shapes of its graphs.

    Args:
        modules: of the stage; one that runs within a backward is checkpointed.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._modules = modules
        self._plans: list[Plan] = []

    def forget(self) -> None:
        """The stage has other parameters than before."""
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
        edges = [_edge(root) for root in roots]
        known = self._known(edges)
        if known is not None:
            return _halved(*known, roots, gradients, leaves)
        plan = _walked(edges, leaves)
        nodes = _recognised(plan, edges)
        assert nodes is not None  # in the graph that it was made from
        with _running(self._modules) as ran:
            result = _halved(plan, nodes, roots, gradients, leaves)
        # Whoever runs again would do so in each call of autograd.
        plan = _walked(edges, leaves, at_once=True) if ran else plan
        self._plans = [plan, *self._plans[: MOST_PLANS - 1]]
        return result

    def _known(self, roots: list[GradientEdge]) -> tuple[Plan, list[Node]] | None:
        for number, plan in enumerate(self._plans):
            nodes = _recognised(plan, roots)
            if nodes is not None:
                self._plans.insert(0, self._plans.pop(number))  # the latest first
                return plan, nodes
        return None


MOST_PLANS = 8
"""Shapes of graph that are remembered for a stage."""


def _halved(
    plan: Plan,
    nodes: list[Node],
    roots: Sequence[Root],
    gradients: Sequence[Tensor],
    leaves: list[Tensor],
) -> tuple[list[Tensor | None], Rest]:
    """I by a plan, whose nodes these are; and W."""
    forks = [GradientEdge(nodes[node], output) for node, output in plan.caught]
    outputs: list[Any] = list(roots)  # torch takes a mixture, its types do not
    inputs: list[Any] = [*leaves, *plan.early, *forks]
    if not inputs:  # nothing in this stage learns, and none before it
        return [], Rest([], [])
    found = torch.autograd.grad(
        outputs,
        inputs,
        list(gradients),
        retain_graph=True,
        allow_unused=True,
    )
    early, forked = len(leaves), len(leaves) + len(plan.early)
    caught = found[forked:]
    calls = []
    for call in plan.calls:
        there = [i for i in call.catches if caught[i] is not None]
        if there:
            starts = [forks[i] for i in there]
            calls.append((starts, [caught[i] for i in there], call.leaves))
    formed = [
        (leaf, gradient)
        for leaf, gradient in zip(plan.early, found[early:forked])
        if gradient is not None
    ]
    return list(found[:early]), Rest(calls, formed)


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


def _edge(root: Root) -> GradientEdge:
    return get_gradient_edge(root) if isinstance(root, Tensor) else root


def _variable(node: Node) -> Tensor | None:
    """What a node adds gradients up in, if that is all it does."""
    return getattr(node, "variable", None)


def _in_python(node: object) -> bool:
    return isinstance(node, BackwardCFunction)


def _recognised(plan: Plan, roots: list[GradientEdge]) -> list[Node] | None:
    """The plan's nodes in another graph; None if that has another shape."""
    nodes = [root.node for root in roots]
    try:
        for parent, child in plan.steps:
            node = nodes[parent].next_functions[child][0]
            if node is None:
                return None
            nodes.append(node)
        newest = nodes[0]._sequence_nr()
        for number, name, age in plan.marks:
            node = nodes[number]
            if node.name() != name or newest - node._sequence_nr() != age:
                return None
        for number, leaf in plan.leaves:
            if _variable(nodes[number]) is not leaf:
                return None
    except IndexError:  # a node that leads to fewer
        return None
    return nodes


def _walked(
    roots: list[GradientEdge], inputs: list[Tensor], *, at_once: bool = False
) -> Plan:
    graph = _Graph([root.node for root in roots])
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
    outputs = graph.outputs(roots)
    caught = [(fork, number) for fork in late for number in sorted(outputs[fork])]
    leaves = {n: leaf for n in graph.order if (leaf := _variable(n)) is not None}
    inner = [node for node in graph.order if node in spine and node not in ends]
    place, steps = graph.paths([*late, *inner[-1:], *leaves])
    age = roots[0].node._sequence_nr()
    calls = []
    for level in graph.levels(list(late)):
        members = [i for i, (fork, _) in enumerate(caught) if fork in level]
        below = [leaves[leaf] for fork in level for leaf in late[fork]]
        calls.append(Call(tuple(members), tuple(below)))
    return Plan(
        tuple(steps),
        tuple(
            (i, node.name(), age - node._sequence_nr())
            for node, i in place.items()
            if node not in leaves
        ),
        tuple((place[n], leaf) for n, leaf in leaves.items() if n not in ends),
        tuple((place[fork], number) for fork, number in caught),
        tuple(calls),
        tuple(leaves[leaf] for leaf in early),
    )


def _early(
    branches: dict[Node, list[dict[Node, None]]], at_once: bool
) -> dict[Node, None]:
    """The leaves whose gradient is formed in I."""
    forks: dict[Node, set[Node]] = {}
    early: dict[Node, None] = {}
    for fork, hanging in branches.items():
        for branch in hanging:
            for leaf in branch:
                forks.setdefault(leaf, set()).add(fork)
                if at_once or _in_python(fork) or len(forks[leaf]) > 1:
                    early[leaf] = None
    several = [branch for hanging in branches.values() for branch in hanging]
    settled = -1
    while settled != len(early):  # what shares a branch with one is one
        settled = len(early)
        for branch in several:
            if not early.keys().isdisjoint(branch):
                early |= branch
    return early


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
        """The node with the longest way from the roots that is not a leaf."""
        inner = [node for node in self.order if _variable(node) is None]
        distance = dict.fromkeys(self.order, 0)
        for node in self.order:
            for child, _ in self.below[node]:
                if child is not None:
                    distance[child] = max(distance[child], distance[node] + 1)
        return {max(inner, key=distance.__getitem__)} if inner else set()

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

    def outputs(self, roots: list[GradientEdge]) -> dict[Node, set[int]]:
        """Of each node, the outputs for which a gradient arrives."""
        result: dict[Node, set[int]] = {node: set() for node in self.order}
        for root in roots:
            result[root.node].add(root.output_nr)
        for edges in self.below.values():
            for child, number in edges:
                if child is not None:
                    result[child].add(number)
        return result

    def paths(
        self, targets: list[Node]
    ) -> tuple[dict[Node, int], list[tuple[int, int]]]:
        """Where each target stands when the steps to all of them are taken."""
        parent: dict[Node, tuple[Node, int]] = {}
        for node in self.order:
            for number, (child, _) in enumerate(self.below[node]):
                if child is not None and child not in parent:
                    parent[child] = node, number
        place = {root: i for i, root in reversed(list(enumerate(self._roots)))}
        steps: list[tuple[int, int]] = []
        for target in targets:
            chain = [target]
            while chain[-1] not in place:
                chain.append(parent[chain[-1]][0])
            for node in reversed(chain[:-1]):
                above, number = parent[node]
                place[node] = len(self._roots) + len(steps)
                steps.append((place[above], number))
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
