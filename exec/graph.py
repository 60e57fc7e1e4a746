"""The graph that autograd made of a stage's forward, and what leads where in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Root = Tensor | GradientEdge
"""An output, or its edge in the graph."""

Steps = tuple[tuple[int, tuple[int, ...]], ...]
"""Numbers of nodes: one, and those that it leads to, -1 for nothing."""


def node_of(root: Root) -> Node:
    """Where a backward from it starts."""
    if isinstance(root, GradientEdge):
        return root.node
    return root.grad_fn or get_gradient_edge(root).node


def variable_of(node: Node | None) -> Tensor | None:
    """What a node adds gradients up in, if that is all it does."""
    found: Tensor | None = node.variable if type(node) is _ACCUMULATES else None  # type: ignore[attr-defined]
    return found


_ACCUMULATES = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


class Graph:
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
        inner = [node for node in self.order if variable_of(node) is None]
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
            if variable_of(node) is not None:
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

    def numbered(self) -> tuple[dict[Node, int], Steps]:
        """The number of each node as it is found, the roots first; and the steps."""
        place = {root: i for i, root in reversed(list(enumerate(self._roots)))}
        count = len(self._roots)
        steps: list[tuple[int, tuple[int, ...]]] = []
        for node in self.order:
            children: list[int] = []
            for child, _ in self.below[node]:
                if child is not None and child not in place:
                    place[child] = count
                    count += 1
                children.append(-1 if child is None else place[child])
            if children:
                steps.append((place[node], tuple(children)))
        return place, tuple(steps)

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
