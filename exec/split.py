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
  or its first forward, or the first behind other hooks on its modules, puts a hook on
  a tensor: these would run in I and in W.

I is the undivided backward, and nothing is left to W, where autograd refuses to
be asked for some gradients only (reentrant checkpointing) or to keep the graph
(torch.compile), and where a parameter whose gradient I would form has a hook, which
adding to `.grad` would call again.

Where no input wants a gradient, the spine leads to the node that is furthest from
the outputs.

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
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import TorchFunctionMode

from pipeproof.exec.engine import backward, grad
from pipeproof.exec.graph import Root as Root
from pipeproof.exec.graph import node_of
from pipeproof.exec.slot import Slot
from pipeproof.exec.split_plan import Plan, recognised, saved_by, walked

MOST_PLANS = 8
"""Shapes of graph that are remembered for a stage."""


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
            backward(edges, caught, leaves)
        formed, gradients = self.formed, self.gradients
        self.formed, self.gradients = [], []
        if formed:
            backward(formed, gradients)


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
        self._hooks: list[tuple[int, ...]] = []

    def begin(self) -> None:
        """Another step; hooks on modules may be others, and put hooks on tensors."""
        hooks = [
            (*module._forward_pre_hooks, *module._forward_hooks)
            for module in self._modules
        ]
        if hooks != self._hooks:
            self._hooks, self._watched = hooks, False

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
        starts = [node_of(root) for root in roots]
        for number, plan in enumerate(self._plans):
            nodes = recognised(plan, starts, leaves)
            if nodes is not None:
                if number:
                    self._plans.insert(0, self._plans.pop(number))  # the latest first
                return _halved(plan, nodes, roots, gradients, leaves)
        plan = walked(starts, leaves, at_once=self._at_once)
        nodes = recognised(plan, starts, leaves)
        assert nodes is not None  # in the graph that it was made from
        with _running(self._modules) as ran:
            result = _halved(plan, nodes, roots, gradients, leaves)
        if ran and not plan.whole:
            # Whoever runs again would do so in each call of autograd.
            plan = walked(starts, leaves, at_once=True)
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
    inputs: list[Root] = [*leaves, *plan.early, *forks]
    if not inputs:  # nothing in this stage learns, and none before it
        return [], Rest([], [], [])
    found = grad(roots, gradients, inputs, keep_graph=bool(forks))
    for number, attribute in plan.spare:
        _let_go(nodes[number], attribute)
    early, forked = len(leaves), len(leaves) + len(plan.early)
    rest = Rest([], [], [])
    for call in plan.calls:
        starts: list[GradientEdge] = []
        caught: list[Tensor] = []
        for i in call.catches:
            if (gradient := found[forked + i]) is not None:
                starts.append(forks[i])
                caught.append(gradient)
        if starts:
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
    for leaf in leaves:
        leaf.grad = None
    backward(roots, gradients)
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


def _let_go(node: Node, attribute: str) -> None:
    """Let go of saved tensors, but for those that have hooks of their own.

    Autograd asks a saved tensor's hooks what to keep, and is told: nothing.
    """
    for saved in saved_by(node, attribute):
        if isinstance(saved.data, Slot):
            saved.data.tensor = None
        elif saved.unpack_hook is None and saved.data is not None:
            saved.register_hooks(_nothing, _missing)


def _nothing(_: Tensor) -> None:
    return None


def _missing(_: None) -> NoReturn:
    raise RuntimeError(
        "a tensor saved for the backward was let go of after I, which W should not "
        "have needed: the graph has changed since I"
    )
