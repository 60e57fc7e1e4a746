"""Backward and gradients, as torch.autograd has them, with less in front of them.

`torch.autograd.backward` and `torch.autograd.grad` compare each gradient with its root
in Python, and then call autograd's engine, which compares them again. For a tiny stage
the first comparison is a third of its backward, and a step has one or more for each op.
So the engine is called as these two call it. Nothing promises its entry: where a torch
has none that works as they do, they are called themselves, and only time is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.graph import Root


@cache
def entry() -> Callable[..., Any] | None:
    """Of autograd's engine, if it does here what it does for torch.autograd."""
    try:
        run = torch.autograd.Variable._execution_engine.run_backward
        with torch.enable_grad():
            leaf = torch.ones(2, device="cpu", requires_grad=True)
            root, one = leaf * 3, torch.ones(2, device="cpu")
        wanted = {"allow_unreachable": True, "accumulate_grad": False}
        (found,) = run((root,), (one,), True, False, (leaf,), **wanted)
        run((root,), (one,), False, False, (), **wanted | {"accumulate_grad": True})
        both = found, leaf.grad
        works = all(x is not None and torch.equal(x, root) for x in both)
    except Exception:  # whatever another torch makes of it
        return None
    return run if works else None


def backward(
    roots: Sequence[Root], gradients: Sequence[Tensor], leaves: Sequence[Tensor] = ()
) -> None:
    """As `torch.autograd.backward`: add to the leaves' `.grad`.

    Args:
        roots: where to start.
        gradients: of these, one for each.
        leaves: to add to; all that the roots lead to if none is given.
    """
    if (run := entry()) is None:
        torch.autograd.backward(
            list(roots),  # type: ignore[arg-type]
            list(gradients),
            inputs=list(leaves) or None,
        )
        return
    run(
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
    found: tuple[Tensor | None, ...]
    if (run := entry()) is None:
        found = torch.autograd.grad(
            list(roots),  # type: ignore[arg-type]
            list(inputs),  # type: ignore[arg-type]
            list(gradients),
            retain_graph=keep_graph,
            allow_unused=True,
        )
        return found
    found = run(
        tuple(roots),
        tuple(gradients),
        keep_graph,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found
