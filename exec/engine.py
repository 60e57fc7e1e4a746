"""Calls of autograd's engine with nothing in front of them.

`torch.autograd.backward` and `torch.autograd.grad` compare each gradient with its
root in Python, and then call this, where the engine compares them again. For a tiny
stage the first comparison is a third of its backward, and a step has one or more for
each op.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from pipeproof.exec.graph import Root


def backward(
    roots: Sequence[Root], gradients: Sequence[Tensor], leaves: Sequence[Tensor] = ()
) -> None:
    """As `torch.autograd.backward`: add to the leaves' `.grad`.

    Args:
        roots: where to start.
        gradients: of these, one for each.
        leaves: to add to; all that the roots lead to if none is given.
    """
    _engine_run_backward(
        tuple(roots),
        tuple(gradients),
        False,
        False,
        tuple(leaves),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def grad(
    roots: Sequence[Root],
    gradients: Sequence[Tensor],
    inputs: Sequence[Root],
    *,
    keep_graph: bool,
) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad`: the gradients of some tensors or edges.

    Args:
        roots: where to start.
        gradients: of these, one for each.
        inputs: whose gradients are wanted; at least one.
        keep_graph: whether something is to be run again.

    Returns:
        Of each input; None for one that no root depends on.
    """
    return _engine_run_backward(
        tuple(roots),
        tuple(gradients),
        keep_graph,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
